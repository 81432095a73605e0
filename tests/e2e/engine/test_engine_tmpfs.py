"""What lies in tmpfs mounts comes back, with its owners and modes, and empty ones cost no tar and no gzip."""

from __future__ import annotations

from relume.images import read_image

from .conftest import OTHER_BASE, Lab

PROGRAM = r"""
import os, time
os.chmod("/dev/shm", 0o1755)
os.mkdir("/dev/shm/folder", 0o750)
with open("/dev/shm/folder/of an odd \\ name", "w") as file:
    file.write("content")
os.chown("/dev/shm/folder", 33, 33)
os.symlink("/nowhere", "/dev/link")
os.utime("/dev/shm/folder", (1e9, 1e9))
def look():
    status = os.stat("/dev/shm/folder")
    with open("/dev/shm/folder/of an odd \\ name") as file:
        content = file.read()
    return [oct(os.stat("/dev/shm").st_mode), oct(status.st_mode), status.st_uid, status.st_mtime, content,
        os.readlink("/dev/link"), os.listdir("/proc/acpi"), os.listdir("/sys/firmware")]
print("before", look(), flush=True)
while not os.path.exists("/go"):
    time.sleep(0.02)
print("after", look(), flush=True)
"""

UNTOUCHED = r"""
import os, time
print("before", flush=True)
while not os.path.exists("/go"):
    time.sleep(0.02)
print("after", oct(os.stat("/dev/shm").st_mode), os.listdir("/dev/shm"), flush=True)
"""


def words(line: str, text: str) -> str:
    return next(each for each in text.splitlines() if each.startswith(line)).removeprefix(line).strip()


def tmpfs_mounts(images) -> int:  # type: ignore[no-untyped-def]
    return len(list(images.glob("tmpfs-dev-*.img")))


def test_contents_come_back(lab: Lab) -> None:
    box = lab.boot(PROGRAM)
    before = words("before", box.wait_for("before"))
    made = box.dump()
    kept = [path.read_bytes().startswith(b"relume: a tar") for path in made.images.glob("tmpfs-dev-*.img")]
    assert sum(kept) >= 2, "/dev and /dev/shm have something in them"
    copy = lab.restore(made, id_base=OTHER_BASE)
    copy.touch("go")
    assert words("after", copy.wait_for("after")) == before


def test_untouched_mounts_cost_no_tar(lab: Lab) -> None:
    box = lab.boot(UNTOUCHED)
    box.wait_for("before")
    made = box.dump()
    mounted = {
        mount.root_dev: mount.mountpoint
        for path in made.images.glob("mountpoints-*.img")
        for mount in read_image(path)
    }
    heavy = {
        mounted[int(path.name.split("-")[2].split(".")[0])]
        for path in made.images.glob("tmpfs-dev-*.img")
        if not path.read_bytes().startswith(b"relume: an empty")
    }
    assert made.empty_tmpfs == tmpfs_mounts(made.images) - len(heavy) >= 3
    assert not any(place.startswith(("./dev/shm", "./proc", "./sys/firmware")) for place in heavy), heavy
    copy = lab.restore(made)
    copy.touch("go")
    assert words("after", copy.wait_for("after")) == "0o41777 []"


def test_archives_of_criu_s_own_are_read(lab: Lab) -> None:
    """A checkpoint that was not lightened restores too."""
    box = lab.boot(PROGRAM)
    before = words("before", box.wait_for("before"))
    made = box.dump(own_tar=False)
    assert all(path.read_bytes().startswith(b"\x1f\x8b") for path in made.images.glob("tmpfs-dev-*.img"))
    copy = lab.restore(made)
    copy.touch("go")
    assert words("after", copy.wait_for("after")) == before
