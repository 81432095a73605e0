"""Kernel objects that programs hold work in a copy as they did: one program that has them all."""

from __future__ import annotations

from .conftest import OTHER_BASE, Lab, let_go_on

PROGRAM = r"""
import array, ctypes, fcntl, mmap, multiprocessing, os, pty, select, signal, socket, struct, sys, threading, time
from multiprocessing import shared_memory

libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.sem_open.restype = ctypes.c_void_p

# descriptors of the kernel
event = libc.eventfd(5, 0)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
signals = libc.signalfd(-1, struct.pack("Q", 1 << (signal.SIGUSR2 - 1)), 0)
os.kill(os.getpid(), signal.SIGUSR2)
reader, writer = os.pipe()
os.write(writer, b"in the pipe")
poll = select.epoll()
poll.register(reader, select.EPOLLIN)
child = os.fork()
if child == 0:
    signal.pause()
pidfd = os.pidfd_open(child)

# memory with a name, with none, and shared
memfd = os.memfd_create("named")
os.write(memfd, b"in the memfd")
anonymous = mmap.mmap(-1, 1 << 20)
anonymous[:6] = b"shared"
segment = shared_memory.SharedMemory(create=True, size=4096)
segment.buf[:6] = b"posix!"
libc.mmap.restype = ctypes.c_void_p
assert libc.mmap(None, ctypes.c_size_t(1 << 43), 0, 0x22, -1, 0) != ctypes.c_void_p(-1).value  # 8 TiB, reserved only
sysv = libc.shmget(0x1234, 4096, 0o1600)
attached = libc.shmat(sysv, None, 0)
ctypes.memmove(attached, b"sysv", 4)
semaphore = libc.sem_open(b"/gone", os.O_CREAT, 0o600, 1)
libc.sem_unlink(b"/gone")
lock = multiprocessing.Lock()

# sockets
left, right = socket.socketpair()
right.sendall(b"in the socket")
carrier, receiver = socket.socketpair()
with open("/proc/self/status") as passed:
    socket.send_fds(carrier, [b"fd"], [passed.fileno()])
abstract = socket.socket(socket.AF_UNIX)
abstract.bind("\0abstract")
abstract.listen()
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", 0))
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
netlink.bind((0, 0))

# processes in odd states, and a terminal
if (stopped := os.fork()) == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
    signal.pause()
if (zombie := os.fork()) == 0:
    os._exit(7)
if (session := os.fork()) == 0:
    os.setsid()
    signal.pause()
terminal_pid, terminal = pty.fork()
if terminal_pid == 0:
    while True:
        sys.stdout.write("echo " + sys.stdin.readline())
        sys.stdout.flush()

# files of the kernel, limits, timers, another user
status = open("/proc/self/status")
sysfs = open("/sys/kernel/mm/transparent_hugepage/enabled")
null, random = open("/dev/null", "w"), open("/dev/urandom", "rb", buffering=0)
if (other := os.fork()) == 0:
    os.setgroups([])
    os.setgid(33)
    os.setuid(33)
    while True:
        signal.pause()
alarms = []
signal.signal(signal.SIGALRM, lambda *_: alarms.append(time.monotonic()))
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
began, wall = time.monotonic(), time.time()
slept = []
sleeper = threading.Thread(target=lambda: (time.sleep(4), slept.append(time.monotonic() - began)))
sleeper.start()
time.sleep(0.2)
print("ready", flush=True)

while not os.path.exists("/go"):
    time.sleep(0.02)

assert struct.unpack("Q", os.read(event, 8)) == (5,)
assert struct.unpack_from("I", os.read(signals, 128))[0] == signal.SIGUSR2
assert poll.poll(1) == [(reader, select.EPOLLIN)]
assert os.read(reader, 99) == b"in the pipe"
signal.pidfd_send_signal(pidfd, signal.SIGKILL)
assert select.select([pidfd], [], [], 30)[0] and os.waitpid(child, 0)[1] == signal.SIGKILL

assert os.pread(memfd, 99, 0) == b"in the memfd"
assert anonymous[:6] == b"shared" and bytes(segment.buf[:6]) == b"posix!"
again = shared_memory.SharedMemory(segment.name)
assert bytes(again.buf[:6]) == b"posix!"
assert ctypes.string_at(attached, 4) == b"sysv" and libc.shmget(0x1234, 4096, 0) == sysv
assert libc.sem_wait(ctypes.c_void_p(semaphore)) == 0 and libc.sem_post(ctypes.c_void_p(semaphore)) == 0
with lock:
    pass

assert left.recv(99) == b"in the socket"
data, fds, _, _ = socket.recv_fds(receiver, 99, 1)
assert data == b"fd" and os.pread(fds[0], 5, 0) == b"Name:"
with socket.socket(socket.AF_UNIX) as client:
    client.connect("\0abstract")
    abstract.accept()
udp.sendto(b"datagram", udp.getsockname())
assert udp.recv(99) == b"datagram"
assert netlink.getsockname()

assert open(f"/proc/{stopped}/stat").read().split()[2] == "T"
os.kill(stopped, signal.SIGCONT)
os.kill(stopped, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(stopped, 0)[1]) == -signal.SIGTERM
assert os.waitstatus_to_exitcode(os.waitpid(zombie, 0)[1]) == 7
assert os.getsid(session) == session
os.write(terminal, b"hello\n")
said = b""
while b"echo hello" not in said:
    said += os.read(terminal, 99)

assert status.read(5) == "Name:" and "[" in sysfs.read()
null.write("x")
null.flush()
assert len(random.read(9)) == 9
assert os.stat(f"/proc/{other}").st_uid == 33
before, until = len(alarms), time.monotonic() + 15
while len(alarms) - before < 3:
    assert time.monotonic() < until, "interval timer"
    time.sleep(0.05)
sleeper.join()
# Monotonic time went on from where it was, without the time in between; wall time is the real one.
went_on, real = time.monotonic() - began, time.time() - wall
assert 4 <= slept[0] <= went_on <= real + 1, (slept, went_on, real)
assert real < 300, real
print("all well", flush=True)
time.sleep(60)
"""


def test_kernel_objects(lab: Lab) -> None:
    box = lab.boot(PROGRAM)
    box.wait_for("ready")
    checkpoint = box.dump()
    copies = [lab.restore(checkpoint), lab.restore(checkpoint, id_base=OTHER_BASE)]
    let_go_on(*copies, box, timeout=90)
