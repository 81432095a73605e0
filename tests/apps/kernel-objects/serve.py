"""What a program may ask of the kernel, and find as it was: timers and clocks, limits, a terminal, watches, children
in every state, files without names. `GET /` tries each once more and says how it went."""

import ctypes
import fcntl
import json
import mmap
import os
import pty
import resource
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import relume

token = secrets.token_hex(16)
libc = ctypes.CDLL(None, use_errno=True)
libc.sem_open.restype = ctypes.c_void_p
os.makedirs("/work/watched")


def child(run):
    if (pid := os.fork()) == 0:
        run()
        os._exit(0)
    return pid


# A named semaphore for which another process waits, a named fifo with a writer, memory shared over a fork.
semaphore = ctypes.c_void_p(libc.sem_open(b"/jobs", os.O_CREAT, 0o600, 0))
woken, wakes = os.pipe()


def wait_for_jobs():
    while True:
        libc.sem_wait(semaphore)
        os.write(wakes, b"woken")


child(wait_for_jobs)
os.mkfifo("/work/fifo")


def tick():
    with open("/work/fifo", "w") as fifo:
        while True:
            fifo.write("tick\n")
            fifo.flush()
            shared[0] = (shared[0] + 1) % 256
            time.sleep(0.05)


shared = mmap.mmap(-1, 4096)
child(tick)
fifo = open("/work/fifo")

# A terminal of a size and in a mode of its own.
terminal_child, terminal = pty.fork()
if terminal_child == 0:
    os.execvp("bash", ["bash", "--norc", "-i"])
attributes = termios.tcgetattr(terminal)
attributes[3] &= ~termios.ECHO
termios.tcsetattr(terminal, termios.TCSANOW, attributes)
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
os.write(terminal, b"KEPT=in-the-shell; cd /work/watched; PS1=; echo settled\n")
said = b""
while b"settled" not in said:
    said += os.read(terminal, 4096)


# Timers: one of POSIX that comes as a signal, and timerfds of three clocks.
class Event(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    )


alarms = []
signal.signal(signal.SIGALRM, lambda *_: alarms.append(time.monotonic()))
timer = ctypes.c_void_p()
assert (
    libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(Event(signal=signal.SIGALRM)), ctypes.byref(timer))
    == 0
)
assert libc.timer_settime(timer, 0, struct.pack("qqqq", 0, 50_000_000, 0, 50_000_000), None) == 0


def timerfd(clock, absolute, interval_ns, second):
    descriptor = libc.timerfd_create(clock, os.O_NONBLOCK)
    spec = struct.pack("qqqq", 0, interval_ns, second, interval_ns)
    assert libc.timerfd_settime(descriptor, absolute, spec, None) == 0
    return descriptor


began, began_boot, began_wall = time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time()
deadline = timerfd(time.CLOCK_MONOTONIC, 1, 0, int(began) + 3)
periodic = timerfd(time.CLOCK_BOOTTIME, 0, 50_000_000, 0)
of_the_wall = timerfd(time.CLOCK_REALTIME, 1, 0, int(began_wall) + 2)
waited = []
condition = threading.Condition()


def wait():
    with condition:
        condition.wait(timeout=3)
        waited.append(time.monotonic() - began)


threading.Thread(target=wait).start()

# Limits and how it is scheduled, a name, watches on all kinds of file systems.
nice = subprocess.Popen(["nice", "-n", "7", "sleep", "1000000"])
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 1000))
libc.prctl(15, b"renamed", 0, 0, 0)  # PR_SET_NAME
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("300")
watches = libc.inotify_init1(os.O_NONBLOCK)
for path in (b"/etc", b"/dev/shm", b"/work/watched", b"/tmp"):
    assert libc.inotify_add_watch(watches, path, 0x100) >= 0, path

# Files without a name, or whose name is another's; locks; children stopped, ended, of an executable that is gone.
unnamed = os.open("/work", os.O_TMPFILE | os.O_RDWR)
os.write(unnamed, b"no name")
locked = open("/work/locked", "w")
fcntl.fcntl(locked, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))  # F_OFD_SETLK


def stay_where_nothing_is():
    os.mkdir("/work/gone")
    os.chdir("/work/gone")
    os.rmdir("/work/gone")
    signal.pause()


child(stay_where_nothing_is)
gone, replaced = (shutil.copy("/bin/sleep", f"/work/{name}") for name in ("gone-sleep", "replaced-sleep"))
running = [subprocess.Popen([path, "1000000"]) for path in (gone, replaced)]
time.sleep(0.2)
os.unlink(gone)
shutil.copy("/bin/cat", "/work/other")
os.rename("/work/other", replaced)
stopped = subprocess.Popen(["sleep", "1000000"])
os.kill(stopped.pid, signal.SIGSTOP)
ended = subprocess.Popen(["true"])
here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
here.send(b"a packet")
time.sleep(0.2)
print(relume.checkpoint(), flush=True)

CLOCKS = "import time; print(time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME), open('/proc/uptime').read())"


def state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def soon(condition, what):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def look():
    libc.sem_post(semaphore)
    assert select.select([woken], [], [], 10)[0], "the semaphore's waiter"
    assert os.read(woken, 9) == b"woken"
    assert fifo.readline() == "tick\n"
    before = shared[0]
    soon(lambda: shared[0] != before, "memory shared over a fork")
    os.write(terminal, b"echo $KEPT $PWD $(stty size)\n")
    said = b""
    while b"99" not in said:
        assert select.select([terminal], [], [], 10)[0], said
        said += os.read(terminal, 4096)
    assert b"in-the-shell /work/watched 33 99" in said, said
    assert not termios.tcgetattr(terminal)[3] & termios.ECHO

    count = len(alarms)
    soon(lambda: len(alarms) > count + 2, "the POSIX timer")
    assert select.select([deadline], [], [], 10)[0] and time.monotonic() >= int(began) + 3
    os.read(periodic, 8)
    assert select.select([periodic], [], [], 10)[0] and select.select([of_the_wall], [], [], 10)[0]
    while not waited:
        time.sleep(0.01)
    assert 3 <= waited[0] < 30, waited
    run = subprocess.run([sys.executable, "-c", CLOCKS], capture_output=True, text=True, check=True)
    monotonic, boot, uptime, _ = map(float, run.stdout.split())
    assert 0 <= monotonic - began < 120 and 0 <= boot - began_boot < 120, "what exec sees: no jump"
    assert abs(uptime - boot) < 1

    assert os.getpriority(os.PRIO_PROCESS, nice.pid) == 7
    assert os.sched_getscheduler(0) == os.SCHED_BATCH and len(os.sched_getaffinity(0)) == 1
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, 1000)
    with open("/proc/self/oom_score_adj") as score, open("/proc/self/comm") as name:
        assert (score.read(), name.read()) == ("300\n", "renamed\n")
    for path in ("/etc", "/dev/shm", "/work/watched", "/tmp"):
        with open(f"{path}/new-file", "w"):
            pass
    time.sleep(0.1)
    assert os.read(watches, 8192).count(b"new-file") == 4
    assert os.pread(unnamed, 99, 0) == b"no name"
    assert [each.poll() for each in running] == [None, None]
    assert os.readlink(f"/proc/{running[0].pid}/exe") == "/work/gone-sleep (deleted)"
    assert (state(stopped.pid), state(ended.pid)) == ("T", "Z")
    assert ended.wait() == 0
    assert there.recv(99) == b"a packet"
    with open("/work/locked", "w") as again:
        try:
            fcntl.fcntl(again, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
            raise AssertionError("the lock is gone")
        except BlockingIOError:
            pass


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        look()
        body = json.dumps({"token": token}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


HTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
