# A Redis whose child is in the middle of saving when the checkpoint is taken: 1000 keys at 10 ms each.
set -eu
mkdir -p /tmp/redis
redis-server --bind 0.0.0.0 --protected-mode no --save "" --dir /tmp/redis --rdb-key-save-delay 10000 &
until redis-cli ping >/dev/null 2>&1; do sleep 0.1; done
redis-cli set token "$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
redis-cli eval "for i = 1, 1000 do redis.call('set', 'key:' .. i, string.rep('x', 1000)) end" 0
redis-cli bgsave
curl -sS --noproxy '*' --max-time 300 -X POST http://169.254.169.253:8234/checkpoint || echo "curl ended with $?"
wait
