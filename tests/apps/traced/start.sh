# A process under a debugger belongs to it: nobody else can stop and read it. The app says so and goes on.
strace -o /dev/null sleep 1000000 &
sleep 1
curl -sS --noproxy '*' --max-time 300 -X POST http://169.254.169.253:8234/checkpoint
exec python3 -m http.server 8000 --directory /cortex
