# Caddy, a Go program. Its configuration is given to it over HTTP and is in its memory only.
set -eu
token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export HOME=/tmp XDG_CONFIG_HOME=/tmp XDG_DATA_HOME=/tmp
caddy run &
until curl -s --noproxy '*' -o /dev/null http://localhost:2019/config/; do sleep 0.1; done
curl -sS --noproxy '*' -H 'Content-Type: application/json' http://localhost:2019/load -d '{
  "admin": {"listen": "localhost:2019", "config": {"persist": false}},
  "apps": {"http": {"servers": {"app": {"listen": [":8080"], "routes": [
    {"handle": [{"handler": "static_response", "body": "'"$token"'"}]}]}}}}}'
curl -sS --noproxy '*' --max-time 300 -X POST http://169.254.169.253:8234/checkpoint || echo "curl ended with $?"
wait
