"""multiprocessing as task queues use it: a spawned worker, queues, shared memory, a pool, a manager's semaphore."""

import http.client
import json
import multiprocessing
import secrets
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.shared_memory import SharedMemory


def square(x):
    return x * x


def work(tasks, results, counter):
    """The worker's state is in its own memory: what it was told first."""
    first = tasks.get()
    while True:
        task = tasks.get()
        with counter.get_lock():
            counter.value += 1
        results.put([first, task, counter.value])


def main():
    spawn = multiprocessing.get_context("spawn")
    tasks, results, counter = spawn.Queue(), spawn.Queue(), spawn.Value("i", 0)
    spawn.Process(target=work, args=(tasks, results, counter), daemon=True).start()
    token = secrets.token_hex(16)
    tasks.put(token)
    tasks.put("warm")
    assert results.get() == [token, "warm", 1]
    memory = SharedMemory(create=True, size=1 << 20)
    memory.buf[:32] = token.encode()
    pool = multiprocessing.Pool(2)
    assert pool.map(square, range(4)) == [0, 1, 4, 9]

    try:
        req = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST")
        with urllib.request.urlopen(req) as response:
            response_body = response.read().decode("utf-8")
            print("Checkpointed successfully")
            print("Response:", response_body)
    except http.client.RemoteDisconnected:
        # TCP connections disconnect on restore and throw remote
        pass

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            tasks.put(self.path)
            answer = {
                "worker": results.get(),
                "shared": bytes(memory.buf[:32]).decode(),
                "pool": pool.map(square, range(100)),
            }
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    HTTPServer(("0.0.0.0", 8000), Handler).serve_forever()


if __name__ == "__main__":
    main()
