"""``relume doctor``: what this machine can do, found out by doing it.

Nothing here is read off a version where it can be tried: a user namespace is made, a layer is id-mapped and laid
under an overlay, a userfaultfd is opened, a cgroup is made, CRIU checks the kernel itself. Everything made is gone
afterwards. A finding is required (``ok`` False: nothing runs without), a limit (``ok`` None: it runs, with less), or
fine (True). Takes 2 s or less; needs no node, and changes no setting.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import errno
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from relume.engine.network import pasta
from relume.errors import HostError
from relume.linux import cgroup, memory, mounts, syscall, userfaultfd
from relume.node.places import KDAT_DIRECTORY
from relume.runc import seccomp
from relume.runc.command import find_criu, find_runc

CRIU_MINIMUM = (4, 2)
"""As in script/lib/common.sh, which says why."""
RUNC_MINIMUM = (1, 1)

_ID_BASE, _ID_COUNT = 100_000, 65536
_MIN_DISK, _LOW_DISK = 500_000_000, 5_000_000_000
_LOW_MEMORY = 1_000_000_000
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised

_CAPABILITIES = {21: "SYS_ADMIN", 19: "SYS_PTRACE", 12: "NET_ADMIN", 7: "SETUID", 6: "SETGID", 0: "CHOWN"}
_SYS_RESOURCE = 24

_BUILD_TOOLS = {
    "mmdebstrap": "Debian bases without a registry",
    "skopeo": "images of a registry",
    "umoci": "unpacking images",
    "buildah": "dockerfile_path",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """``ok`` is False where something required is missing, None where something is less than it could be.
    ``remedy`` is empty for True."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def examine(state: Path) -> list[Finding]:
    """Everything about this machine that matters to a node with its state in ``state`` (need not exist)."""
    place = _existing(state)
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("root", _root),
        ("kernel", _kernel),
        ("capabilities", _capabilities),
        ("CAP_SYS_RESOURCE", _sys_resource),
        ("runc", _runc),
        ("seccomp", _seccomp),
        ("criu", _criu),
        ("criu check", _criu_check),
        ("criu cache", _criu_cache),
        ("userfaultfd", _userfaultfd),
        ("cgroups", _cgroups),
        ("user namespaces", _user_namespaces),
        ("overlay", lambda: _overlay(place)),
        ("time namespaces", _time_namespaces),
        ("network", _network),
        ("disk", lambda: _disk(state, place)),
        ("memory", _memory),
        ("clock", _clock),
        ("build tools", _build_tools),
    ]
    return [*(_guarded(name, check) for name, check in checks), *asyncio.run(_gpus())]


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except HostError as error:
        return Finding(name, False, error.message, error.hint)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Finding(
            name, False, f"could not be tested: {error}", "look at the message; it is the kernel's"
        )


def _root() -> Finding:
    if os.geteuid() == 0:
        return Finding("root", True, "this runs as root")
    return Finding("root", False, f"this runs as uid {os.geteuid()}", "a node needs root: run it with sudo")


def _kernel() -> Finding:
    release = os.uname().release
    if _version(release) >= (5, 19):
        return Finding("kernel", True, release)
    return Finding("kernel", False, release, "5.19 or newer is needed: overlay over id-mapped layers")


def _capabilities() -> Finding:
    held = _effective()
    missing = [f"CAP_{name}" for bit, name in _CAPABILITIES.items() if not held >> bit & 1]
    if not missing:
        return Finding("capabilities", True, "those that runc and CRIU need are there")
    remedy = "run the node on the host itself, or in a privileged container"
    return Finding("capabilities", False, f"missing: {', '.join(missing)}", remedy)


def _sys_resource() -> Finding:
    if _effective() >> _SYS_RESOURCE & 1:
        return Finding("CAP_SYS_RESOURCE", True, "held")
    return Finding(
        "CAP_SYS_RESOURCE",
        None,
        "missing: limits (ulimit) cannot be raised above this process's own. Instances are saved all the same: "
        "CRIU has every capability over their user namespaces",
        "give the node CAP_SYS_RESOURCE if apps need more open files than it has",
    )


def _runc() -> Finding:
    binary = find_runc()
    found = _output(binary, "--version").partition("\n")[0].removeprefix("runc version ")
    if _version(found) >= RUNC_MINIMUM:
        return Finding("runc", True, f"{found} ({binary})")
    return Finding(
        "runc", False, f"{found} ({binary}) is too old", "install runc 1.1 or newer: script/bootstrap"
    )


def _seccomp() -> Finding:
    seccomp.profile(frozenset())  # raises HostError with the remedy
    return Finding("seccomp", True, f"the distribution's profile, narrowed ({seccomp.PROFILE})")


def _criu() -> Finding:
    binary = find_criu()
    found = re.search(r"Version: *(\S+)", _output(binary, "--version"))
    text = found[1] if found else "unknown version"
    if _version(text) >= CRIU_MINIMUM:
        return Finding("criu", True, f"{text} ({binary})")
    remedy = "script/bootstrap builds 4.2.1 into /opt/relume, beside the system's"
    return Finding("criu", False, f"{text} ({binary}) is too old", remedy)


def _criu_check() -> Finding:
    answer = subprocess.run([find_criu(), "check"], capture_output=True, text=True, timeout=60, check=False)
    said = [line.strip() for line in (answer.stdout + answer.stderr).splitlines() if line.strip()]
    if answer.returncode == 0:
        remarks = [line for line in said if "Looks good" not in line]
        return Finding("criu check", True, "; ".join(["passes", *remarks])[:400])
    lines = "; ".join(line for line in said if "Error" in line or "Warn" in line) or "; ".join(said[-3:])
    return Finding(
        "criu check", False, lines[:400], "the kernel lacks what CRIU names; use a distribution's kernel"
    )


def _criu_cache() -> Finding:
    """CRIU keeps what it learned of the kernel only on a tmpfs, and a left-over temporary file blocks it for ever
    without an error (criu/kerndat.c)."""
    stale = KDAT_DIRECTORY / "criu.kdat.tmp"
    if stale.exists():
        remedy = f"rm {stale}  (a node does so when it starts)"
        return Finding("criu cache", None, f"{stale} is left over: each restore takes 40 ms more", remedy)
    if (KDAT_DIRECTORY / "criu.kdat").exists():
        return Finding("criu cache", True, str(KDAT_DIRECTORY))
    return Finding("criu cache", True, f"not made yet; the first restore makes it in {KDAT_DIRECTORY}")


def _userfaultfd() -> Finding:
    try:
        os.close(userfaultfd.open_userfaultfd(0))
    except OSError as error:
        lacks = "the kernel has none" if error.errno == errno.ENOSYS else str(error)
        remedy = "restores read all memory before they run; a kernel with CONFIG_USERFAULTFD pages it"
        return Finding("userfaultfd", None, lacks, remedy)
    setting = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip()
    if setting == "1":
        return Finding("userfaultfd", True, "works, also in user namespaces (vm.unprivileged_userfaultfd=1)")
    return Finding(
        "userfaultfd",
        None,
        f"works for root only (vm.unprivileged_userfaultfd={setting})",
        "`relume node run` sets it to 1 while it runs, unless [node] allow_userfaultfd = false",
    )


def _cgroups() -> Finding:
    if cgroup.unified():
        layout = "version 2"
        have = set((cgroup.ROOT / "cgroup.controllers").read_text().split())
        wanted = {"memory", "cpu", "pids"}  # freezing is a file of every group there
        roots = [cgroup.ROOT]
    else:
        hybrid = any((root / "cgroup.controllers").exists() for root in cgroup.hierarchies())
        layout = "version 1, hybrid" if hybrid else "version 1"
        have = {part for root in cgroup.hierarchies() for part in root.name.split(",")}
        wanted = {"memory", "cpu", "pids", "freezer"}
        roots = [root for root in cgroup.hierarchies() if wanted & set(root.name.split(","))]
    if missing := wanted - have:
        remedy = "mount them (a systemd or docker host has them), or boot with cgroup_enable=memory"
        return Finding("cgroups", False, f"{layout}; missing: {', '.join(sorted(missing))}", remedy)
    for root in roots:
        probe = root / f"relume-doctor-{os.getpid()}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            remedy = "cgroups must be writable: mount them read-write, or run on the host itself"
            return Finding("cgroups", False, f"{layout}; no group can be made: {error}", remedy)
    if crowded := cgroup.crowded(wanted):
        return Finding("cgroups", False, f"{layout}; {crowded}", cgroup.MAKE_ROOM)
    return Finding("cgroups", True, f"{layout}; {', '.join(sorted(wanted))}")


def _user_namespaces() -> Finding:
    try:
        os.close(mounts.user_namespace(_ID_BASE, _ID_COUNT))
    except OSError as error:
        remedy = (
            "sysctl user.max_user_namespaces=10000 (and kernel.unprivileged_userns_clone=1 where it exists)"
        )
        return Finding("user namespaces", False, f"none can be made: {error}", remedy)
    return Finding("user namespaces", True, f"{_ID_COUNT} ids mapped")


def _overlay(place: Path) -> Finding:
    """One file of root in a layer must belong to the mapped root in the overlay, on the state's own file system."""
    userns = mounts.user_namespace(_ID_BASE, _ID_COUNT)
    folder = Path(tempfile.mkdtemp(prefix=".relume-doctor-", dir=place))
    try:
        layer, mapped, upper, work, merged = (
            folder / name for name in ("layer", "mapped", "upper", "work", "merged")
        )
        for directory in (layer, mapped, upper, work, merged):
            directory.mkdir()
        (layer / "file").touch()
        mounts.bind_idmapped(layer, mapped, userns, readonly=True)
        mounts.overlay([mapped], upper, work, merged, options="index=on,nfs_export=on")
        owner = (merged / "file").stat().st_uid
    except OSError as error:
        remedy = (
            f"put the state on ext4, xfs, btrfs or tmpfs (RELUME_STATE); {place} is on {_file_system(place)}"
        )
        return Finding("overlay", False, f"no overlay over an id-mapped layer in {place}: {error}", remedy)
    finally:
        os.close(userns)
        mounts.unmount_all(folder)
        shutil.rmtree(folder, ignore_errors=True)
    if owner != _ID_BASE:
        return Finding(
            "overlay", False, f"owner {owner}, not {_ID_BASE}", "a newer kernel (5.19) maps owners right"
        )
    return Finding("overlay", True, f"over an id-mapped layer, in {place} ({_file_system(place)})")


def _time_namespaces() -> Finding:
    if Path("/proc/self/ns/time").exists():
        return Finding("time namespaces", True, "there")
    remedy = "a kernel with CONFIG_TIME_NS (5.6) keeps the monotonic clock of a restored app going forward"
    return Finding("time namespaces", None, "not in this kernel", remedy)


def _network() -> Finding:
    limit = "instances have their loopback and the checkpoint endpoint, but no way out"
    tun = Path("/dev/net/tun")
    if not tun.exists():
        return Finding(
            "network", None, f"no {tun}: {limit}", "modprobe tun; in a container: --device /dev/net/tun"
        )
    if pasta() is None:
        return Finding("network", None, f"no pasta: {limit}", "apt-get install passt")
    try:
        os.close(os.open(tun, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Finding(
            "network", None, f"{tun}: {error.strerror}: {limit}", "allow the device in this container"
        )
    return Finding("network", True, f"a way out by pasta ({pasta()})")


def _disk(state: Path, place: Path) -> Finding:
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.1f} GB free for {state}"
    if free >= _LOW_DISK:
        return Finding("disk", True, detail)
    remedy = "a checkpoint takes the memory of its app, a build its packages: free some, or set RELUME_STATE"
    return Finding("disk", False if free < _MIN_DISK else None, detail, remedy)


def _memory() -> Finding:
    there = memory.machine()
    detail = f"{there.available / 1e9:.1f} of {there.total / 1e9:.1f} GB available"
    if there.available >= _LOW_MEMORY:
        return Finding("memory", True, detail)
    return Finding("memory", None, detail, "stop something, or start fewer instances")


def _clock() -> Finding:
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if time.gmtime().tm_year < 2024:
        return Finding("clock", False, now, "set the clock: certificates and leases in a store depend on it")
    if syscall.libc().adjtimex(ctypes.create_string_buffer(512)) == _TIME_ERROR:
        remedy = "in a region, run an NTP client: leases on checkpoints expire by the clock"
        return Finding("clock", None, f"{now}; not synchronised", remedy)
    return Finding("clock", True, f"{now}; synchronised")


def _build_tools() -> Finding:
    missing = {tool: use for tool, use in _BUILD_TOOLS.items() if shutil.which(tool) is None}
    if not missing:
        return Finding("build tools", True, ", ".join(_BUILD_TOOLS))
    detail = "; ".join(f"no {tool} ({use})" for tool, use in missing.items())
    return Finding("build tools", None, detail, f"apt-get install {' '.join(missing)}")


async def _gpus() -> list[Finding]:
    """What relume.gpu.doctor finds. A GPU that cannot be used is a limit: apps without one run all the same."""
    from relume.gpu import DriverHelper, doctor

    async with DriverHelper() as helper:
        found = await doctor.examine(helper)
    return [
        Finding(one.name, True, f"{one.message}; {one.hint}" if one.hint else one.message)
        if one.level in ("ok", "absent")
        else Finding(one.name, None, one.message, one.hint or "see docs/gpu.md")
        for one in found
    ]


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _effective() -> int:
    """CapEff of this process, as a set of bits (proc_pid_status(5))."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1], 16) if found else 0


def _file_system(path: Path) -> str:
    device = path.stat().st_dev
    with Path("/proc/self/mountinfo").open() as table:
        for line in table:
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                return rest.split()[0]
    return "an unknown file system"


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def _version(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
