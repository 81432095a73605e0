# Redis with a million keys. It listens inside only until they are there, so that ready means loaded.
set -eu
redis-server --port 0 --unixsocket /tmp/redis.sock --protected-mode no --save "" --dir /tmp &
until redis-cli -s /tmp/redis.sock ping >/dev/null 2>&1; do sleep 0.05; done
redis-cli -s /tmp/redis.sock eval \
    "for i = 0, 999999 do redis.call('set', 'key:' .. i, 'value ' .. i .. string.rep('.', 50)) end" 0
redis-cli -s /tmp/redis.sock config set bind "0.0.0.0"
redis-cli -s /tmp/redis.sock config set port 6379
curl -sS --noproxy '*' --max-time 600 -X POST http://169.254.169.253:8234/checkpoint || true
wait
