"""Each rule has a line of real text here, in the form in which CRIU 4.2.1 prints it."""

from __future__ import annotations

from pathlib import Path

import pytest

from relume.engine import _criu_rules, criulog

FAILED = """\
(00.040000) Dumping task (pid: 4711 comm: python3)
(00.042000) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
{line}
(00.043711) Error (criu/cr-dump.c:1545): Dump files (pid: 4711) failed with -1
(00.043945) Error (criu/cr-dump.c:1975): Dumping FAILED.
"""

ABOUT_ONE = [
    ("(00.03) Error (criu/proc_parse.c:502): Unknown shit 600 (anon_inode:[io_uring])", "io_uring ring"),
    (
        "(00.14) Error (criu/tty.c:2286): tty: ctty inheritance detected sid/pgrp 8 (ctty pid_real 4711 pty"
        " pid_real 4710)",
        "holds /dev/tty",
    ),
    ("(00.04) Error (criu/proc_parse.c:502): Unknown shit 100600 (/secretmem (deleted))", "memfd_secret"),
    ("(00.04) Error (criu/proc_parse.c:502): Unknown shit 140777 (socket:[77])", "maps socket:[77], which"),
    (
        "(00.04) Error (criu/proc_parse.c:663): Can't handle non-regular mapping on 4711's map 7f01",
        "maps a device",
    ),
    ("pie: 19762: Error (criu/pie/parasite.c:588): send_fds failed (-22)", "an io_uring ring most likely"),
    (
        "(00.04) Error (criu/proc_parse.c:614): PID 4711 has uprobes vma. Consider using --allow-uprobes.",
        "uprobe",
    ),
    (
        "(00.03) Error (criu/files-ext.c:94): Can't dump file 3 of that type [600] (anon anon_inode:[userfaultfd])",
        "kind userfaultfd",
    ),
    (
        "(00.03) Error (criu/files-ext.c:94): Can't dump file 3 of that type [600] (anon anon_inode:bpf-map)",
        "bpf-map",
    ),
    (
        "(00.03) Error (criu/files-ext.c:94): Can't dump file 3 of that type [20600] (chr 10:229)",
        "device 10:229",
    ),
    (
        "(00.03) Error (criu/files-ext.c:94): Can't dump file 5 of that type [60600] (unknown /dev/vda)",
        "/dev/vda",
    ),
    (
        "(00.010716) Error (criu/files.c:378): Can't stat fd 23: No such file or directory",
        "whose process or thread has ended",
    ),
    (
        "(00.010230) Error (criu/sk-unix.c:698): unix: Unable too cut a.6 from /var/lib/a",
        "the unix socket /var/lib/a by a relative name, a.6",
    ),
    ("(00.03) Error (criu/files-reg.c:1790): Can't lookup mount=21 for fd=3 path=/queue", "holds /queue"),
    (
        "(00.03) Error (criu/files-reg.c:1796): Open files on overmounted mounts are not supported yet;"
        " mount=21 fd=3 path=/a/b",
        "holds /a/b, over which",
    ),
    (
        "(00.03) Error (criu/files-reg.c:1031): Can't dump ghost file data/x of 4194304 size, increase limit",
        "deleted file /data/x of 4194304 bytes",
    ),
    (
        "(00.03) Error (criu/files-reg.c:1444): Unaccessible path opened 39:5, need 39:4",
        "leads to another file",
    ),
    ("(00.03) Error (criu/fsnotify.c:284): fsnotify: \tCan't dump that handle", "watches files with inotify"),
    (
        "(00.03) Error (criu/mount.c:4048): mnt: Nested mount namespaces are not supported without",
        "mount namespace",
    ),
    (
        "(00.03) Error (criu/namespaces.c:460): Can't dump nested uts namespace for 4711",
        "a uts namespace of its own",
    ),
    (
        "(00.02) Error (compel/src/lib/infect.c:262): Unseizable non-zombie 4711 found, state S, err -1/10",
        "traced",
    ),
    ("(00.02) Error (criu/seize.c:952): Individually stopped threads not supported", "single stopped thread"),
    ("(00.02) Error (criu/seize.c:939): Zombie thread not supported", "is ending just now"),
    (
        "(00.02) Error (criu/pidfd.c:97): pidfd: pidfd pid 1 is not a part of process tree..",
        "outside of the container",
    ),
    (
        "(00.02) Error (criu/pidfd.c:88): pidfd: PIDFD_THREAD flag is currently not supported",
        "pidfd of a thread",
    ),
    (
        "(00.02) Error (criu/sockets.c:767): sockets: BUG! Unknown socket collected (family 40)",
        "the family 40",
    ),
    ("(00.02) Error (criu/sk-inet.c:137): inet: Unsupported proto 262 for socket 1327c", "Multipath TCP"),
    ("(00.02) Error (criu/sk-inet.c:137): inet: Unsupported proto 132 for socket 1327c", "IP protocol 132"),
    (
        "(00.02) Error (criu/sk-inet.c:167): inet: Can't dump 5 inet socket 13. Only stream, dgram and raw are",
        "no stream, datagram or raw",
    ),
    ("(00.02) Error (criu/sk-inet.c:504): inet: Can't dump corked dgram socket 13e4a", "corked socket"),
    (
        "(00.02) Error (criu/sk-unix.c:506): unix: Non-empty write queue on an in-flight socket 0x3",
        "wrote already",
    ),
    ("(00.02) Error (criu/sk-unix.c:525): unix: Found a closed in-flight socket to 0x3", "closed already"),
    (
        "(00.02) Error (criu/sk-inet.c:185): inet: In-flight connection (l) for 3a",
        "has not accepted a client",
    ),
    ("(00.02) Error (criu/sk-netlink.c:77): netlink: The socket has data to read", "netlink"),
    (
        "(00.02) Error (criu/sk-unix.c:881): unix: Can't dump half of stream unix connection. name: a; peer name: b",
        "to a process outside",
    ),
    (
        "(00.02) Error (criu/cr-dump.c:388): Can't get rlimit 0: Operation not permitted",
        "runs as another user",
    ),
    (
        "(00.02) Error (criu/cr-dump.c:477): Task 4711 with SysVIPC shmem map @7f doesn't live in IPC ns",
        "System V memory",
    ),
    ("(00.02) Error (criu/cr-dump.c:669): Can't make VM id for 4711", "shares its memory with"),
    ("(00.02) Error (criu/cr-dump.c:676): Can't make FS id for 4711", "shares its working directory with"),
    ("(00.02) Error (criu/cr-dump.c:683): Can't make FILES id for 4711", "shares its descriptors with"),
    ("(00.02) Error (criu/cr-dump.c:690): Can't make IO id for 4711", "shares its signal handlers with"),
]

ABOUT_ALL = [
    (
        "(00.02) Error (criu/seize.c:882): Zombies with threads are not supported",
        "busy",
        "a process is ending just now",
    ),
    (
        "(00.5) Error (criu/include/util.h:211): Can't open 11260/pagemap on procfs: No such process",
        "engine",
        "was killed during the checkpoint",
    ),
    (
        "(00.5) Error (compel/src/lib/infect.c:127): si_code=2 si_pid=25975 si_status=9",
        "engine",
        "was killed during the checkpoint",
    ),
    (
        "(00.5) Error (compel/src/lib/infect-rpc.c:41): Failed to read ack: Connection reset by peer",
        "engine",
        "was killed during the checkpoint",
    ),
    (
        "(00.02) Error (criu/filesystems.c:650): mnt: mqueue isn't empty",
        "unsupported",
        "POSIX message queues",
    ),
    (
        "(00.02) Error (criu/filesystems.c:663): failed to dump fs ./mnt/x (fuse): always fail",
        "unsupported",
        "a fuse file system is mounted on ./mnt/x",
    ),
    (
        "(00.02) Error (criu/files-reg.c:1122): Can't create link remap for /dev/shm/sem.x. Use link-remap option.",
        "engine",
        "/dev/shm/sem.x was deleted",
    ),
    (
        "(00.02) Error (criu/file-lock.c:110): Some file locks are hold by dumping tasks! You can try --file-locks",
        "engine",
        "file locks are held",
    ),
    (
        "(00.02) Error (criu/namespaces.c:997): One or more namespaces doesn't belong to the target user namespace",
        "engine",
        "another user namespace",
    ),
    (
        "(00.02) Error (criu/seize.c:635): Unable to freeze cgroup /sys/fs/cgroup/x (100 x 100ms attempts)",
        "busy",
        "could not be frozen",
    ),
    ("(00.02) Error (criu/cr-dump.c:1808): Timeout reached. Try to interrupt: 0", "busy", "stopped in time"),
    (
        "(00.02) Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option.",
        "engine",
        "TCP connections are open",
    ),
    (
        "(00.02) Error (criu/page-xfer.c:77): page-xfer: Unable to spice data: No space left on device",
        "disk",
        "is full",
    ),
    (
        "(00.02) Error (criu/mem.c:964): Unable to map ANON_VMA: Cannot allocate memory",
        "memory",
        "not enough memory",
    ),
    # restore
    (
        "(00.02)    1: Error (criu/files-reg.c:2353): Can't open file tmp/x/m on restore: No such file or directory",
        "engine",
        "/tmp/x/m is missing",
    ),
    (
        "(00.02)    1: Error (criu/files-reg.c:2175): File tmp/x/m has bad size 8195 (expect 8192)",
        "engine",
        "/tmp/x/m is not what it was",
    ),
    (
        "(00.02)    1: Error (criu/files-reg.c:2294): File app has bad mode 0100600 (expect 0100644)",
        "engine",
        "/app is not what it was",
    ),
    (
        "(00.02) 1: Error (criu/sk-inet.c:1059): inet: Can't bind inet socket (id 7): Cannot assign requested address",
        "engine",
        "address does not exist",
    ),
    (
        "(00.02) 1: Error (criu/sk-inet.c:1059): inet: Can't bind inet socket (id 7): Address already in use",
        "engine",
        "bound again: Address already in use",
    ),
    (
        "(00.02)    1: Error (criu/sk-inet.c:1085): inet: Can't connect inet socket back: Network is unreachable",
        "engine",
        "made again: Network is unreachable",
    ),
    (
        "1: Error (criu/sk-unix.c:1651): unix: Can't bind id 0x9 ino 77 addr /run/a/s: No such file or directory",
        "engine",
        "the unix socket /run/a/s cannot be bound again: No such file or directory",
    ),
    (
        "(00.02)    1: Error (criu/mount.c:3141): mnt: No mapping for 77:/data mountpoint",
        "engine",
        "a mount on /data",
    ),
    (
        "(00.02)    1: Error (criu/image.c:635): Unable to open timens-0.img: Permission denied",
        "engine",
        "cannot be read",
    ),
    (
        "(00.02) Error (criu/image.c:635): Unable to open pages-1.img: No such file or directory",
        "damaged",
        "is missing",
    ),
    ("(00.02) Error (criu/image.c:563): Magic doesn't match for core-1.img", "damaged", "damaged"),
    ("(00.02) Error (criu/image.c:871): Img trimmed 3/8", "damaged", "damaged"),
    (
        "(00.02)    1: Error (criu/pagemap.c:426): pagemap: Reached EOF unexpectedly while reading page from image",
        "damaged",
        "damaged",
    ),
    ("(00.02) Error (criu/image.c:198): Missing required plugin: cuda_plugin", "host", "plugin cuda_plugin"),
    (
        "1: Error (criu/uffd.c:314): uffd: Unable to open an userfaultfd descriptor: Operation not permitted",
        "host",
        "userfaultfd is not allowed",
    ),
    (
        "(00.02)    1: Error (criu/uffd.c:349): uffd: connect to lazy-pages.socket failed: Connection refused",
        "engine",
        "the pager was not there",
    ),
    (
        "(00.02) Error (criu/arch/x86/cpu.c:297): cpu: CPU capabilities do not match run time",
        "host",
        "processor",
    ),
    ("(00.02) Error (criu/pie-util-vdso.c:55): vdso: Unexpected rt vDSO area bounds", "host", "too old"),
    (
        "(00.02) Error (criu/cr-restore.c:1262): 4711 killed by signal 9: Killed",
        "memory",
        "for want of memory",
    ),
]


def who(pid: int) -> criulog.Who | None:
    return (7, "worker") if pid == 4711 else None


@pytest.mark.parametrize(("line", "words"), ABOUT_ONE)
def test_lines_about_a_process(line: str, words: str) -> None:
    told = criulog.explain_text(FAILED.format(line=line), who=who)
    assert told.kind in ("unsupported", "busy")
    (culprit,) = told.culprits
    assert (culprit.pid, culprit.process) == (7, "worker")
    assert words in culprit.what
    assert told.reason == f"worker (pid 7) {culprit.what}"
    assert culprit.hint


@pytest.mark.parametrize(("line", "kind", "words"), ABOUT_ALL)
def test_lines_about_no_process(line: str, kind: str, words: str) -> None:
    told = criulog.explain_text(FAILED.format(line=line), who=who)
    assert told.kind == kind
    assert words in told.reason
    assert told.hint
    assert "worker" not in told.reason


def test_what_lasts_is_not_tried_again() -> None:
    kinds = {
        line: criulog.explain_text(f"(00.02) Error (criu/a.c:1): {line}\n", who=who).kind
        for line in (
            "Can't make VM id for 4711",
            "Zombies with threads are not supported",
            "Zombie thread not supported",
        )
    }
    assert list(kinds.values()) == ["unsupported", "busy", "busy"]


def test_the_pid_in_the_line_counts() -> None:
    line = "(00.02) Error (criu/cr-dump.c:669): Can't make VM id for 12"
    told = criulog.explain_text(FAILED.format(line=line), who=lambda pid: (3, "twin") if pid == 12 else None)
    assert told.culprits[0].pid == 3


def test_every_rule_has_its_line() -> None:
    lines = [line.split("): ", 1)[1] for line, *_ in (*ABOUT_ONE, *ABOUT_ALL)]
    rules = (*_criu_rules.ANYWHERE, *_criu_rules.DUMP, *_criu_rules.RESTORE)
    first = {next(rule.pattern for rule in rules if rule.pattern.search(line)) for line in lines}
    assert first == {rule.pattern for rule in rules}


def test_an_unknown_line_is_quoted_without_decoration() -> None:
    log = FAILED.format(line="(00.1) Error (criu/new.c:1): new: Something nobody saw before\n")
    told = criulog.explain_text(log, who=who)
    assert told.reason == "CRIU: new: Something nobody saw before"
    assert (told.kind, told.culprits) == ("engine", ())


def test_a_process_that_is_gone_has_no_name() -> None:
    told = criulog.explain_text(FAILED.format(line=ABOUT_ONE[0][0]), who=lambda pid: None)
    assert told.reason == "a process maps an io_uring ring"
    assert told.culprits[0].as_dict()["pid"] == 0


def test_nothing_said(tmp_path: Path) -> None:
    assert criulog.explain(tmp_path / "dump.log").reason == ""
    assert criulog.explain_text("(00.1) Dumping task (pid: 1 comm: x)\n").reason == ""
