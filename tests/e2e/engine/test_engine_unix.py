"""Unix sockets whose name is not the one that they were bound by."""

from __future__ import annotations

import pytest

from relume.engine import criulog, preflight

from .conftest import OTHER_BASE, Lab, let_go_on

PROGRAM = """
import os, socket, stat, time
os.makedirs("/var/lib/app")
os.chdir("/var/lib/app")
def bound(name, kind=socket.SOCK_STREAM):
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(name)
    if kind == socket.SOCK_STREAM:
        made.listen()
    return made
linked = bound("/var/lib/app/linked.6")          # as supervisord does
os.link("linked.6", "linked")
os.unlink("linked.6")
renamed = bound("/var/lib/app/renamed.6.tmp")    # as HAProxy does
os.rename("renamed.6.tmp", "renamed")
relative = bound("./relative")
shared = bound("/dev/shm/shared.6")
os.rename("/dev/shm/shared.6", "/dev/shm/shared")
datagrams = bound("/var/lib/app/datagrams.6", socket.SOCK_DGRAM)
os.link("datagrams.6", "datagrams")
os.unlink("datagrams.6")
plain = bound("/var/lib/app/plain")
gone = bound("/var/lib/app/gone")
client = socket.socket(socket.AF_UNIX)
client.connect("/var/lib/app/gone")
with_gone = gone.accept()[0]
os.unlink("gone")
talking = socket.socket(socket.AF_UNIX)
talking.connect("/var/lib/app/renamed")
talker = renamed.accept()[0]
print("ready", flush=True)
while not os.path.exists("/go"):
    time.sleep(0.02)
for listener, name in ((linked, "/var/lib/app/linked"), (renamed, "/var/lib/app/renamed"), (plain, "plain"),
                       (relative, "/var/lib/app/relative"), (shared, "/dev/shm/shared")):
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(name)
        one.sendall(name.encode())
        assert listener.accept()[0].recv(99) == name.encode()
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sender.sendto(b"datagram", "/var/lib/app/datagrams")
assert datagrams.recv(99) == b"datagram"
for one, other in ((talking, talker), (client, with_gone)):
    one.sendall(b"still")
    assert other.recv(99) == b"still"
names = sorted(name for name in os.listdir() if stat.S_ISSOCK(os.stat(name).st_mode))
assert names == ["datagrams", "linked", "plain", "relative", "renamed"], names
print("all well", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("everything", [False, True], ids=["held", "everything"])
def test_sockets_with_other_names(lab: Lab, everything: bool) -> None:
    box = lab.boot(PROGRAM)
    box.wait_for("ready")
    checkpoint = box.dump(everything=everything)
    copies = [lab.restore(checkpoint), lab.restore(checkpoint, id_base=OTHER_BASE)]
    let_go_on(*copies, box)


def test_one_bound_by_a_relative_name_and_renamed(lab: Lab) -> None:
    """CRIU does not save it, so it is named before the freeze."""
    box = lab.boot(
        "import os, socket, time\none = socket.socket(socket.AF_UNIX)\nos.chdir('/var/lib')\none.bind('a.6')\n"
        "os.rename('a.6', 'a')\nprint('ready', flush=True)\ntime.sleep(100)"
    )
    box.wait_for("ready")
    (culprit,) = preflight.examine(box.pids, rootfs=box.rootfs, upper=box.upper, held_limit=1 << 30)
    assert culprit.what == "has bound the unix socket /var/lib/a by a relative name, a.6, and renamed it"
    told = criulog.explain(box.dump(check=False).work / "dump.log")
    assert told.culprits[0].what == culprit.what, told
