"""What would make a dump fail, found before anything is frozen; and how large the dump would be.

One pass over /proc of every process, while they run: nothing is stopped, nothing is traced. Each kind here
was tried on CRIU 4.2.1 (tests/e2e/engine/test_engine_preflight.py does it again): what is refused fails the
dump there, what is let through passes. What only fails at times (a UDP socket corked at that moment, a unix
client that a server has not accepted yet) is left to CRIU, and to criulog.py for the words.

Not seen, like anything that changes between this pass and the freeze: what processes take up later.

Standard library only: the keeper runs this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from relume.engine import held
from relume.engine._culprit import Culprit
from relume.engine._held_finder import Finder, Held, unusable_watches
from relume.linux import proc

__all__ = ["Culprit", "Estimate", "estimate", "examine"]

GHOST_LIMIT = 1 << 30
"""Bytes of a deleted open file that CRIU takes into its images, as we set it (``ghost-limit``)."""

_A_MOMENT = 0.02
"""Seconds in which a thread that is about to end is seen to."""

_MEM, _MISC = 1, 10  # major numbers: Documentation/admin-guide/devices.txt
_TTYS = frozenset({4, 5, *range(136, 144)})
_CONTROLLING_TTY = (5, 0)
_TUN, _AUTOFS = 200, 235

_NAMESPACES = ("mnt", "net", "uts", "ipc", "user", "pid", "cgroup", "time")

_ANONYMOUS = frozenset(
    f"anon_inode:{name}"
    for name in ("[eventfd]", "[eventpoll]", "inotify", "[fanotify]", "[signalfd]", "[timerfd]", "[pidfd]")
)
_KERNEL_FILES = ("/memfd:", "/SYSV", "/dev/zero (deleted)", "/anon_hugepage", "/[aio]", "/secretmem")
"""Beginnings of names that no mount has: memory that can be had as a file."""

_PROTOCOLS = frozenset(
    "TCP TCPv6 UDP UDPv6 UDP-Lite UDPLITEv6 RAW RAWv6 PING PINGv6 UNIX UNIX-STREAM NETLINK PACKET".split()
)

_RING_HINT = (
    "containers of relume answer io_uring calls with ENOSYS and most programs fall back on epoll;"
    " this one got a ring before or around that: switch io_uring off in it"
)
_KINDS = {
    "[io_uring]": ("holds an io_uring ring", _RING_HINT),
    "[userfaultfd]": ("holds a userfaultfd", "nobody can save one; close it before the request"),
    "[perf_event]": ("holds a perf event counter", "stop profiling before the request"),
    "[landlock-ruleset]": ("holds a Landlock rule set", "close it after landlock_restrict_self"),
    "bpf-map": ("holds a BPF map", "unload BPF programs before the request"),
    "bpf-prog": ("holds a BPF program", "unload BPF programs before the request"),
    "bpf_link": ("holds a BPF link", "unload BPF programs before the request"),
    "kvm-vm": ("runs a virtual machine", "virtual machines cannot be saved this way"),
    "kvm-vcpu": ("runs a virtual machine", "virtual machines cannot be saved this way"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """What a dump would write, in bytes: ``memory`` of the processes, ``tmpfs`` content of their mounts.

    Within a few pages for ordinary programs, else too much: memory mapped from a tmpfs counts in both, and
    CRIU leaves zero pages out. Pages that forked processes share count once for each, as in the images.
    """

    processes: int
    memory: int
    tmpfs: int

    @property
    def total(self) -> int:
        return self.memory + self.tmpfs


def estimate(pids: Sequence[int]) -> Estimate:
    """How much a dump of these processes (host pids, all of one container) would write."""
    count = memory = 0
    for pid in pids:
        try:
            fields = proc.memory(pid)
        except proc.GONE:
            continue
        count += 1
        memory += sum(fields.get(name, 0) for name in ("Anonymous", "Swap", "Pss_Shmem", "Private_Hugetlb"))
    return Estimate(count, memory, _tmpfs(pids))


def examine(
    pids: Sequence[int],
    *,
    rootfs: Path,
    upper: Path | None = None,
    held_limit: int | None = None,
    gpu: bool = False,
) -> list[Culprit]:
    """What these processes (host pids, all of one container) have that cannot be saved; [] when all can.

    ``rootfs`` is the mountpoint of the container's root out here, ``upper`` its writable layer. With
    ``held_limit`` (bytes; None when the whole layer is saved anyway) a held file over it is a culprit too, and one that
    is too deep.
    ``gpu``: NVIDIA devices are somebody else's business and pass.
    """
    statuses = {}
    for pid in pids:
        try:
            statuses[pid] = proc.status(pid)
        except proc.GONE:
            continue
    if not statuses:
        return []
    # The first process of the container: nobody is in fewer pid namespaces, and there it is number 1.
    init = min(statuses, key=lambda pid: (len(statuses[pid].pids), statuses[pid].pids[-1]))
    level = len(statuses[init].pids) - 1
    try:
        if statuses[init].state == "Z" and _headless(init):  # it has no root to look at
            return [Culprit(statuses[init].pids[level], statuses[init].name, *_HEADLESS)]
        if not Path(f"/proc/{init}/root").samefile(rootfs):
            return [Culprit(statuses[init].pids[level], statuses[init].name, *_ANOTHER_ROOT)]
        examination = _Examination(init, frozenset(statuses), rootfs, gpu)
    except proc.GONE:
        return []
    found: dict[Culprit, None] = {}  # a process may hold the same thing many times
    for pid, status in statuses.items():
        try:
            for what, hint in examination.process(pid, status):
                found.setdefault(Culprit(status.pids[level], status.name, what, hint))
        except proc.GONE:
            continue
    if upper is not None and held_limit is not None:
        finder = Finder(rootfs)
        found |= dict.fromkeys(_not_to_be_held(finder.find(list(statuses)), upper, held_limit))
        found |= dict.fromkeys(map(_misnamed, finder.misnamed))
    return list(found)


Finding = tuple[str, str]
"""What, and the hint."""


class _Examination:
    def __init__(self, init: int, pids: frozenset[int], rootfs: Path, gpu: bool) -> None:
        self._pids = pids
        self._rootfs = rootfs
        self._gpu = gpu
        self._inside: set[str] = set()  # names known to lie on a mount of the container
        self._mappable = ("/dev/shm/", "/dev/zero", "/dev/hugepages/", *(("/dev/nvidia",) if gpu else ()))
        self._namespaces = {kind: proc.namespace(init, kind) for kind in _NAMESPACES}
        self._mounts = {mount.mnt_id: mount for mount in proc.mounts(init)}
        self._queues = {mount.device for mount in self._mounts.values() if mount.kind == "mqueue"}
        self._root_device = proc.root_mount(init).device

    def process(self, pid: int, status: proc.Status) -> Iterator[Finding]:
        if status.state == "Z":
            if _headless(pid):
                yield _HEADLESS
            return
        for tracer in proc.tracers(pid):
            yield self._traced(tracer)
        yield from self._nested(pid)
        if any(proc.link(pid, name) == proc.TOO_LONG for name in ("cwd", "root", "exe")):
            yield _TOO_LONG
        for fd, target in proc.descriptors(pid):
            try:
                yield from self._descriptor(pid, fd, target)
            except proc.GONE:
                continue  # closed meanwhile
        for name, span in proc.mapped(pid).items():
            try:
                yield from self._mapping(f"/proc/{pid}/map_files/{span}", name)
            except proc.GONE:
                continue  # unmapped meanwhile

    def _traced(self, tracer: int) -> Finding:
        try:
            by = proc.status(tracer)
            name = f"{by.name} (pid {by.inside})" if tracer in self._pids else f"{by.name} on the host"
        except proc.GONE:
            name = "another process"
        return f"is traced by {name}", "detach the debugger or tracer before the request"

    def _nested(self, pid: int) -> Iterator[Finding]:
        for link in (*_NAMESPACES, "pid_for_children", "time_for_children"):
            kind = link.partition("_")[0]
            try:
                nested = proc.namespace(pid, link) != self._namespaces[kind]
            except proc.GONE:
                continue
            if nested:
                name = {"mnt": "mount", "net": "network"}.get(kind, kind)
                yield (
                    f"runs in, or makes children in, a {name} namespace of its own",
                    "containers and sandboxes inside the container cannot be saved; start without them",
                )

    def _descriptor(self, pid: int, fd: int, target: str) -> Iterator[Finding]:
        if target.startswith("anon_inode:"):
            if target not in _ANONYMOUS:
                yield _kind(target.removeprefix("anon_inode:"))
            elif target == "anon_inode:inotify":
                yield from self._watches(proc.fdinfo(pid, fd))
        if target.startswith(("anon_inode:[pidfd]", "pidfd:")):
            yield from self._pidfd(proc.fdinfo(pid, fd))
        elif target.startswith("socket:"):
            yield from _socket(f"/proc/{pid}/fd/{fd}")
        elif target.startswith("/secretmem"):
            yield _SECRET
        elif target == proc.TOO_LONG:
            yield _TOO_LONG
        elif target.startswith("/"):
            yield from self._file(pid, fd, target)

    def _file(self, pid: int, fd: int, target: str) -> Iterator[Finding]:
        if target.startswith("/dev/") and not target.startswith(("/dev/shm/", "/dev/zero")):
            yield from self._device(f"/proc/{pid}/fd/{fd}", target)
        if target.endswith(proc.DELETED):
            yield from _ghost(f"/proc/{pid}/fd/{fd}", target)
        if target.startswith("/proc/") and _without_its_task(f"/proc/{pid}/fd/{fd}"):
            yield f"holds {target}, of a process or thread that has ended", "close it before the request"
        if target.startswith(_KERNEL_FILES):
            return
        if target in self._inside:
            return
        mount = proc.mount_id(proc.fdinfo(pid, fd))
        if mount in self._mounts:
            self._inside.add(target)
            return
        status = Path(f"/proc/{pid}/fd/{fd}").stat()
        if f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}" in self._queues:
            yield f"holds the POSIX message queue {target}", "close message queues before the request"
        elif proc.namespace(pid, "mnt") == self._namespaces["mnt"]:
            yield f"holds {target} from outside of the container", "close it before the request"

    def _device(self, path: str, target: str) -> Iterator[Finding]:
        status = Path(path).stat()
        if stat.S_ISBLK(status.st_mode):
            yield f"holds the block device {target}", "close it before the request"
        if not stat.S_ISCHR(status.st_mode):
            return
        major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
        if (major, minor) == _CONTROLLING_TTY:
            # CRIU wants the first terminal of the session that it comes by to be this process's own, and comes
            # by the other end first, which whoever made the session has (criu/tty.c, tty_verify_ctty).
            yield (
                "holds /dev/tty, the terminal that controls its session, as an interactive shell does",
                "end that shell before the request, or use bash, which does not keep it open",
            )
        if major == _MEM or major in _TTYS or (major == _MISC and minor in (_TUN, _AUTOFS)):
            return
        if target.startswith("/dev/nvidia"):
            if not self._gpu:
                yield (
                    f"holds the GPU device {target}",
                    "declare the GPU in cerebrium.toml: [cerebrium.hardware]",
                )
            return
        yield f"holds the device {target}", "close it before the request"

    def _mapping(self, link: str, name: str) -> Iterator[Finding]:
        # Of a mapped file on a hugetlbfs CRIU takes the memory, and no file (criu/proc_parse.c, handle_vma).
        if name.endswith(proc.DELETED) and not name.startswith("/dev/hugepages/"):
            yield from _ghost(link, name)
        if name.startswith("/secretmem"):
            yield _SECRET
        elif name.startswith("anon_inode:"):
            yield _kind(name.removeprefix("anon_inode:"))
        elif name == "[uprobes]":
            yield "is watched by a uprobe", "stop tracing it before the request"
        elif name.startswith("/dmabuf:"):
            yield "maps a DMA buffer", "free it before the request"
        elif not name.startswith("/dev/") or name.startswith(self._mappable):
            return
        elif stat.S_ISCHR(Path(link).stat().st_mode):
            yield f"maps the device {name}", "unmap it before the request"

    def _pidfd(self, info: str) -> Iterator[Finding]:
        fields = dict(line.split(":\t", 1) for line in info.splitlines() if ":\t" in line)
        if int(fields.get("flags", "0"), 8) & os.O_EXCL:  # PIDFD_THREAD of linux/pidfd.h
            yield "holds a pidfd of a thread", "use pidfds of processes, or close it before the request"
        elif self._outside(int(fields.get("Pid", "-1"))):
            yield "holds a pidfd of a process outside of the container", "close it before the request"

    def _outside(self, pid: int) -> bool:
        """Whether it is no process of the container: CRIU wants it in the tree that it dumps (criu/pidfd.c).

        Zombies, and what was forked since the pass began, are in the tree and not in ``_pids``: so a parent
        of theirs must be. One that is gone (the kernel says -1) does no harm.
        """
        try:
            while pid not in self._pids:
                if pid < 1:
                    return pid == 0  # in no pid namespace that we see, or the end of the line
                pid = proc.parent(pid)
        except proc.GONE:
            pass
        return False

    def _watches(self, info: str) -> Iterator[Finding]:
        if unusable_watches(self._rootfs, self._root_device, info):
            yield (
                "watches files with inotify on a file system without file handles",
                "the writable layer must be an overlay with index=on,nfs_export=on; `relume doctor` tells why not",
            )


_SECRET = (
    "holds memory from memfd_secret",
    "nobody can read it, so nobody can save it; free it before the request",
)


_ANOTHER_ROOT = (
    # CRIU takes the container's mounts from what this process sees of them, dumps none, and fails at the restore.
    "is the container's first process and has changed its root (chroot)",
    'start it below another process, as entrypoint = ["sh", "-c", "PROGRAM & wait"] does, or switch its chroot off',
)
_HEADLESS = (
    "still has threads though its main thread has ended (pthread_exit in main)",
    "let main wait for its threads",
)
_TOO_LONG = (f"holds {proc.TOO_LONG}", "close it before the request, or keep it nearer to the root")


def _headless(pid: int) -> bool:
    """Whether the main thread of this zombie has ended and others go on, for which CRIU has no images.

    Looked at twice: a thread that calls execve(2) waits for all others to end and takes the main thread's
    place then (de_thread of fs/exec.c), and one that ends still has its memory for a moment.
    """
    if not proc.threads_going_on(pid):
        return False
    time.sleep(_A_MOMENT)
    return proc.status(pid).state == "Z" and bool(proc.threads_going_on(pid))


def _ghost(link: str, target: str) -> Iterator[Finding]:
    """Of a deleted file, open or mapped (``link`` leads to it): whether it is more than CRIU takes."""
    size = Path(link).stat().st_blocks * 512
    if size > GHOST_LIMIT and not target.startswith(_KERNEL_FILES):
        yield (
            f"holds the deleted file {target.removesuffix(proc.DELETED)} of {size} bytes;"
            f" the limit is {GHOST_LIMIT} bytes",
            "close and unmap it before the request, or give it a name",
        )


def _kind(name: str) -> Finding:
    return _KINDS.get(name, (f"holds an anonymous kernel object, {name}", "close it before the request"))


def _socket(path: str) -> Iterator[Finding]:
    try:
        protocol = os.getxattr(path, "system.sockprotoname").rstrip(b"\0").decode()
    except OSError:
        return  # closed meanwhile
    if protocol.startswith("MPTCP"):
        yield (
            "holds a Multipath TCP socket",
            "make plain TCP sockets; for Go programs set GODEBUG=multipathtcp=0",
        )
    elif protocol not in _PROTOCOLS:
        yield f"holds a socket of the protocol {protocol}", "close it before the request"


def _not_to_be_held(found: Sequence[Held], upper: Path, limit: int) -> Iterator[Culprit]:
    for one in found:
        if deep := held.too_deep(one):
            yield deep
            continue
        try:
            status = (upper / one.path).lstat()
        except OSError:
            continue  # not in the writable layer
        if stat.S_ISREG(status.st_mode) and not one.deleted:
            culprit = held.too_large(one, status.st_blocks * 512, limit)
            if culprit is not None:
                yield culprit


def _misnamed(one: Held) -> Culprit:
    return Culprit(
        one.pid,
        one.process,
        f"has bound {one.how} by a relative name, {one.path}, and renamed it",
        "bind it by an absolute name",
    )


def _without_its_task(link: str) -> bool:
    """Whether fstat(2), of a descriptor that is there, says otherwise, as of ``/proc/PID/fd`` without the process."""
    try:
        Path(link).stat()
    except FileNotFoundError:
        return bool(Path(link).readlink())
    return False


def _tmpfs(pids: Sequence[int]) -> int:
    """Of their mount namespace, by the first of them that is there still."""
    for pid in pids:
        with contextlib.suppress(*proc.GONE):
            return _tmpfs_of(pid)
    return 0


def _tmpfs_of(pid: int) -> int:
    used = 0
    for mount in proc.mounts(pid):
        if mount.kind != "tmpfs":
            continue
        try:
            space = os.statvfs(f"/proc/{pid}/root{mount.point}")
        except OSError:
            continue
        used += (space.f_blocks - space.f_bfree) * space.f_frsize
    return used
