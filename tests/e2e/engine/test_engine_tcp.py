"""TCP: inside lives on, outside ends as end of file; and timers that CRIU forgets."""

from __future__ import annotations

import socket
import threading

from relume.linux import netns

from .conftest import ID_BASE, OTHER_BASE, SIDECAR, Box, Lab

PROGRAM = """
import os
def print(*words, flush=True):  # in one piece: two threads speak
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
import http.client, os, select, socket, struct, threading, time, urllib.request, ctypes

# inside, IPv4 and (by a v4-mapped address) IPv6, with something still in the queue
server = socket.create_server(("127.0.0.1", 7001))
near = socket.create_connection(("127.0.0.1", 7001))
far, _ = server.accept()
near.send(b"queued")
six = socket.socket(socket.AF_INET6)
six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
six.bind(("::ffff:127.0.0.1", 7002))
six.listen()
near6 = socket.create_connection(("127.0.0.1", 7002))
far6, _ = six.accept()

# outside
import asyncio
async def wait():
    reader, writer = await asyncio.open_connection("SIDECAR", 8235)
    print("asyncio", await reader.read(), flush=True)
waiting = threading.Thread(target=lambda: asyncio.run(wait()), daemon=True)
waiting.start()
idle = socket.create_connection(("SIDECAR", 8235))
idle.setblocking(False)
poll = select.epoll()
poll.register(idle, select.EPOLLIN | select.EPOLLRDHUP)

# a periodic timer that expired and was not read
libc = ctypes.CDLL(None, use_errno=True)
timer = libc.timerfd_create(1, 0)
libc.timerfd_settime(timer, 0, struct.pack("qqqq", 0, 50_000_000, 0, 50_000_000), None)
time.sleep(0.2)

answer = []
def ask():
    try:
        request = urllib.request.Request("http://SIDECAR:8234/checkpoint", method="POST")
        with urllib.request.urlopen(request) as response:
            answer.append(response.read().decode())
    except Exception as error:
        answer.append(type(error).__module__ + "." + type(error).__name__)
asking = threading.Thread(target=ask)
started = time.monotonic()
asking.start()
print("asking", flush=True)
asking.join()
print("answer", answer[0], flush=True)
print("far", far.recv(99), flush=True)
far.send(b"back")
print("near", near.recv(99), flush=True)
near6.send(b"six")
print("far6", far6.recv(99), flush=True)
os.read(timer, 8)
fired = os.read(timer, 8)
print("timer", struct.unpack("q", fired)[0] >= 1, flush=True)
try:
    print("idle", poll.poll(1.0)[0][1] & select.EPOLLRDHUP != 0, idle.recv(9), flush=True)
except (IndexError, BlockingIOError) as error:
    print("idle open", flush=True)
fresh = socket.create_connection(("127.0.0.1", 7001))
server.accept()[0].send(b"new")
print("fresh", fresh.recv(9), flush=True)
print("end", flush=True)
time.sleep(60)
""".replace("SIDECAR", SIDECAR)


class Sidecar:
    """Answers one POST on 8234, when told; holds two silent connections on 8235."""

    def __init__(self, box: Box) -> None:
        self._inside = netns.Inside(netns.open_of(box.init))
        self._sockets = [
            self._inside.run(lambda port=port: netns.listener(SIDECAR, port, backlog=8))
            for port in (8234, 8235)
        ]
        for each in self._sockets:
            each.setblocking(True)
        self.silent: list[socket.socket] = []
        self.asked = threading.Event()
        self.answer = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._post, self._silent)]
        for thread in self._threads:
            thread.start()

    def _post(self) -> None:
        connection, _ = self._sockets[0].accept()
        with connection:
            connection.recv(65536)
            self.asked.set()
            self.answer.wait(30)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\ncreated")

    def _silent(self) -> None:
        for _ in range(2):
            self.silent.append(self._sockets[1].accept()[0])

    def close(self) -> None:
        self.answer.set()
        for thread in self._threads:
            thread.join(5)
        self._inside.close()
        for each in [*self._sockets, *self.silent]:
            each.close()


def run(lab: Lab, loopback: str, id_base: int) -> tuple[str, str]:
    """What the copy and the original print."""
    box = lab.boot("import time, os\nwhile not os.path.exists('/go'): time.sleep(0.01)\n" + PROGRAM)
    sidecar = Sidecar(box)
    try:
        box.touch("go")
        assert sidecar.asked.wait(60), box.stdout
        box.wait_for("asking")
        checkpoint = box.dump(loopback=loopback)
        copy = lab.restore(checkpoint, loopback=loopback, id_base=id_base)
        copied = copy.wait_for("end" if loopback == "keep" else "answer")
        if loopback == "keep":
            copied = copy.wait_for("asyncio")  # a thread of its own, which may be the last to speak
        sidecar.answer.set()
        return copied, box.wait_for("end")
    finally:
        sidecar.close()


def test_connections_inside_survive_and_outside_end(lab: Lab) -> None:
    copied, original = run(lab, "keep", OTHER_BASE)
    lines = copied.splitlines()
    lines.remove("asyncio b''")  # from a thread of its own, so in no order
    assert lines == [
        "answer http.client.RemoteDisconnected",
        "far b'queued'",
        "near b'back'",
        "far6 b'six'",
        "timer True",
        "idle True b''",
        "fresh b'new'",
        "end",
    ]
    assert "answer created" in original
    assert "idle open" in original


def test_closing_all(lab: Lab) -> None:
    copied, original = run(lab, "close", ID_BASE)
    assert "answer http.client.RemoteDisconnected" in copied
    assert "answer created" in original
