"""Files of single threads in /proc, which are opened again before there are any threads."""

from __future__ import annotations

from .conftest import Lab, let_go_on

PROGRAM = """
import os, threading, time
here = threading.Barrier(2)
def work():
    global files, single
    me = f"/proc/{threading.get_native_id()}"
    names = ("/proc/thread-self/comm", "/proc/thread-self/schedstat", "/proc/thread-self/fd", "/proc/thread-self",
             f"{me}/comm", me, "/proc/self/comm", "/proc/self", "/proc/self/fd")
    files = [os.open(name, os.O_RDONLY) for name in names]
    here.wait()
    time.sleep(600)
threading.Thread(target=work, daemon=True).start()
here.wait()
single = []
ended = threading.Thread(target=lambda: single.append(os.open("/proc/thread-self/stat", os.O_RDONLY)))
ended.start()
ended.join()
open("/proc/self/comm", "w").write("first")
print("ready", flush=True)
while not os.path.exists("/go"):
    time.sleep(0.02)
comm, schedstat, folder, whole, of_number, number, own, process, its_own = files
print("names", os.read(comm, 99), os.read(of_number, 99), os.read(own, 99), flush=True)
assert len(os.read(schedstat, 99).split()) == 3
assert str(comm) in os.listdir(folder) and "schedstat" in os.listdir(whole) and "task" in os.listdir(number)
assert "task" in os.listdir(process) and str(process) in os.listdir(its_own)
print("all well", flush=True)
time.sleep(60)
"""


def test_files_of_threads(lab: Lab) -> None:
    box = lab.boot(PROGRAM)
    box.wait_for("ready")
    checkpoint = box.dump()
    (warning,) = checkpoint.edits.warnings
    assert warning.startswith("files about single threads of first (pid 1) are open (/proc/1/task/")
    assert "and 6 more): a restored copy reads there about its first thread" in warning
    copies = [lab.restore(checkpoint) for _ in range(2)]
    for said in let_go_on(box, *copies)[1:]:
        assert r"names b'first\n' b'first\n' b'first\n'" in said
