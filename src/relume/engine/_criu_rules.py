"""The error lines of CRIU 4.2 that a user can do something about, and what that is.

Each rule is a regular expression for the text after ``Error (FILE:LINE): ``; ``what`` and ``hint`` may use its
named groups. A group ``pid`` is a host pid. The file behind each rule says where CRIU prints it; one line of
real text for each is in tests/unit/engine/test_criulog.py.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

Kind = Literal["unsupported", "busy", "disk", "memory", "damaged", "host", "engine"]
"""What sort of failure a line tells of.

``unsupported``: a process has what cannot be saved. ``busy``: it would pass a moment later. ``disk`` and
``memory``: no room. ``damaged``: the images are not what was written. ``host``: this machine lacks
something. ``engine``: ours to mend, or unknown.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """``names_process``: the line is about one process, which the text around it names."""

    pattern: re.Pattern[str]
    what: str
    hint: str
    kind: Kind = "unsupported"
    names_process: bool = True


def _rule(
    pattern: str, what: str, hint: str, kind: Kind = "unsupported", *, names_process: bool | None = None
) -> Rule:
    about_one = kind in ("unsupported", "busy") if names_process is None else names_process
    return Rule(re.compile(pattern), what, hint, kind, about_one)


_CLOSE = "close it before the request"
_AGAIN = "an event loop takes it up in a moment; the checkpoint is tried again then"
_RING = "switch io_uring off in the program, or let the default seccomp profile answer ENOSYS"
_MEMORY = "if nobody did it on purpose, see the kernel's log for one that ran out of memory"
_NEW = "take a new checkpoint"
_SANDBOX = "containers and sandboxes inside the container cannot be saved; start without them"

DUMP = (
    # criu/include/util.h, compel/src/lib/infect.c, infect-rpc.c: it went away under CRIU's hands
    _rule(
        r": No such process$",
        "a process of the app was killed during the checkpoint",
        _MEMORY,
        "engine",
    ),
    _rule(
        r"si_code=\d+ si_pid=\d+ si_status=\d+",
        "a process of the app was killed during the checkpoint",
        _MEMORY,
        "engine",
    ),
    _rule(
        r"Failed to read ack: Connection reset by peer",
        "a process of the app was killed during the checkpoint",
        _MEMORY,
        "engine",
    ),
    # criu/proc_parse.c, parasite.c: mappings and descriptors that cannot be opened or passed on
    _rule(r"Unknown shit \d+ \(anon_inode:\[io_uring\]\)", "maps an io_uring ring", _RING),
    _rule(r"Unknown shit \d+ \(/secretmem", "holds memory from memfd_secret", "free it before the request"),
    _rule(
        r"Unknown shit \d+ \((?P<name>.*)\)",
        "maps {name}, which CRIU does not know",
        "unmap it before the request",
    ),
    _rule(
        r"Can't handle non-regular mapping on (?P<pid>\d+)'s map",
        "maps a device",
        "unmap it before the request",
    ),
    _rule(
        r"send_fds failed \(-22\)|Can't retrieve FDs from socket",
        "holds a descriptor that no other process can be given, an io_uring ring most likely",
        _RING,
    ),
    _rule(
        r"PID (?P<pid>\d+) has uprobes vma", "is watched by a uprobe", "stop tracing it before the request"
    ),
    # criu/files-ext.c, files.c: descriptors of kinds that CRIU does not save
    _rule(
        r"Can't dump file \d+ of that type \[\w+\] \(anon anon_inode:\[?(?P<name>[^\])]+)\]?\)",
        "holds a descriptor of the kind {name}",
        _CLOSE,
    ),
    _rule(
        r"Can't dump file (?P<fd>\d+) of that type \[\w+\] \(chr (?P<device>\d+:\d+)\)",
        "holds the device {device} (descriptor {fd})",
        _CLOSE,
    ),
    _rule(
        r"Can't dump file (?P<fd>\d+) of that type \[\w+\] \((?:reg|unknown) (?P<name>.*)\)",
        "holds {name} (descriptor {fd})",
        _CLOSE,
    ),
    _rule(
        r"Can't stat fd \d+: No such file or directory",
        "holds a directory of /proc whose process or thread has ended",
        _CLOSE,
    ),
    # criu/sk-unix.c: sockets bound by a relative name
    _rule(
        r"unix: Unable too cut (?P<name>.*) from (?P<path>.*)",
        "has bound the unix socket {path} by a relative name, {name}, and renamed it",
        "bind it by an absolute name",
    ),
    # criu/files-reg.c: regular files
    _rule(
        r"Can't lookup mount=-?\d+ for fd=-?\d+ path=(?P<path>.*)",
        "holds {path}, which is on no mount of the container (a POSIX message queue, or a file from outside)",
        _CLOSE,
    ),
    _rule(
        r"Open files on overmounted mounts are not supported yet; .*path=(?P<path>.*)",
        "holds {path}, over which something else is mounted",
        "close it, or undo the mount, before the request",
    ),
    _rule(
        r"Can't dump ghost file (?P<path>.*) of (?P<size>\d+) size, increase limit",
        "holds the deleted file /{path} of {size} bytes, which is over the limit",
        "close it before the request, or give it a name",
    ),
    _rule(
        r"Unaccessible path opened",
        "holds a file whose name now leads to another file",
        "close and open it again before the request",
    ),
    _rule(
        r"Can't create link remap for (?P<path>.*)\. Use",
        "{path} was deleted while open and CRIU was not told link-remap",
        "report this as a bug",
        "engine",
    ),
    _rule(
        r"Some file locks are hold by dumping tasks",
        "file locks are held and CRIU was not told file-locks",
        "report this as a bug",
        "engine",
    ),
    _rule(
        r"fsnotify:\s+Can't dump that handle|^\s*Can't dump that handle",
        "watches files with inotify on a file system without file handles",
        "the writable layer must be an overlay with index=on,nfs_export=on",
    ),
    # criu/tty.c
    _rule(
        r"ctty inheritance detected sid/pgrp \d+(?: \(ctty pid_real (?P<pid>\d+))?",
        "holds /dev/tty, the terminal that controls its session, as an interactive shell does",
        "end that shell before the request, or use bash, which does not keep it open",
    ),
    # criu/filesystems.c, mount.c
    _rule(
        r"mqueue isn't empty",
        "there are POSIX message queues in the container",
        "unlink message queues before the request",
        names_process=False,
    ),
    _rule(
        r"failed to dump fs (?P<path>\S+) \((?P<name>\w+)\): always fail",
        "a {name} file system is mounted on {path}",
        "unmount it before the request",
        names_process=False,
    ),
    _rule(r"Nested mount namespaces are not supported", "runs in a mount namespace of its own", _SANDBOX),
    # criu/namespaces.c
    _rule(
        r"Can't dump nested (?P<name>\w+) namespace for (?P<pid>\d+)",
        "runs in, or makes children in, a {name} namespace of its own",
        _SANDBOX,
    ),
    _rule(
        r"doesn't belong to the target user namespace",
        "a namespace of the container belongs to another user namespace",
        "let runc make the namespaces; report this as a bug",
        "engine",
    ),
    # compel/src/lib/infect.c, criu/seize.c: processes that cannot be stopped
    _rule(
        r"Unseizable non-zombie (?P<pid>\d+) found",
        "is traced by another process",
        "detach the debugger or tracer before the request",
    ),
    _rule(
        r"Individually stopped threads not supported",
        "has a single stopped thread",
        "let it run, or stop all",
        "busy",
    ),
    _rule(r"Zombie thread not supported", "is ending just now", "it is tried again", "busy"),
    # One whose main thread ended for good is found before the freeze (preflight.py): this one is about to end. CRIU
    # does not say which.
    _rule(
        r"Zombies with threads",
        "a process is ending just now",
        "it is tried again",
        "busy",
        names_process=False,
    ),
    _rule(
        r"Unable to freeze cgroup",
        "the container could not be frozen",
        "it is tried again",
        "busy",
        names_process=False,
    ),
    _rule(
        r"Timeout reached\. Try to interrupt",
        "a process could not be stopped in time (it hangs in the kernel, or is stopped and frozen at once)",
        "try again; `ps` shows a process in state D",
        "busy",
        names_process=False,
    ),
    # criu/pidfd.c
    _rule(
        r"pidfd pid -?\d+ is not a part of process tree",
        "holds a pidfd of a process outside of the container",
        _CLOSE,
    ),
    _rule(r"PIDFD_THREAD flag", "holds a pidfd of a thread", "use pidfds of processes"),
    # criu/sockets.c, sk-inet.c, sk-unix.c, sk-netlink.c
    _rule(
        r"Unknown socket collected \(family (?P<family>\d+)\)",
        "holds a socket of the family {family}",
        _CLOSE,
    ),
    _rule(
        r"Unsupported proto 262 for socket",
        "holds a Multipath TCP socket",
        "make plain TCP sockets; for Go programs set GODEBUG=multipathtcp=0",
    ),
    _rule(
        r"Unsupported proto (?P<proto>\d+) for socket", "holds a socket of the IP protocol {proto}", _CLOSE
    ),
    _rule(
        r"Can't dump \d+ inet socket .* Only",
        "holds an IP socket that is no stream, datagram or raw one",
        _CLOSE,
    ),
    _rule(
        r"Can't dump corked dgram socket", "has half a UDP datagram in a corked socket", "uncork it", "busy"
    ),
    _rule(
        r"Non-empty write queue on an in-flight socket",
        "has not accepted a unix client that wrote already",
        _AGAIN,
        "busy",
    ),
    _rule(
        r"Found a closed in-flight socket",
        "has not accepted a unix client that closed already",
        _AGAIN,
        "busy",
    ),
    _rule(r"In-flight connection", "has not accepted a client", _AGAIN, "busy"),
    _rule(r"The socket has data to read", "has not read what the kernel sent it (netlink)", _AGAIN, "busy"),
    _rule(
        r"Connected TCP socket, consider",
        "TCP connections are open and CRIU was told neither tcp-established nor tcp-close",
        "report this as a bug",
        "engine",
    ),
    _rule(
        r"Can't dump half of stream unix connection|Can't dump name-less external socket|External socket is used",
        "is connected by a unix socket to a process outside of the container",
        _CLOSE,
    ),
    # criu/cr-dump.c, dump_task_kobj_ids; "IO" is what it says of signal handlers
    *(
        _rule(
            rf"Can't make {kind} id for (?P<pid>\d+)",
            f"shares its {shared} with a process of which it is no thread",
            f"start it by fork, or as a thread: clone with {flag} and without CLONE_THREAD cannot be saved",
        )
        for kind, shared, flag in (
            ("VM", "memory", "CLONE_VM"),
            ("FS", "working directory", "CLONE_FS"),
            ("FILES", "descriptors", "CLONE_FILES"),
            ("IO", "signal handlers", "CLONE_SIGHAND"),
        )
    ),
    # criu/cr-dump.c
    _rule(
        r"Can't get rlimit \d+: Operation not permitted",
        "runs as another user, whose limits the host may not read",
        "the host lacks CAP_SYS_RESOURCE: run the container in a user namespace",
    ),
    _rule(
        r"with SysVIPC shmem map .* doesn't live in IPC ns", "shares System V memory with the host", _CLOSE
    ),
)

RESTORE = (
    # criu/files-reg.c
    _rule(
        r"Can't open file (?P<path>.*?) on restore: No such file",
        "/{path} is missing: it was open or mapped at the checkpoint",
        "what is held at a checkpoint must keep its name, in /persistent-storage too; take a new checkpoint",
        "engine",
    ),
    _rule(
        r"File (?P<path>.*) has bad (?:size \d+|mode 0\d+) \(expect",
        "/{path} is not what it was at the checkpoint",
        "files that are open at a checkpoint must not change afterwards; take a new one",
        "engine",
    ),
    # criu/sk-inet.c, sk-unix.c
    _rule(
        r"Can't bind inet socket .*: Cannot assign requested address",
        "a socket's address does not exist in the new network namespace",
        "listen on 0.0.0.0, 127.0.0.1 or an address that every instance has",
        "engine",
    ),
    _rule(
        r"Can't bind inet socket .*: (?P<error>.*)", "a port cannot be bound again: {error}", _NEW, "engine"
    ),
    _rule(
        r"Can't connect inet socket back: (?P<error>.*)",
        "a connection cannot be made again: {error}",
        "the network namespace must be set up before: report this as a bug",
        "engine",
    ),
    _rule(
        r"Can't bind id \S+ ino \d+ addr (?P<path>.*): (?P<error>[^:]*)$",
        "the unix socket {path} cannot be bound again: {error}",
        "its directory must be there: take a new checkpoint",
        "engine",
    ),
    # criu/mount.c, image.c, pagemap.c, namespaces.c, uffd.c, arch/x86/cpu.c
    _rule(
        r"No mapping for -?\d+:(?P<path>.*) mountpoint",
        "the container had a mount on {path} that this one has not",
        _NEW,
        "engine",
    ),
    _rule(
        r"Unable to open (?P<path>\S+\.img): Permission denied",
        "{path} cannot be read by the container's user namespace",
        "the image directory must belong to the container's root: report this as a bug",
        "engine",
    ),
    _rule(
        r"(?:Head magic|Magic) doesn't match|Img trimmed|Unexpected EOF|Reached EOF unexpectedly|Image corrupted",
        "the checkpoint's files are damaged",
        _NEW,
        "damaged",
    ),
    _rule(
        r"Unable to open (?P<path>\S+\.img): No such file",
        "the checkpoint's file {path} is missing",
        _NEW,
        "damaged",
    ),
    _rule(
        r"Missing required plugin: (?P<name>\S+)",
        "CRIU lacks the plugin {name}",
        "install it, or take a new checkpoint",
        "host",
    ),
    _rule(
        r"Unable to open an userfaultfd descriptor",
        "userfaultfd is not allowed",
        "sysctl vm.unprivileged_userfaultfd=1, or [node] allow_userfaultfd = false",
        "host",
    ),
    _rule(
        r"connect to \S*lazy-pages\.socket failed", "the pager was not there", "see the node's log", "engine"
    ),
    _rule(
        r"CPU (?:instruction )?capabilities do not match|FPU feature required"
        r"|xsave (?:max )?size mismatch|xfeatures has unsupported",
        "this machine's processor lacks what the checkpoint needs",
        _NEW,
        "host",
    ),
    _rule(
        r"Unexpected rt vDSO area bounds",
        "this CRIU is too old for this kernel",
        "run script/bootstrap",
        "host",
    ),
)

ANYWHERE = (
    _rule(r"No space left on device|Disk quota exceeded", "the disk is full", "free some space", "disk"),
    _rule(
        r"Cannot allocate memory",
        "there is not enough memory",
        "free some memory, or raise the limit",
        "memory",
    ),
    _rule(
        r"\d+ killed by signal 9\b",
        "a process was killed while it was restored, for want of memory most likely",
        "raise [cerebrium.hardware] memory",
        "memory",
    ),
)

NOISE = re.compile(
    r"Can't setup RLIMIT_NOFILE for self|(?:Dumping|Restoring|Pre-dumping) FAILED|failed with -?\d+$"
    r"|In-flight connections can be ignored|For Go programs, consider|Message reply from daemon is trimmed"
    r"|Can't open \d+'s mapfile link|^exited, status=\d+$|^Script .* exited with|One of more action scripts failed"
)
"""Lines that only say that something failed, harmless ones, and second lines of what has been told."""
