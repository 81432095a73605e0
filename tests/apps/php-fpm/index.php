<?php
apcu_add("token", bin2hex(random_bytes(16)));
echo json_encode(["token" => apcu_fetch("token"), "visits" => apcu_inc("visits"), "pid" => getmypid()]);
