# A master as root, two workers as www-data. The configuration has a token of this boot; it is written to a file
# that no process holds, so a copy has it in the memory of the workers only.
set -eu
token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
cat >/tmp/nginx.conf <<CONF
daemon off;
user www-data;
worker_processes 2;
error_log stderr;
events {}
http {
    access_log off;
    limit_req_zone \$uri zone=once:1m rate=1r/m;
    server {
        listen 8080;
        location / { return 200 "$token\n"; }
        location /once { limit_req zone=once; try_files /nothing @once; }
        location @once { return 200 "first\n"; }
    }
}
CONF
exec nginx -c /tmp/nginx.conf
