# PHP-FPM (master as root, workers as www-data) behind nginx over a unix socket. What PHP remembers is in APCu, a
# piece of shared memory.
set -eu
cat >/tmp/fpm.conf <<CONF
[global]
error_log = /dev/stderr
daemonize = no
[www]
user = www-data
group = www-data
listen = /tmp/fpm.sock
listen.owner = www-data
pm = static
pm.max_children = 3
CONF
cat >/tmp/nginx.conf <<CONF
daemon off;
user www-data;
worker_processes 1;
error_log stderr;
events {}
http {
    access_log off;
    server {
        listen 8080;
        location / {
            fastcgi_pass unix:/tmp/fpm.sock;
            include /etc/nginx/fastcgi_params;
            fastcgi_param SCRIPT_FILENAME /cortex/index.php;
        }
    }
}
CONF
"$(ls /usr/sbin/php-fpm* | head -1)" --fpm-config /tmp/fpm.conf &
until [ -S /tmp/fpm.sock ]; do sleep 0.1; done
exec nginx -c /tmp/nginx.conf
