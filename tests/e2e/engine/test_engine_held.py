"""Files that processes hold come along; what nobody holds does not; and it is said what stayed."""

from __future__ import annotations

from pathlib import Path

import pytest

from relume.engine import criulog, held

from .conftest import ID_BASE, Lab, let_go_on

HOLDER = """
import fcntl, mmap, os, socket, tempfile, threading, time, ctypes, struct, sys

os.makedirs("/data/deep", mode=0o750)
os.chown("/data", 33, 33)
os.utime("/data/deep", (1e9, 1e9))
os.symlink("/etc/passwd", "/data/link")

# open, with a position; owner, mode and time are not the usual ones
plain = open("/data/deep/plain", "w+b", buffering=0)
plain.write(b"before")
os.fchmod(plain.fileno(), 0o640)
os.fchown(plain.fileno(), 33, 4)
os.utime("/data/deep/plain", ns=(10**18, 10**18 + 7))

# sparse and mapped shared, then written through the mapping; the descriptor is gone
fd = os.open("/data/lmdb", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 1 << 32)
table = mmap.mmap(fd, 1 << 32)
os.close(fd)
table[1 << 31 : (1 << 31) + 5] = b"first"

# no name at all, and one of two names gone
ghost = tempfile.TemporaryFile(dir="/data")
ghost.write(b"g" * 2_000_000)
ghost.flush()
half = open("/data/half.tmp", "w+")
half.write("half")
half.flush()
os.link("/data/half.tmp", "/data/half")
os.unlink("/data/half.tmp")

# an image file changed by copy-up and held, and one of which the name is gone
hosts = open("/etc/hostname", "r+")
services = open("/etc/services")
os.unlink("/etc/services")

# a listener and the directory it stands in; a relative name; one unlinked
os.mkdir("/run/app", 0o711)
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/app/sock")
os.chmod("/run/app/sock", 0o666)
listener.listen()
os.mkdir("/run/rel")
os.chdir("/run/rel")
relative = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
relative.bind("dgram")
os.mkdir("/data/cwd")
os.chdir("/data/cwd")

os.mkfifo("/data/fifo")
fifo = os.open("/data/fifo", os.O_RDWR)
os.write(fifo, b"in the pipe")

locked = open("/data/locked", "w")
fcntl.flock(locked, fcntl.LOCK_EX)
record = open("/data/record", "w")
fcntl.lockf(record, fcntl.LOCK_EX)

os.mkdir("/data/watched")
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(os.O_NONBLOCK)
libc.inotify_add_watch(watch, b"/data/watched", 0x100)

open("/data/not-held", "w").write("x" * 5000)
os.makedirs("/root/.cache/pip")
open("/root/.cache/pip/wheel", "w").write("x" * 9000)

print("ready", flush=True)
while not os.path.exists("/go"):
    time.sleep(0.02)
me = open("/go").read()

assert plain.read() == b"" and plain.tell() == 6
plain.write(b"-after")
assert open("/data/deep/plain", "rb").read() == b"before-after"
assert table[1 << 31 : (1 << 31) + 5] == b"first"
table[0:4] = b"more"
assert open("/data/lmdb", "rb").read(4) == b"more"
ghost.seek(0)
assert ghost.read() == b"g" * 2_000_000
half.seek(0)
assert half.read() == "half"
half.write(" whole")
half.flush()
assert open("/data/half").read() == "half whole"
assert services.read(1)
assert os.getcwd() == "/data/cwd"
open("here", "w").write("x")
assert os.path.exists("/data/cwd/here")

def answer():
    client, _ = listener.accept()
    client.send(b"hello")
threading.Thread(target=answer).start()
client = socket.socket(socket.AF_UNIX)
client.connect("/run/app/sock")
assert client.recv(5) == b"hello"
assert os.stat("/run/app/sock").st_mode & 0o777 == 0o666
assert os.stat("/run/app").st_mode & 0o777 == 0o711
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sender.sendto(b"dgram", "/run/rel/dgram")
assert relative.recv(9) == b"dgram"

assert os.read(fifo, 99) == b"in the pipe"
other = os.fork()
if other == 0:
    try:
        fcntl.flock(open("/data/locked"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            fcntl.lockf(open("/data/record", "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os._exit(0)
    os._exit(1)
assert os.waitpid(other, 0)[1] == 0, "locks"
open("/data/watched/new", "w").close()
time.sleep(0.1)
assert b"new" in os.read(watch, 4096)
assert os.path.exists("/etc/passwd")
assert os.path.exists("/data/not-held") == (me == "original"), os.listdir("/data")
print("all well", flush=True)
time.sleep(60)
"""


def test_what_is_held_comes_back(lab: Lab) -> None:
    box = lab.boot(HOLDER)
    box.wait_for("ready")
    checkpoint = box.dump()
    copies = [lab.restore(checkpoint) for _ in range(2)]
    for copy in [*copies, box]:
        Path(f"/proc/{copy.init}/root/go.new").write_text("original" if copy is box else "copy")
        Path(f"/proc/{copy.init}/root/go.new").rename(f"/proc/{copy.init}/root/go")
    for each in [*copies, box]:
        each.wait_for("all well")
    assert checkpoint.report["warnings"] == []
    behind = held.survey(box.upper, checkpoint.held, id_base=ID_BASE)
    assert "/data/not-held" in behind.names
    assert (behind.cache_count, behind.cache_bytes) == (1, 9000)


UNHELD = """
import os, time
os.makedirs("/data/empty")
open("/data/model", "w").write("weights")
os.unlink("/etc/services")
os.symlink("model", "/data/link")
import shutil
shutil.rmtree("/etc/skel")
os.mkdir("/etc/skel")
os.chown("/data", 33, 33)
print("ready", flush=True)
while not os.path.exists("/go"):
    time.sleep(0.02)
assert open("/data/link").read() == "weights"
assert os.stat("/data").st_uid == 33
assert os.listdir("/data/empty") == []
assert not os.path.exists("/etc/services")
assert os.listdir("/etc/skel") == []
open("/data/model", "a").write(" more")
os.unlink("/data/link")
print("all well", flush=True)
time.sleep(60)
"""


def test_the_whole_layer(lab: Lab) -> None:
    box = lab.boot(UNHELD)
    box.wait_for("ready")
    checkpoint = box.dump(everything=True)
    assert held.survey(box.upper, checkpoint.held, id_base=ID_BASE).count == 0
    copies = [lab.restore(checkpoint) for _ in range(2)]
    let_go_on(*copies, box)
    assert (checkpoint.held / "data/model").read_text() == "weights"


SQLITE = """
import sqlite3, time
db = sqlite3.connect("/notes.sqlite")
db.execute("pragma journal_mode=wal")
db.execute("create table notes (text)")
db.execute("insert into notes values ('before')")
db.commit()
print("ready", flush=True)
import os
while not os.path.exists("/go"):
    time.sleep(0.02)
db.execute("insert into notes values ('after')")
db.commit()
print([row[0] for row in db.execute("select text from notes")], flush=True)
time.sleep(60)
"""


def test_an_open_sqlite_database_comes_along_with_a_warning(lab: Lab) -> None:
    box = lab.boot(SQLITE)
    box.wait_for("ready")
    checkpoint = box.dump()
    (warning,) = checkpoint.report["warnings"]
    assert warning.startswith("python3 (pid 1) has the SQLite database /notes.sqlite open in WAL mode")
    copy = lab.restore(checkpoint)
    let_go_on(copy, box, until="['before', 'after']")


BROKEN = """
import time
file = open("/state", "w+")
file.write("1234")
file.flush()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_restore_that_fails_is_told_in_words(lab: Lab) -> None:
    box = lab.boot(BROKEN)
    box.wait_for("ready")
    checkpoint = box.dump()
    (checkpoint.held / "state").write_text("12345")
    with pytest.raises(RuntimeError):
        lab.restore(checkpoint)
    assert criulog.explain(lab.boxes[-1].restore_log).reason == "/state is not what it was at the checkpoint"
    (checkpoint.held / "state").unlink()
    with pytest.raises(RuntimeError):
        lab.restore(checkpoint)
    told = criulog.explain(lab.boxes[-1].restore_log)
    assert told.reason == "/state is missing: it was open or mapped at the checkpoint"
    assert (told.kind, told.culprits) == ("engine", ())
