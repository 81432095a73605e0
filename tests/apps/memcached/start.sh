# memcached as a user of its own. The request for the checkpoint is written by the shell itself.
memcached -u memcache -l 0.0.0.0 -m 64 &
until exec 3<>/dev/tcp/127.0.0.1/11211; do sleep 0.1; done 2>/dev/null
token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
printf 'set token 0 0 32\r\n%s\r\nset visits 0 0 1\r\n0\r\nquit\r\n' "$token" >&3
cat <&3
exec 3>&- 4<>/dev/tcp/169.254.169.253/8234
printf 'POST /checkpoint HTTP/1.1\r\nHost: relume\r\nContent-Length: 0\r\nConnection: close\r\n\r\n' >&4
cat <&4
wait
