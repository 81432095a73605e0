# A process under a debugger belongs to it: nobody else can stop and read it. The app says so and goes on.
strace -o /dev/null sleep 1000000 &
until grep -Eqs '^TracerPid:.[1-9]' $(grep -lsx sleep /proc/[0-9]*/comm | sed s/comm/status/); do sleep 0.1; done
curl -sS --noproxy '*' --max-time 300 -X POST http://169.254.169.253:8234/checkpoint
exec python3 -m http.server 8000 --directory /cortex
