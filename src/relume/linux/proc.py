"""What /proc says of one process: descriptors, mappings, mounts, sockets, memory.

Reading only, and cheap enough to be done while an app is frozen: one pass over a file, no caching, no
waiting. A process that ends meanwhile raises ProcessLookupError or FileNotFoundError, as the kernel says
it; callers that walk a live tree skip it (:data:`GONE`). Sources: proc(5), proc_pid_fdinfo(5),
proc_pid_maps(5), proc_pid_mountinfo(5), proc_pid_smaps(5), proc_pid_status(5).
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

GONE = (FileNotFoundError, ProcessLookupError)
"""What reading /proc of a process raises once it is gone (ENOENT, ESRCH)."""

DELETED = " (deleted)"
"""What the kernel appends to the name of a file that has none any more. A real name may end so too."""

TOO_LONG = "(a path of more than 4096 bytes)"
"""Stands for the name of an open file that the kernel cannot write out (readlink(2), ENAMETOOLONG)."""

_MAPPING = re.compile(rb"^([0-9a-f]+-[0-9a-f]+) \S+ \S+ \S+ \d+ +(\S.*)$", re.MULTILINE)
_OCTAL = re.compile(rb"\\([0-7]{3})")
# Num: RefCount Protocol Flags Type St Inode Path, as proc_net_unix of the kernel's net/unix/af_unix.c has it.
_UNIX_SOCKET = re.compile(
    rb"[0-9a-f]+: [0-9A-F]{8} [0-9A-F]{8} ([0-9A-F]{8}) [0-9A-F]{4} ([0-9A-F]{2}) +([0-9]+)(?: (.*))?"
)
_SIGKILL = 1 << 8
"""Signal 9 in a mask of /proc/PID/status."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps; ``device`` is "major:minor" in hex, ``path`` empty for anonymous memory."""

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str

    @property
    def shared(self) -> bool:
        return self.permissions.endswith("s")


@dataclasses.dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/PID/mountinfo. ``mnt_id`` is unique on the machine while the mount exists."""

    mnt_id: int
    parent_id: int
    device: str
    root: str
    point: str
    kind: str


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """The lines of /proc/PID/status that matter here; ``pids`` are its pids from our namespace inwards."""

    name: str
    state: str
    pids: tuple[int, ...]

    @property
    def inside(self) -> int:
        """The pid in the container: its pid namespace is the one right below ours."""
        return self.pids[1] if len(self.pids) > 1 else self.pids[0]


@dataclasses.dataclass(frozen=True, slots=True)
class UnixSocket:
    """One entry of /proc/PID/net/unix; ``path`` as given to bind(2), "@..." when abstract, "" when unbound."""

    inode: int
    listening: bool
    connected: bool
    path: str


def link(pid: int, name: str) -> str:
    """Where the magic link /proc/PID/NAME points, as a path from the root of its mount namespace, or TOO_LONG."""
    return _readlink(f"/proc/{pid}/{name}")


def descriptors(pid: int) -> list[tuple[int, str]]:
    """(number, target) of each open descriptor; ones closed meanwhile are left out."""
    found = []
    directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(directory):
            try:
                found.append((int(name), _readlink(name, directory)))
            except GONE:
                continue
    finally:
        os.close(directory)
    return found


def fdinfo(pid: int, fd: int) -> str:
    """The text of /proc/PID/fdinfo/FD."""
    return _text(f"/proc/{pid}/fdinfo/{fd}")


def mount_id(info: str) -> int:
    """The ``mnt_id`` in a text of :func:`fdinfo`; -1 when the file is in no mount."""
    for line in info.splitlines():
        if line.startswith("mnt_id:"):
            return int(line[7:])
    return -1


def mappings(pid: int) -> Iterator[Mapping]:
    """Each memory mapping, in address order."""
    with open(f"/proc/{pid}/maps", "rb") as lines:
        for line in lines:
            fields = line.rstrip(b"\n").split(None, 5)
            start, _, end = fields[0].partition(b"-")
            yield Mapping(
                start=int(start, 16),
                end=int(end, 16),
                permissions=fields[1].decode(),
                offset=int(fields[2], 16),
                device=fields[3].decode(),
                inode=int(fields[4]),
                path=_mapped_name(fields[5]) if len(fields) > 5 else "",
            )


def mapped(pid: int) -> dict[str, str]:
    """What its named mappings map: each name once, with the first of its address ranges ("START-END").

    The range is the name of a link in /proc/PID/map_files. Names of memory are ``[heap]`` and the like. Read
    in one go, by a regular expression: a process of a numeric library has thousands of mappings.
    """
    with open(f"/proc/{pid}/maps", "rb") as file:
        text = file.read()
    found: dict[str, str] = {}
    for span, name in _MAPPING.findall(text):
        found.setdefault(_mapped_name(name), span.decode())
    return found


def mounts(pid: int) -> list[Mount]:
    """The mounts of its mount namespace below its root directory, in the order they were made."""
    path = f"/proc/{pid}/mountinfo"
    try:
        with open(path, "rb") as file:
            table = file.read()
    except OSError as error:
        if error.errno == errno.EINVAL:  # a zombie has no namespaces any more
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), path) from None
        raise
    found = []
    for line in table.split(b"\n")[:-1]:
        fields, _, rest = line.partition(b" - ")
        mnt, parent, device, root, point = fields.split(b" ", 5)[:5]
        found.append(
            Mount(
                mnt_id=int(mnt),
                parent_id=int(parent),
                device=device.decode(),
                root=_unescape(root),
                point=_unescape(point),
                kind=rest.split(b" ", 1)[0].decode(),
            )
        )
    return found


def root_mount(pid: int) -> Mount:
    """The mount at ``/`` of its mount namespace: the topmost, where several lie on each other.

    A process whose root is a plain directory (chroot(2)) sees no such mount; it is the one that the directory is in.
    """
    if at_root := [mount for mount in mounts(pid) if mount.point == "/"]:
        return at_root[-1]
    descriptor = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_CLOEXEC)
    try:
        mnt_id, device = mount_id(fdinfo(os.getpid(), descriptor)), os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)
    return Mount(mnt_id, -1, f"{os.major(device)}:{os.minor(device)}", "", "/", "")


def status(pid: int) -> Status:
    """Name, state and pids."""
    fields = status_fields(pid)
    return Status(
        name=fields["Name"],
        state=fields["State"][:1],
        pids=tuple(int(number) for number in fields.get("NSpid", str(pid)).split()),
    )


def status_fields(pid: int) -> dict[str, str]:
    """All lines of /proc/PID/status by their names. A process writes its own name into one of them."""
    return _fields(f"/proc/{pid}/status")


def tracers(pid: int) -> set[int]:
    """The processes that trace a thread of it. The kernel names the thread that does; this is its process."""
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            if (tracer := _fields(f"/proc/{pid}/task/{thread}/status")["TracerPid"]) != "0":
                found.add(int(_fields(f"/proc/{tracer}/status")["Tgid"]))
        except GONE:
            continue
    return found


def parent(pid: int) -> int:
    """Its parent, which a zombie has too; 0 when that one is in no pid namespace that we see."""
    return int(status_fields(pid)["PPid"])


def threads_going_on(pid: int) -> list[int]:
    """Its threads that have neither ended nor are about to.

    What ends has no memory any more: a zombie, and a thread that takes apart the memory of its process, which
    can last for seconds (do_exit of kernel/exit.c: exit_mm comes first). What will end because its process
    does (exit_group(2)) has SIGKILL pending for itself alone.
    """
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            fields = _fields(f"/proc/{pid}/task/{thread}/status")
        except GONE:
            continue
        if "VmSize" in fields and not int(fields["SigPnd"], 16) & _SIGKILL:
            found.append(int(thread))
    return found


def exists(pid: int) -> bool:
    """Whether there is such a process in our pid namespace."""
    return Path(f"/proc/{pid}").exists()


def namespace(pid: int, kind: str) -> int:
    """The inode number that names its namespace of this kind (``mnt``, ``pid``, ``net``, ``user``, ...)."""
    return int(link(pid, f"ns/{kind}").partition("[")[2].rstrip("]"))


def unix_sockets(pid: int) -> list[UnixSocket]:
    """Every unix socket of its network namespace (proc_pid_net(5)).

    The kernel writes names as they are, and a name may have newlines in it (``"\\0" + os.urandom(16)``): a line
    that is no entry goes on with the name before. A program can choose a name whose second line looks like an
    entry, so what is said here of a socket is its program's word, to be asked of the socket itself.
    """
    found: list[UnixSocket] = []
    with open(f"/proc/{pid}/net/unix", "rb") as file:
        table = file.read()
    for line in table.split(b"\n")[1:-1]:
        if entry := _UNIX_SOCKET.fullmatch(line):
            flags, state, inode, path = entry.groups(default=b"")
            found.append(
                UnixSocket(
                    inode=int(inode),
                    listening=bool(int(flags, 16) & 0x10000),  # __SO_ACCEPTCON
                    connected=state == b"03",
                    path=os.fsdecode(path),
                )
            )
        elif found:
            found[-1] = dataclasses.replace(found[-1], path=f"{found[-1].path}\n{os.fsdecode(line)}")
    return found


def memory(pid: int) -> dict[str, int]:
    """/proc/PID/smaps_rollup in bytes, by its own field names (``Rss``, ``Anonymous``, ...).

    Empty for a process without memory of its own: a kernel thread or a zombie.
    """
    fields = {}
    try:
        for line in _text(f"/proc/{pid}/smaps_rollup").splitlines()[1:]:
            name, _, value = line.partition(":")
            fields[name] = int(value.split()[0]) * 1024
    except ProcessLookupError:
        return {}
    return fields


def _fields(path: str) -> dict[str, str]:
    """A status file: its lines by their names."""
    return dict(line.split(":\t", 1) for line in _text(path).split("\n") if ":\t" in line)


def _text(path: str) -> str:
    # Bytes, so that a name with a carriage return in it stays one line.
    with open(path, "rb") as file:
        return file.read().decode(errors="surrogateescape")


def _readlink(path: str, directory: int | None = None) -> str:
    try:
        return os.readlink(path, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return TOO_LONG
        raise


def _mapped_name(field: bytes) -> str:
    """In maps only a newline is escaped (as \\012), so a name with a backslash stays ambiguous."""
    return os.fsdecode(field.replace(b"\\012", b"\n"))


def _unescape(field: bytes) -> str:
    """Space, tab, newline and backslash are written as three octal digits."""
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))
