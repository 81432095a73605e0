"""The one path: deploy, a cold start that asks for a checkpoint, warm starts from it."""

from __future__ import annotations

import contextlib
import time
import urllib.error

import pytest

from harness import SNIPPET, App, Failed, Relume, get, until

FIRST_LINE = "CEREBRIUM_RESTORED: container restored from checkpoint"

# GET /post of the app makes the request, and is answered with its answer.
POST = """
import urllib.request
def post(_):
    request = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST")
    return json.loads(urllib.request.urlopen(request, timeout=600).read())
ACTIONS["post"] = post
"""


def test_second_and_third_start_are_warm(relume: Relume, app: App) -> None:
    app.write(
        f"""
ballast = bytearray(os.urandom(1 << 20) * 48)
digest = __import__("hashlib").sha256(ballast).hexdigest()
ACTIONS["digest"] = lambda _: [digest, __import__("hashlib").sha256(ballast).hexdigest()]
time.sleep(1)
{SNIPPET}
serve()
"""
    )
    deployed = relume.deploy(app.directory)
    first = relume.start(app.name)
    assert not first["restored"]
    assert first["build_id"] == deployed["build_id"]
    answer = relume.answer_of_post(first["instance_id"])
    assert answer["status"] == "created"
    assert answer["reason"] is None
    assert answer["size_bytes"] > 48 << 20
    assert answer["frozen_ms"] > 0
    assert get(first, "/count")["hits"] == 1
    boot = get(first)["boot"]

    for _ in range(2):
        copy = relume.start(app.name)
        assert copy["restored"]
        assert copy["checkpoint_id"] == answer["checkpoint_id"]
        assert copy["reason"] is None
        lines = relume.logs(copy["instance_id"]).splitlines()
        assert lines[0] == FIRST_LINE
        assert "RESTORED" in lines[1:]
        assert get(copy)["boot"] == boot, "it has the memory of the original"
        assert get(copy, "/count")["hits"] == 1, "and nothing of what the original did since"
        assert len(set(get(copy, "/digest") + get(first, "/digest"))) == 1
        status = get(copy, "/status")
        assert status["restored"]
        assert status["restore_id"] == copy["instance_id"]
    assert get(first, "/count")["hits"] == 2, "the original goes on"
    assert [row["state"] for row in relume.checkpoints(app.name)] == ["ready"]


def test_environment_hostname_and_clock_of_a_copy(relume: Relume, app: App) -> None:
    app.write(f"{SNIPPET}\nserve()")
    relume.deploy(app.directory)
    relume.run("secrets", "set", app.name, "TOKEN=old")
    first = relume.start(app.name, "--env", "COLOUR=red")
    assert get(first, "/facts")["env"]["COLOUR"] == "red"
    relume.run("secrets", "set", app.name, "TOKEN=new")
    copy = relume.start(app.name, "--env", "COLOUR=blue")
    facts = get(copy, "/facts")
    assert copy["restored"]
    assert facts["env"]["COLOUR"] == "red", "memory is memory: os.environ is the old one"
    assert facts["env"]["TOKEN"] == "old"
    fresh = get(copy, "/env")
    assert (fresh["COLOUR"], fresh["TOKEN"]) == ("blue", "new")
    assert facts["host"] == app.name
    assert abs(facts["now"] - time.time()) < 5
    assert "169.254.169.253" in fresh["NO_PROXY"]
    assert "169.254.169.253" not in facts["resolv"]
    for path in relume.state.rglob("build*.json"):
        assert "old" not in path.read_text().split('"TOKEN"')[-1][:10] or "TOKEN" not in path.read_text()


def test_files_written_before_are_not_there_unless_held(relume: Relume, app: App) -> None:
    app.write(
        f"""
open("/tmp/left", "w").write("x")
os.makedirs("/run/made/at-start", 0o750); open("/run/made/pid", "w").write("1")
held = open("/tmp/held", "w+"); held.write("held"); held.flush()
ACTIONS["held"] = lambda _: (held.seek(0), held.read())[1]
ACTIONS["later"] = lambda _: open("/run/made/at-start/later", "w").write("a directory is there")
{SNIPPET}
serve()
"""
    )
    relume.deploy(app.directory)
    first = relume.start(app.name)
    assert get(first, "/exists/tmp/left") is True
    left = relume.answer_of_post(first["instance_id"])["left_behind"]
    assert "/tmp/left" in left["names"]
    assert "filesystem" in left["hint"]
    copy = relume.start(app.name)
    assert copy["restored"]
    assert get(copy, "/exists/tmp/left") is False
    assert get(copy, "/exists/run/made/pid") is False
    assert get(copy, "/held") == "held"
    assert get(copy, "/later") > 0, "programs make their directories once, at the start"


def test_a_tree_that_is_thousands_of_levels_deep(relume: Relume, app: App) -> None:
    app.write(
        f"""
for _ in range(3000):
    os.mkdir("/srv/new"); os.path.exists("/srv/deep") and os.rename("/srv/deep", "/srv/new/below")
    os.rename("/srv/new", "/srv/deep")
{SNIPPET}
serve()
"""
    )
    relume.deploy(app.directory)
    first = relume.start(app.name)
    made = relume.answer_of_post(first["instance_id"])
    assert made["status"] == "created", made
    copy = relume.start(app.name)
    assert copy["restored"]
    assert get(copy, "/exists/srv/deep/below/below") is True
    relume.stop(app.name)
    for instance in (first, copy):
        assert not (relume.state / "instances" / instance["instance_id"] / "layer").exists()


def test_filesystem_all_brings_the_layer_along(relume: Relume, app: App) -> None:
    app.write(
        f"""
open("/tmp/left", "w").write("x"); os.makedirs("/srv/data/deep"); open("/srv/data/deep/f", "w").write("y")
unnamed = open("/unnamed", "w+"); os.unlink("/unnamed"); unnamed.write("z"); unnamed.flush()
def at_the_root(_):
    os.mkdir("/made-later"); open("/new", "w").close(); os.rename("/new", "/newer"); os.unlink("/newer")
    return [os.stat("/").st_uid, os.stat("/made-later").st_uid, os.pread(unnamed.fileno(), 9, 0).decode()]
ACTIONS["root"] = at_the_root
{SNIPPET}
serve()
""",
        extra='[relume.checkpoint]\nfilesystem = "all"\n',
    )
    relume.deploy(app.directory)
    relume.start(app.name)
    copies = [relume.start(app.name) for _ in range(2)]
    for copy in copies:
        assert copy["restored"]
        assert get(copy, "/exists/tmp/left") is True
        assert get(copy, "/exists/srv/data/deep/f") is True
        assert get(copy, "/root") == [0, 0, "z"], "the root of the file system is the app's, as it was"


def test_filesystem_all_and_a_mapping_of_a_file_that_is_written_later(relume: Relume, app: App) -> None:
    """In a copy as in the original: the file of the mapping is the file that is written, by all its names."""
    app.write(
        f"""
import mmap, subprocess
os.makedirs("/srv/data")
for name in ("table", "left"):
    open("/srv/data/" + name, "wb").write(b"before")
os.link("/srv/data/table", "/srv/same")
with open("/srv/data/table", "rb") as file:
    table = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
WRITE = "file = open('/srv/data/table', 'r+b'); file.write(b'later!')"
ACTIONS["seen"] = lambda _: [table[:].decode(), open("/srv/same").read(), open("/srv/data/left").read()]
ACTIONS["write"] = lambda _: subprocess.run(["python3", "-c", WRITE], check=True).returncode
{SNIPPET}
serve()
""",
        extra='[relume.checkpoint]\nfilesystem = "all"\n',
    )
    relume.deploy(app.directory)
    first = relume.start(app.name)
    copies = [relume.start(app.name) for _ in range(2)]
    for each in (*copies, first):
        assert each is first or each["restored"], each["reason"]
        assert get(each, "/seen") == ["before", "before", "before"]
        get(each, "/write")
        assert get(each, "/seen") == ["later!", "later!", "before"]


def test_checkpointing_off_and_redeploys(relume: Relume, app: App) -> None:
    app.write(f"{SNIPPET}\nserve()")
    build = relume.deploy(app.directory)["build_id"]
    relume.start(app.name)
    assert relume.start(app.name)["restored"]
    assert relume.deploy(app.directory)["build_id"] == build, "the same inputs are the same build"

    app.write(f"VERSION = 2\n{SNIPPET}\nserve()")
    changed = relume.deploy(app.directory)["build_id"]
    assert changed != build
    fresh = relume.start(app.name)
    assert not fresh["restored"]
    assert relume.answer_of_post(fresh["instance_id"])["status"] == "created"

    app.write("serve()")
    relume.deploy(app.directory)
    relume.start(app.name)
    assert not relume.start(app.name)["restored"], "no POST any more, no restore any more"

    app.write(f"{SNIPPET}\nserve()", checkpointing=False)
    relume.deploy(app.directory)
    off = relume.start(app.name)
    answer = relume.answer_of_post(off["instance_id"])
    assert (answer["status"], answer["reason"]) == ("skipped", "disabled")
    assert not relume.start(app.name)["restored"]


def test_skip_reasons(relume: Relume, app: App) -> None:
    app.write(
        f"""
{POST}
{SNIPPET}
serve()
"""
    )
    relume.deploy(app.directory)
    first = relume.start(app.name)
    again = get(first, "/post")
    assert (again["status"], again["reason"]) == ("skipped", "exists")
    assert again["checkpoint_id"] == relume.answer_of_post(first["instance_id"])["checkpoint_id"]
    cold = relume.start(app.name, "--no-restore")
    assert not cold["restored"]
    assert relume.answer_of_post(cold["instance_id"])["reason"] == "exists"
    copy = relume.start(app.name)
    assert get(copy, "/post")["reason"] == "restored"


def test_trigger_ready(relume: Relume, app: App) -> None:
    app.write("serve()", extra='[relume.checkpoint]\ntrigger = "ready"\n')
    relume.deploy(app.directory)
    first = relume.start(app.name)
    get(first, "/count")
    until(lambda: [row for row in relume.checkpoints(app.name) if row["state"] == "ready"])
    until(lambda: '"status": "created"' in relume.logs(first["instance_id"]))
    assert relume.start(app.name)["restored"]


def test_a_readiness_that_flaps(relume: Relume, app: App) -> None:
    """Ready once is ready: one checkpoint, at the first success; a copy that wakes up unready is waited for."""
    app.write(
        """
asked = []
def ready(_):
    asked.append(time.time())
    if len(asked) % 3:
        raise RuntimeError("not now")
    return asked
ACTIONS["ready"] = ready
serve()
""",
        ready="/ready",
        extra='[relume.checkpoint]\ntrigger = "ready"\n',
    )
    relume.deploy(app.directory)
    first = relume.start(app.name)
    until(lambda: '"status": "created"' in relume.logs(first["instance_id"]))
    for _ in range(4):  # whoever asks meets both answers; neither the node nor the instance minds
        with contextlib.suppress(urllib.error.HTTPError):
            get(first, "/ready")
    copies = [relume.start(app.name) for _ in range(2)]
    for copy in copies:
        assert copy["restored"], copy["reason"]
    assert [row["state"] for row in relume.ps(app.name)] == ["ready"] * 3
    assert len(relume.checkpoints(app.name)) == 1
    assert relume.logs(first["instance_id"]).count('"status"') == 1


def test_explain_says_whether_how_large_and_how_long(relume: Relume, app: App) -> None:
    app.write(
        f"""
ballast = bytearray(b"x" * (100 << 20))
file = open("/held", "wb"); file.write(bytes(range(256)) * (20 << 12)); file.flush()
def hold(_):
    global secret
    secret = __import__("ctypes").CDLL(None).syscall(447, 0)  # memfd_secret
    return secret
ACTIONS["hold"] = hold
{POST}
serve()
"""
    )
    relume.deploy(app.directory)
    started = relume.start(app.name)
    told = relume.json("checkpoints", "explain", started["instance_id"])
    assert (told["would_work"], told["skipped"], told["problem"], told["processes"]) == (True, None, None, 1)
    assert 100 << 20 < told["memory_bytes"] < 150 << 20
    assert told["held_bytes"] == 20 << 20
    assert 0.1 < told["frozen_s"] < 60
    made = get(started, "/post")
    assert made["status"] == "created"
    assert made["left_behind"]["count"] == 0, "what the runtime put there is not the app's"
    expected = told["memory_bytes"] + told["held_bytes"]
    assert 0.8 * made["size_bytes"] < expected < 1.2 * made["size_bytes"]
    assert relume.json("checkpoints", "explain", started["instance_id"])["skipped"] == "exists"

    get(started, "/hold")
    told = relume.json("checkpoints", "explain", started["instance_id"])
    assert not told["would_work"]
    assert told["problem"]["unsupported"][0]["what"] == "holds memory from memfd_secret"
    relume.stop(started["instance_id"])
    with pytest.raises(Failed, match="relume ps"):
        relume.json("checkpoints", "explain", started["instance_id"])


def test_stop_and_remove_leave_nothing(relume: Relume, app: App) -> None:
    app.write(f"{SNIPPET}\nserve()")
    relume.deploy(app.directory)
    started = [relume.start(app.name) for _ in range(3)]
    relume.run("stop", started[1]["instance_id"])
    states = {row["instance_id"]: row["state"] for row in relume.ps(app.name)}
    assert states[started[1]["instance_id"]] == "exited"
    assert get(started[0])["boot"] == get(started[2])["boot"]
    relume.run("apps", "rm", app.name)
    assert relume.ps(app.name) == []
    assert relume.checkpoints(app.name) == []
