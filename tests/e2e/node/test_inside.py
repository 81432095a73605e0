"""What an app finds inside its container, in an original and in a copy."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import leftovers
from harness import MAIN, SNIPPET, App, Failed, Relume, get, until
from relume.engine import network
from relume.linux import cgroup, proc

PROBES = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def errno_of(number, *arguments):
    ctypes.set_errno(0)
    libc.syscall(number, *arguments)
    return ctypes.get_errno()
def reach(where):
    host, _, port = where.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as out:
        return out.recv(100).decode()
ACTIONS.update(
    cwd=lambda _: os.getcwd(),
    write=lambda name: open("/persistent-storage/" + name, "w").write("kept"),
    read=lambda name: open("/persistent-storage/" + name).read(),
    rings=lambda _: errno_of(425, 8, 0),
    namespaces=lambda _: errno_of(272, 0x10000000),
    faults=lambda _: errno_of(323, 0),
    counters=lambda _: errno_of(298, __import__("struct").pack("IIQ", 1, 112, 0) + bytes(96), 0, -1, -1, 0),
    bpf=lambda _: errno_of(321, 0, __import__("struct").pack("IIIII", 2, 4, 8, 1, 0) + bytes(60), 72),
    guards=lambda advice: errno_of(28, ctypes.c_void_p(0x1000), ctypes.c_size_t(4096), int(advice)),
    privileges=lambda _: [line for line in open("/proc/self/status") if line.startswith(("NoNewPrivs", "CapEff"))],
    keys=lambda _: open("/proc/keys").read(),
    groups=lambda _: sorted({line.split(":", 2)[2].strip() for line in open("/proc/self/cgroup")}),
    stderr=lambda _: open("/dev/stderr", "w").write("by name\\n"),
    reach=reach,
    eat=lambda size: len(bytearray(os.urandom(1 << 20) * int(size))),
)
"""


@contextlib.contextmanager
def host_server() -> Iterator[str | None]:
    """ADDRESS:PORT of a server on this machine's own address beyond loopback; None where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.254", 9))  # a datagram socket sends nothing for this
        except OSError:
            yield None
            return
        address = probe.getsockname()[0]
    with socket.create_server((address, 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(b"hello")
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"{address}:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_what_an_app_finds_inside(relume: Relume, app: App) -> None:
    app.write(f"{PROBES}\n{SNIPPET}\nserve()")
    relume.deploy(app.directory)
    first = relume.start(app.name)
    copy = relume.start(app.name)
    assert copy["restored"]
    with host_server() as beyond:
        for instance in (first, copy):
            assert get(instance, "/cwd") == "/cortex"
            assert get(instance, "/rings") == 38, "io_uring_setup: ENOSYS"
            assert get(instance, "/namespaces") == 1, "unshare(NEWUSER): EPERM"
            assert get(instance, "/faults") == 1, "userfaultfd: EPERM"
            assert get(instance, "/counters") == 1, "perf_event_open: EPERM"
            assert get(instance, "/bpf") == 1, "bpf: EPERM"
            assert get(instance, "/guards/102") == 22, "MADV_GUARD_INSTALL: EINVAL"
            assert get(instance, "/guards/4") == 12, "other advice gets to the kernel: ENOMEM"
            assert "NoNewPrivs:\t1\n" in get(instance, "/privileges")
            assert get(instance, "/keys") == ""
            assert get(instance, "/facts")["uid"] == 0
            assert get(instance, "/groups") == ["/"], "a cgroup namespace of its own, in a copy too"
            assert get(instance, "/stderr") == len("by name\n")
            if beyond is not None:
                assert get(instance, f"/reach/{beyond}") == "hello"
    assert "by name" in relume.logs(copy["instance_id"])
    get(first, "/write/note")
    assert get(copy, "/read/note") == "kept"
    node = relume.json("node", "status")["node_id"]
    for instance in (first, copy):
        group = f"/relume/{node}/{instance['instance_id']}"
        pids = cgroup.processes(group)
        assert pids and cgroup.memory(group)[1], "in its own group, with its own limit"
        for pid in pids:
            assert not cgroup.elsewhere(pid, group)
            assert Path(f"/proc/{pid}").stat().st_uid >= 65536, "root inside is nobody outside"


CALLS_OUT = """
def call():
    began = time.monotonic()
    with socket.create_connection((os.environ["HOST"], int(os.environ["PORT"])), timeout=20) as out:
        STATE["said"] = out.recv(100).decode()
    STATE["took"] = time.monotonic() - began
call()
"""


def test_a_copy_that_calls_out_before_there_is_a_way(second: Relume, app: App, workplace: Path) -> None:
    """What it does first after the request: pasta, which comes up beside CRIU, may take longer on a busy machine."""
    real = network.pasta()
    if real is None:
        pytest.skip("no way out on this machine: relume doctor says why")
    slow = workplace / "slow"
    slow.mkdir()
    (slow / "pasta").write_text(f'#!/bin/sh\nsleep 0.7\nexec {real} "$@"\n')
    (slow / "pasta").chmod(0o755)
    second.env["PATH"] = f"{slow}:{second.env['PATH']}"
    second.start_node()
    app.write(f"{SNIPPET}\n{CALLS_OUT}\nserve()")
    second.deploy(app.directory)
    with host_server() as beyond:
        assert beyond is not None
        host, port = beyond.split(":")
        first = second.start(app.name, "--env", f"HOST={host}", "--env", f"PORT={port}")
        copy = second.start(app.name)
        assert copy["restored"], copy["reason"]
        assert get(copy, "/")["said"] == get(first, "/")["said"] == "hello"
        assert get(copy, "/")["took"] > 0.1, "it did not wait: there was a way already"


def test_a_killed_pasta_is_replaced(relume: Relume, app: App) -> None:
    """As any process it may be killed. What goes out later finds a way, in an original and in a copy."""
    app.write(f"{PROBES}\n{SNIPPET}\nserve()")
    relume.deploy(app.directory)
    node = leftovers.node_id(relume)
    started = [relume.start(app.name) for _ in range(2)]
    assert [one["restored"] for one in started] == [False, True]
    with host_server() as beyond:
        for instance in started:
            for _ in range(2):  # the second one soon after the first
                _kill_pasta(node, instance["instance_id"])
                assert get(instance, f"/reach/{beyond}") == "hello"
    relume.stop(app.name)
    for instance in started:
        leftovers.soon_nothing(leftovers.of_instance, node, instance["instance_id"])
        assert _pastas(node, instance["instance_id"]) == []


def _kill_pasta(node: str, instance: str) -> None:
    """And wait for the one that takes its place."""
    (killed,) = until(lambda: _pastas(node, instance))
    os.kill(killed, signal.SIGKILL)
    until(lambda: [pid for pid in _pastas(node, instance) if pid != killed])


def _pastas(node: str, instance: str) -> list[int]:
    """The children of the instance's keeper that are a pasta and run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = proc.parent(int(entry.name))
            keeper = Path(f"/proc/{parent}/cmdline").read_bytes()
            program = (entry / "cmdline").read_bytes().partition(b"\0")[0]  # nothing of a zombie
            if program.endswith(b"/pasta") and f"/{node}/{instance}".encode() in keeper:
                found.append(int(entry.name))
    return found


JOURNAL = """
import fcntl, subprocess
for name in ("journal", "table"):
    open("/persistent-storage/" + name, "wb").write(b"begun")
journal, table = (open("/persistent-storage/" + name, "r+b", buffering=0) for name in ("journal", "table"))
fcntl.flock(journal, fcntl.LOCK_EX)
fcntl.lockf(table, fcntl.LOCK_EX)
def go_on():
    while True:
        journal.write(b"line"); table.write(b"row"); time.sleep(0.01)
threading.Thread(target=go_on, daemon=True).start()
TRY = "import fcntl, sys; file = open('/persistent-storage/' + sys.argv[2], 'r+b');"
TRY += "getattr(fcntl, sys.argv[1])(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
def free(how_and_name):
    return subprocess.run(["python3", "-c", TRY, *how_and_name.split("/")], stderr=subprocess.DEVNULL).returncode == 0
ACTIONS.update(free=free, wrote=lambda _: journal.tell() + table.tell())
"""


def test_a_file_of_persistent_storage_that_is_open_locked_and_written(relume: Relume, app: App) -> None:
    """The original goes on with it, and keeps its locks; a copy goes on with it as it is then."""
    app.write(f"{JOURNAL}\n{SNIPPET}\nserve()")
    relume.deploy(app.directory)
    first = relume.start(app.name)
    answer = relume.answer_of_post(first["instance_id"])
    assert answer["status"] == "created"
    for name in ("journal", "table"):
        (warning,) = [each for each in answer["warnings"] if f"a lock on /persistent-storage/{name}," in each]
        assert "a restored copy does not have it" in warning
    copies = []
    for _ in range(2):
        copies.append(relume.start(app.name))
        assert copies[-1]["restored"], copies[-1]["reason"]
    for each in (first, *copies):
        wrote = get(each, "/wrote")
        until(lambda each=each, wrote=wrote: get(each, "/wrote") > wrote, what="it writes no more")
        assert not get(each, "/free/flock/journal") and not get(each, "/free/lockf/table"), "the original's"
    relume.stop(first["instance_id"])
    for each in copies:
        until(lambda each=each: get(each, "/free/flock/journal") and get(each, "/free/lockf/table"))


def test_two_apps_share_no_ids(relume: Relume, app: App, workplace: Path) -> None:
    node = relume.json("node", "status")["node_id"]
    other = App(workplace / "neighbour", "neighbour").write("serve()", checkpointing=False)
    app.write("serve()", checkpointing=False)
    owners = []
    try:
        for each in (app, other):
            relume.deploy(each.directory)
            started = relume.start(each.name)
            (pid, *_) = cgroup.processes(f"/relume/{node}/{started['instance_id']}")
            owners.append(Path(f"/proc/{pid}").stat().st_uid // 65536)
    finally:
        relume.remove(other.name)
    assert owners[0] != owners[1]


def test_memory_limit(relume: Relume, app: App) -> None:
    app.write(f"{PROBES}\nserve()", extra="[cerebrium.hardware]\nmemory = 0.2\n", checkpointing=False)
    relume.deploy(app.directory)
    started = relume.start(app.name)
    assert get(started, "/eat/20") == 20 << 20
    with pytest.raises((OSError, Failed)):
        get(started, "/eat/400")


def test_an_app_is_not_spared_with_its_node(second: Relume, app: App) -> None:
    """The service in packaging/ spares it; where a machine does not allow that, it is put first here instead."""
    spared = subprocess.run(["choom", "-n", "-900", "--", "true"], capture_output=True, check=False)
    own = -900 if spared.returncode == 0 else 300
    second.program = ["choom", "-n", str(own), "--", *MAIN]
    app.write(f"{SNIPPET}\nserve()")
    second.start_node()
    second.deploy(app.directory)
    node = second.json("node", "status")["node_id"]
    for restored in (False, True):
        started = second.start(app.name)
        assert started["restored"] is restored
        pids = cgroup.processes(f"/relume/{node}/{started['instance_id']}")
        scores = {int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in pids}
        assert scores == {max(0, own)}
