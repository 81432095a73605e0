"""What happens when things break: the app lives, the answer says why, nothing is left behind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from harness import MAIN, SNIPPET, App, Failed, Relume, get, in_its_dump, shrink_to_fit, until
from relume.linux import cgroup, mounts, proc
from relume.linux.process import exiting, traced


def making(relume: Relume) -> list[Path]:
    return list((relume.state / "checkpoints").glob(".making-*"))


def node_id(relume: Relume) -> str:
    return str(relume.json("node", "status")["node_id"])


def written(relume: Relume) -> list[Path]:
    """The files of pages that a dump has begun."""
    return [page for place in making(relume) for page in place.glob("images/pages-*.img")]


def processes(relume: Relume, instance: str) -> list[int]:
    return cgroup.processes(f"/relume/{node_id(relume)}/{instance}")


def state_of(relume: Relume, app: App, checkpoint: str) -> str:
    return next(row["state"] for row in relume.checkpoints(app.name) if row["checkpoint_id"] == checkpoint)


def flip_a_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


BIG = "ballast = bytearray(os.urandom(1 << 20) * 400)\n"

POST_IN_THREAD = """
def post(body=b"", **options):
    request = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST", data=body)
    return json.loads(urllib.request.urlopen(request, timeout=600).read())
import urllib.request
"""


def test_damaged_image_boots_cold_and_is_replaced_in_the_background(relume: Relume, app: App) -> None:
    app.write(f"{SNIPPET}\nserve()")
    relume.deploy(app.directory)
    relume.start(app.name)
    (checkpoint,) = relume.checkpoints(app.name)
    pages = next((relume.state / "checkpoints" / checkpoint["checkpoint_id"] / "images").glob("pages-*.img"))
    for offset in range(0, pages.stat().st_size, 1 << 20):  # whatever is asked for first is damaged
        flip_a_bit(pages, offset)

    started = relume.start(app.name)
    assert not started["restored"]
    assert "restore failed" in started["reason"]
    answer = relume.answer_of_post(started["instance_id"])
    assert (answer["status"], answer["reason"]) == ("skipped", "deferred"), "nobody waits for a new one"
    assert state_of(relume, app, checkpoint["checkpoint_id"]) == "quarantined"
    until(lambda: "ready" in [row["state"] for row in relume.checkpoints(app.name)], what="no replacement")
    until(
        lambda: len([row for row in relume.ps(app.name) if row["state"] == "ready"]) == 2,
        what="the extra stays",
    )
    assert relume.start(app.name)["restored"]
    with pytest.raises(Failed) as verified:
        relume.json("checkpoints", "verify", checkpoint["checkpoint_id"])
    assert verified.value.error["code"] == "untrusted"


def test_damage_found_late_ends_the_copy_and_another_takes_its_place(relume: Relume, app: App) -> None:
    app.write(
        f"""
ballast = bytearray(os.urandom(1 << 20) * 64)
ACTIONS["sum"] = lambda _: sum(ballast)
{SNIPPET}
serve()
"""
    )
    relume.deploy(app.directory)
    first = relume.start(app.name)
    right = get(first, "/sum")
    (checkpoint,) = relume.checkpoints(app.name)
    pages = next((relume.state / "checkpoints" / checkpoint["checkpoint_id"] / "images").glob("pages-*.img"))
    flip_a_bit(pages, pages.stat().st_size // 2)
    copy = relume.start(app.name, "--env", "COLOUR=blue")
    assert copy["restored"], "the damage is not in what a start needs"
    with contextlib.suppress(OSError):
        assert get(copy, "/sum") == right, "a wrong byte was read"
    until(
        lambda: (
            {row["instance_id"]: row["state"] for row in relume.ps(app.name)}[copy["instance_id"]] != "ready"
        )
    )
    until(lambda: state_of(relume, app, checkpoint["checkpoint_id"]) == "quarantined", what="still in use")

    def successor() -> list[dict[str, object]]:
        known = (first["instance_id"], copy["instance_id"])
        rows = [row for row in relume.ps(app.name) if row["instance_id"] not in known]
        with contextlib.suppress(OSError):  # the extra instance that makes a new checkpoint comes and goes
            return [
                row for row in rows if row["state"] == "ready" and get(row, "/env").get("COLOUR") == "blue"
            ]
        return []

    until(successor, what="nobody took its place")


def test_images_removed_by_hand(relume: Relume, app: App) -> None:
    app.write(f"{SNIPPET}\nserve()")
    relume.deploy(app.directory)
    relume.start(app.name)
    (checkpoint,) = relume.checkpoints(app.name)
    directory = relume.state / "checkpoints" / checkpoint["checkpoint_id"]
    shutil.rmtree(directory / "images")
    started = relume.start(app.name)
    assert not started["restored"]
    assert "restore failed" in started["reason"]
    shutil.rmtree(directory)
    until(lambda: [row["state"] for row in relume.checkpoints(app.name)] == ["ready"])
    for row in relume.checkpoints(app.name):
        shutil.rmtree(relume.state / "checkpoints" / row["checkpoint_id"])
    started = relume.start(app.name)
    assert not started["restored"]
    assert "no checkpoint" in started["reason"]


def test_app_that_ends_during_its_checkpoint(relume: Relume, app: App) -> None:
    app.write(
        f"""
{POST_IN_THREAD}
{BIG}
ready = threading.Event()
def ask():
    ready.wait()
    post()
threading.Thread(target=ask, daemon=True).start()
def go(_):
    ready.set()
    threading.Timer(0.15, os._exit, (7,)).start()
ACTIONS["go"] = go
serve()
"""
    )
    relume.deploy(app.directory)
    started = relume.start(app.name)
    with contextlib.suppress(OSError):  # a machine that stands still may let the timer win
        get(started, "/go")
    until(lambda: relume.ps(app.name)[0]["state"] == "exited")
    until(lambda: not making(relume))
    assert processes(relume, started["instance_id"]) == []


def test_app_killed_while_frozen(relume: Relume, app: App) -> None:
    """Wherever in the dump it comes, which mostly CRIU notices by itself and now and then not."""
    app.write(f"{POST_IN_THREAD}\n{BIG}\nACTIONS['go'] = lambda _: post()\nserve()")
    relume.deploy(app.directory)
    for patience in (0.0, 0.05, 0.1, 0.2):
        started = relume.start(app.name, "--no-restore")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asked = in_its_dump(relume, app, pool, started, "/go", lambda: written(relume))
            time.sleep(patience)
            for pid in processes(relume, started["instance_id"]):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):  # it may have had its answer on a fast disk
                asked.result()
        assert state_of_instance(relume, started) == "exited", "what waits for the app hung"
        until(lambda: not making(relume))
        for row in relume.checkpoints(app.name):
            relume.json("checkpoints", "rm", row["checkpoint_id"])
    assert not relume.start(app.name)["restored"]


def state_of_instance(relume: Relume, started: dict[str, object]) -> str:
    """Once it has ended."""
    rows = until(
        lambda: [
            row
            for row in relume.json("ps")
            if row["instance_id"] == started["instance_id"] and row["state"] != "ready"
        ]
    )
    return str(rows[0]["state"])


def test_worker_killed_while_frozen(relume: Relume, app: App) -> None:
    """The dump fails and says so; the others go on at once, and their connections are of use."""
    app.write(
        f"""
{POST_IN_THREAD}
import multiprocessing
def work():
    global ballast
    ballast = bytearray(os.urandom(1 << 20) * 300)
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    ready.set()
    time.sleep(600)
ready = multiprocessing.Event()
worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
worker.start()
ready.wait()
ACTIONS["go"] = lambda _: post()
serve()
"""
    )
    relume.deploy(app.directory)
    started = relume.start(app.name)
    worker = max(processes(relume, started["instance_id"]))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = in_its_dump(relume, app, pool, started, "/go", lambda: written(relume) and traced(worker))
        os.kill(worker, signal.SIGKILL)
        try:
            answer = asked.result(60)
        except OSError:
            # CRIU exits at once when it hears of the end first. The app runs again before anybody can take its
            # connections out of repair mode, and the reading of this one may have failed.
            answer = {"status": "failed", "reason": "engine", "message": "killed"}
    assert (answer["status"], answer["reason"]) == ("failed", "engine")
    assert "killed" in answer["message"], answer
    assert get(started, "/count")["hits"] == 1
    until(lambda: not making(relume))


def test_client_that_hangs_up_during_the_post(relume: Relume, app: App) -> None:
    app.write(
        f"""
{BIG}
def go(_):
    with socket.create_connection(("169.254.169.253", 8234)) as hasty:
        hasty.sendall(b"POST /checkpoint HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 0\\r\\n\\r\\n")
        time.sleep(0.1)
ACTIONS["go"] = go
serve()
"""
    )
    relume.deploy(app.directory)
    started = relume.start(app.name)
    get(started, "/go")
    until(lambda: [row["state"] for row in relume.checkpoints(app.name)] == ["ready"])
    get(started, "/count")
    assert relume.start(app.name)["restored"]


def test_a_reader_of_a_long_log_that_has_read_enough(relume: Relume, app: App) -> None:
    """`relume logs APP | head`: the node waits for its reader when that goes."""
    app.write("for _ in range(100_000): print('x' * 100)\nserve()")
    relume.deploy(app.directory)
    relume.start(app.name)
    with subprocess.Popen(
        [*MAIN, "logs", app.name], env=relume.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None and reader.stderr is not None
        assert reader.stdout.readline() == "x" * 100 + "\n"
        reader.stdout.close()
        assert reader.stderr.read() == ""
    assert len(relume.logs(app.name)) >= 10_000_000
    assert "Traceback" not in relume.log.read_text()


def test_a_deploy_whose_caller_goes_away_is_cancelled(relume: Relume, app: App) -> None:
    app.write("serve()")
    toml = app.directory / "cerebrium.toml"
    good = toml.read_text()
    toml.write_text(
        good.replace("[cerebrium.runtime", 'shell_commands = ["sleep 4711"]\n[cerebrium.runtime', 1)
    )
    temporary = relume.state / "builds" / "tmp"
    with subprocess.Popen(
        [*MAIN, "deploy", str(app.directory), "-y"], env=relume.env, stderr=subprocess.PIPE, text=True
    ) as command:
        assert command.stderr is not None
        for line in command.stderr:
            if "sleep 4711" in line:
                break
        until(lambda: list(temporary.iterdir()))
        command.kill()
    until(lambda: not list(temporary.iterdir()), what="the build goes on, and nobody can end it")
    toml.write_text(good)
    relume.deploy(app.directory)


def test_rubbish_at_the_sidecar(relume: Relume, app: App) -> None:
    app.write(
        """
def talk(request):
    with socket.create_connection(("169.254.169.253", 8234), timeout=30) as raw:
        raw.sendall(request.encode("latin-1").decode("unicode_escape").encode("latin-1"))
        return raw.recv(65536).decode("latin-1").split("\\r\\n")[0]
import urllib.parse
ACTIONS["talk"] = lambda text: talk(urllib.parse.unquote(text))
def many(_):
    import concurrent.futures, urllib.request
    def one(_):
        request = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST")
        return json.loads(urllib.request.urlopen(request, timeout=600).read())["status"]
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        return sorted(pool.map(one, range(200)))
ACTIONS["many"] = many
def large(_):
    with socket.create_connection(("169.254.169.253", 8234), timeout=30) as raw:
        head = b"POST /checkpoint HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 1073741824\\r\\n\\r\\n"
        raw.sendall(head + b"x" * 100000)
        return raw.recv(65536).decode("latin-1").split("\\r\\n")[0]
ACTIONS["large"] = large
serve()
"""
    )
    relume.deploy(app.directory)
    started = relume.start(app.name)

    def talk(text: str) -> str:
        quoted = (
            text.replace("\\", "%5C")
            .replace(" ", "%20")
            .replace("/", "%2F")
            .replace("\r", "")
            .replace("\n", "")
        )
        return str(get(started, f"/talk/{quoted}"))

    end = "\\r\\nHost: x\\r\\nContent-Length: 0\\r\\n\\r\\n"
    assert " 405 " in talk("GET /checkpoint HTTP/1.1" + end)
    assert " 405 " in talk("PUT /checkpoint HTTP/1.1" + end)
    assert " 404 " in talk("GET /../../etc/passwd HTTP/1.1" + end)
    assert " 400 " in talk("rubbish" + end)
    assert " 413 " in get(started, "/large")
    outcomes = get(started, "/many", timeout=120)
    assert len(outcomes) == 200
    assert outcomes.count("created") == 1
    assert set(outcomes) == {"created", "skipped"}
    get(started, "/count")


@pytest.mark.slow  # the watchdog's 30 s
def test_a_dump_that_hangs_is_given_up_and_connections_survive(relume: Relume, app: App) -> None:
    app.write(
        f"""
{POST_IN_THREAD}
import socket
{BIG}
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
peer, _ = listener.accept()
def echo():  # it waits in recv(2) while all is frozen
    while data := peer.recv(100):
        peer.sendall(data)
echoing = threading.Thread(target=echo, daemon=True)
echoing.start()
def talk(_):
    client.sendall(b"hello")
    return [client.recv(100).decode(), echoing.is_alive()]
ACTIONS["talk"] = talk
ACTIONS["go"] = lambda _: post()
serve()
"""
    )
    relume.deploy(app.directory)
    started = relume.start(app.name)
    assert get(started, "/talk") == ["hello", True]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = in_its_dump(relume, app, pool, started, "/go", lambda: written(relume))
        (criu,) = dumping(processes(relume, started["instance_id"]))
        os.kill(criu, signal.SIGSTOP)
        try:
            answer = asked.result(90)
        except OSError:
            answer = {"status": "failed", "message": "not done within"}  # its own connection, in repair mode
    assert answer["status"] == "failed"
    assert "not done within" in answer["message"], answer
    assert get(started, "/talk") == ["hello", True]
    until(lambda: not making(relume))
    until(lambda: exiting(criu))


def dumping(pids: list[int]) -> set[int]:
    """The processes that trace these."""
    return {tracer for pid in pids for tracer in proc.tracers(pid)}


def test_no_room_on_the_disk(second: Relume, app: App) -> None:
    app.write(f"{POST_IN_THREAD}\n{BIG}\nACTIONS['go'] = lambda _: post()\nserve()")
    checkpoints = second.state / "checkpoints"
    checkpoints.mkdir()
    mounts.mount("tmpfs", checkpoints, "tmpfs", 0, "size=100m")
    try:
        second.start_node()
        second.deploy(app.directory)
        started = second.start(app.name)
        answer = get(started, "/go")
        assert (answer["status"], answer["reason"]) == ("failed", "insufficient_disk")
        assert answer["needed_bytes"] > answer["free_bytes"]
        assert making(second) == []

        # Room at the first look, and none when it comes to writing.
        mounts.mount("tmpfs", checkpoints, "tmpfs", mounts.MS_REMOUNT, "size=700m")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asked = in_its_dump(second, app, pool, started, "/go", lambda: making(second))
            shrink_to_fit(checkpoints)
            answer = asked.result()
        assert (answer["status"], answer["reason"]) == ("failed", "insufficient_disk"), answer
        assert making(second) == []
        get(started, "/count")
        mounts.mount("tmpfs", checkpoints, "tmpfs", mounts.MS_REMOUNT, "size=700m")
        assert get(started, "/go")["status"] == "created"
    finally:
        second.stop(app.name)
        second.kill_node(signal.SIGTERM)
        mounts.unmount(checkpoints)


def test_proxy_variables_inside_do_not_reach_the_sidecar(relume: Relume, app: App) -> None:
    app.write(f"{SNIPPET}\nserve()")
    relume.deploy(app.directory)
    proxy = ["--env", "http_proxy=http://127.0.0.1:9", "--env", "HTTP_PROXY=http://127.0.0.1:9"]
    first = relume.start(app.name, *proxy)
    assert relume.answer_of_post(first["instance_id"])["status"] == "created"


def test_two_deploys_and_two_starts_at_once(relume: Relume, app: App) -> None:
    app.write(
        f"""
import uuid, pathlib
pathlib.Path("/persistent-storage", str(uuid.uuid4())).touch()
while len(os.listdir("/persistent-storage")) < 2:
    time.sleep(0.01)
{SNIPPET}
serve()
"""
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        builds = list(pool.map(lambda _: relume.deploy(app.directory)["build_id"], range(2)))
        assert builds[0] == builds[1]
        started = list(pool.map(lambda _: relume.start(app.name), range(2)))
    answers = sorted(
        (answer["status"], answer["reason"])
        for answer in (relume.answer_of_post(one["instance_id"]) for one in started)
    )
    assert answers[0] == ("created", None)
    assert answers[1][0] == "skipped"
    assert answers[1][1] in ("exists", "in_progress")


def test_bad_names(relume: Relume, app: App) -> None:
    app.write("serve()")
    file = app.directory / "cerebrium.toml"
    file.write_text(file.read_text().replace(f'"{app.name}"', '"../../etc"'))
    with pytest.raises(Failed) as refused:
        relume.deploy(app.directory)
    assert refused.value.error["code"] in ("config", "bad_request")
    with pytest.raises(Failed) as refused:
        relume.start("..")
    assert refused.value.error["code"] in ("bad_request", "not_found")
    with pytest.raises(Failed) as missing:
        relume.start("no-such-app")
    assert missing.value.error["code"] == "not_found"


def test_app_that_fails_at_start(relume: Relume, app: App) -> None:
    app.write("raise RuntimeError('no weights here')")
    relume.deploy(app.directory)
    with pytest.raises(Failed) as failed:
        relume.start(app.name)
    assert failed.value.error["code"] == "start_failed"
    assert "no weights here" in failed.value.error["log"]
    assert "status 1" in failed.value.error["message"]
    assert "no weights here" in relume.logs(app.name)


def test_no_node(workplace: Path) -> None:
    lonely = Relume(workplace / "nobody")
    done = lonely.run("ps", check=False)
    assert done.returncode == 3
    assert "relume node run" in done.stderr


def test_a_stopped_child_does_not_hang_the_dump(relume: Relume, app: App) -> None:
    app.write(
        f"""
import subprocess
child = subprocess.Popen(["sleep", "1000"])
os.kill(child.pid, 19)
time.sleep(0.2)
{SNIPPET}
serve()
"""
    )
    relume.deploy(app.directory)
    first = relume.start(app.name)
    assert relume.answer_of_post(first["instance_id"])["status"] == "created"
    copy = relume.start(app.name)
    assert copy["restored"], copy["reason"]


def test_knocking_at_the_port_during_the_dump(relume: Relume, app: App) -> None:
    app.write(
        f"""
{BIG}
threading.Thread(target=serve, daemon=True).start()
time.sleep(0.5)
silent = socket.create_server(("0.0.0.0", 8001))
knock = [socket.create_connection(("127.0.0.1", 8001)) for _ in range(3)]
{SNIPPET}
threading.Event().wait()
"""
    )
    relume.deploy(app.directory)
    first = relume.start(app.name)
    until(lambda: '{"status"' in relume.logs(first["instance_id"]))
    assert relume.answer_of_post(first["instance_id"])["status"] == "created"
    assert relume.start(app.name)["restored"]


# What a container can have and no engine can save: each function takes it up and returns how to let go of it.
# What seccomp and the capabilities keep from it (rings, BPF, perf, namespaces of its own) is in test_inside.py.
HOLDERS = """
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(*arguments)
    assert result >= 0, (arguments, os.strerror(ctypes.get_errno()))
    return result
def closing(descriptor):
    return lambda: os.close(descriptor)
def secret_memory():
    descriptor = call(447, 0)
    os.ftruncate(descriptor, 4096)
    mapped = mmap.mmap(descriptor, 4096)
    os.close(descriptor)
    return mapped.close
def message_queue():
    return closing(call(240, b"jobs", 0o102, 0o600, None))
def landlock():
    return closing(call(444, __import__("struct").pack("Q", 1), 8, 0))
def virtual_socket():
    return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close
def thread_by_pidfd():
    return closing(call(434, os.getpid(), os.O_EXCL))
def traced_child():  # by a thread: the kernel names that, and the answer its process
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    assert libc.ptrace(0x4206, child, 0, 0) == 0
    return lambda: (os.kill(child, 9), os.waitpid(child, 0))
def shell_at_a_terminal():
    child, terminal = __import__("pty").fork()
    if child == 0:
        os.execvp("sh", ["sh", "-i"])
    def opened():
        try:
            return "/dev/tty" in [os.readlink(f"/proc/{child}/fd/{fd}") for fd in os.listdir(f"/proc/{child}/fd")]
        except OSError:  # it closes others meanwhile
            return False
    while not opened():
        time.sleep(0.01)
    return lambda: (os.kill(child, 9), os.waitpid(child, 0), os.close(terminal))
def large_file():
    file = open("/large", "wb")
    os.posix_fallocate(file.fileno(), 0, 3_000_000)
    return file.close
def large_deleted_file():
    file = open("/deleted", "wb")
    os.posix_fallocate(file.fileno(), 0, 1100 << 20)
    os.unlink("/deleted")
    return file.close
"""

UNSUPPORTED = {
    "secret_memory": ("python3", "holds memory from memfd_secret"),
    "message_queue": ("python3", "holds the POSIX message queue /jobs"),
    "landlock": ("python3", "holds a Landlock rule set"),
    "virtual_socket": ("python3", "holds a socket of the protocol AF_VSOCK"),
    "thread_by_pidfd": ("python3", "holds a pidfd of a thread"),
    "traced_child": ("python3", "is traced by python3 (pid 1)"),
    "shell_at_a_terminal": ("sh", "holds /dev/tty, the terminal that controls its session"),
    "large_file": (
        "python3",
        "holds /large (open), 3",
    ),
    "large_deleted_file": ("python3", "holds the deleted file /deleted of 1153"),
}


def test_unsupported_is_named_and_the_app_never_stopped(relume: Relume, app: App) -> None:
    app.write(
        f"""
{HOLDERS}
{POST_IN_THREAD}
def go(kind):
    release = globals()[kind]()
    longest, over = [0.0], threading.Event()
    def watch():
        last = time.monotonic()
        while not over.is_set():
            time.sleep(0.001)
            now = time.monotonic()
            longest[0], last = max(longest[0], now - last), now
    watcher = threading.Thread(target=watch)
    watcher.start()
    answer = post()
    over.set()
    watcher.join()
    release()
    return dict(answer, longest_pause_s=longest[0])
ACTIONS["go"] = go
serve()
""",
        extra="[relume.checkpoint]\nmax_held_file_bytes = 2000000\n",
    )
    relume.deploy(app.directory)
    started = relume.start(app.name)
    for kind, (process, what) in UNSUPPORTED.items():
        # Other processes take the processors away too, so the best of some tries is what relume does.
        deadline = time.monotonic() + 60
        while True:
            answer = get(started, f"/go/{kind}")
            assert (answer["status"], answer["reason"]) == ("failed", "unsupported"), (kind, answer)
            (culprit,) = answer["unsupported"]
            assert culprit["process"] == process and culprit["pid"] >= 1 and culprit["hint"], (kind, culprit)
            assert culprit["what"].startswith(what), (kind, culprit)
            assert answer["message"] == f"{process} (pid {culprit['pid']}): {culprit['what']}"
            if answer["longest_pause_s"] < 0.05:
                break
            assert time.monotonic() < deadline, (kind, answer["longest_pause_s"])
    assert relume.checkpoints(app.name) == []
