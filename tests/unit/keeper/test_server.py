"""Keeper and client together over their real socket; only the engine is a fake, whose container is `sleep`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relume.engine.jobs import Container, DumpJob, DumpResult
from relume.errors import EngineError, HostError
from relume.keeper import instance as instance_module
from relume.keeper import probe
from relume.keeper import server as server_module
from relume.keeper.client import Keeper, KeeperLost
from relume.keeper.instance import Assignment
from relume.keeper.server import Server
from relume.keeper.wire import LINE_LIMIT


class FakeEngine:
    """Boots a `sleep`; its network is this process's own. ``gate`` holds a dump back until it is set."""

    newest: FakeEngine

    def __init__(
        self,
        container: Container,
        *,
        sink: Callable[[bytes, str], None],
        on_network: Callable[..., Awaitable[None]],
        pager: object = None,
    ) -> None:
        self._on_network = on_network
        self._child: asyncio.subprocess.Process | None = None
        self.sink = sink
        self.pid = 0
        self.network: Any = None
        self.pager = None
        self.owner = 0
        self.timeline: dict[str, float] = {"network": 1.0}
        self.gate = asyncio.Event()
        self.sidecar_port = 0
        self.boot_error = ""
        FakeEngine.newest = self

    async def boot(self) -> int:
        if self.boot_error:
            raise EngineError(self.boot_error, hint="look there")
        self.network = SimpleNamespace(inside=SimpleNamespace(run=lambda work: work()))
        listener = socket.create_server(("127.0.0.1", 0))
        self.sidecar_port = listener.getsockname()[1]
        await self._on_network(listener)
        self._child = await asyncio.create_subprocess_exec("sleep", "60")
        self.pid = self._child.pid
        return self.pid

    async def dump(self, job: DumpJob) -> DumpResult:
        await self.gate.wait()
        return DumpResult(job.dump_id, seconds=1.5, held={"files": 1})

    async def ended(self) -> int:
        assert self._child is not None
        code = await self._child.wait()
        return code if code >= 0 else 128 - code

    async def close(self) -> None:
        self.network = None

    async def drop_pager(self) -> None:
        pass

    async def kill(self) -> None:
        if self._child is not None and self._child.returncode is None:
            self._child.kill()


@dataclasses.dataclass(slots=True)
class Bench:
    """One keeper served in this process, and the nodes that came to it."""

    directory: Path
    container: Container
    running: asyncio.Task[None]
    nodes: list[tuple[Keeper, list[dict[str, Any]]]] = dataclasses.field(default_factory=list)
    app_port: int = 0

    @property
    def engine(self) -> FakeEngine:
        return FakeEngine.newest

    async def node(self) -> tuple[Keeper, list[dict[str, Any]], dict[str, Any]]:
        """A node that connects: (its client, the events it hears, what hello told)."""
        heard: list[dict[str, Any]] = []
        keeper = Keeper(self.container, heard.append)
        facts = await keeper.connect()
        self.nodes.append((keeper, heard))
        return keeper, heard, facts

    def assignment(self, **more: Any) -> Assignment:
        content: dict[str, Any] = {
            "app": "a",
            "build_id": "b",
            "checkpointing": True,
            "restored": False,
            "checkpoint_id": None,
            "environment": {"TOKEN": "t"},
            "port": self.app_port,
            "readycheck": "",
            "log": str(self.directory / "log"),
            "log_limit": 1 << 20,
            "exit_file": str(self.directory / "exit.json"),
            "id_base": 524288,
            "first_line": "first",
        }
        return Assignment(**(content | more))

    async def ask(self, request: str) -> tuple[int, Any]:
        """(status, body) of a request that the app makes of its sidecar."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.engine.sidecar_port)
        writer.write(f"{request} HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), json.loads(body)


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what the other side brings about; 5 s at most."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to be")


def events(heard: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in heard]


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    async def app(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    monkeypatch.setattr(instance_module, "Criu", FakeEngine)
    monkeypatch.setattr(server_module, "_GRACE", 0.3)
    monkeypatch.setattr(instance_module, "_END_PATIENCE", 0.3)
    monkeypatch.setattr(server_module, "_LOOK_AROUND", 0.1)
    container = Container("i-1", str(tmp_path), "/bin/runc", "/r", "/c", "/relume/n/i-1", outgoing=False)
    served = await asyncio.start_server(app, "127.0.0.1", 0)
    server = Server(container, tmp_path / "keeper.sock")
    bench = Bench(tmp_path, container, asyncio.create_task(server.run()))
    bench.app_port = served.sockets[0].getsockname()[1]
    yield bench
    await bench.engine.kill()
    for keeper, _ in bench.nodes:
        await keeper.close()
    try:
        async with asyncio.timeout(5):
            await bench.running
    finally:
        # What the end of the process does for a keeper that goes before its instance ends.
        instance = server._instance
        for task in instance._tasks | server._tasks:
            task.cancel()
        await instance.published.close()
        await instance._sidecar.close()
        served.close()
        await asyncio.sleep(0.02)


async def test_from_spare_to_ready(bench: Bench) -> None:
    node, heard, facts = await bench.node()
    assert (facts["phase"], facts["port"], facts["exit_code"]) == ("spare", 0, None)
    assert (bench.directory / "keeper.sock").stat().st_mode & 0o777 == 0o600
    port = await node.assign(bench.assignment())
    assert (await node.boot())["pid"] == bench.engine.pid
    await until(lambda: "ready" in events(heard))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await reader.read() == b"hello"
    writer.close()
    await until(lambda: "first_answer" in events(heard))
    bench.engine.sink(b"printed\n", "out")
    await node.note("noted")
    assert (bench.directory / "log").read_bytes() == b"first\nprinted\nnoted\n"
    assert await bench.ask("GET /env") == (200, {"TOKEN": "t"})
    assert (await bench.ask("GET /status"))[1]["instance_id"] == "i-1"


async def test_a_second_app_is_refused(bench: Bench) -> None:
    node, _, _ = await bench.node()
    await node.assign(bench.assignment())
    with pytest.raises(EngineError, match="already has an app"):
        await node.assign(bench.assignment())
    await node.end()


async def test_an_operation_that_is_none(bench: Bench) -> None:
    node, _, _ = await bench.node()
    with pytest.raises(EngineError):
        await node.ask("dance")
    with pytest.raises(EngineError):
        await node.ask("assign")  # and nothing to assign
    assert (await node.ask("hello"))["phase"] == "spare"


async def test_a_boot_that_fails(bench: Bench) -> None:
    """In the engine's own words, with its hint; the keeper goes when the node does."""
    node, heard, _ = await bench.node()
    await node.assign(bench.assignment())
    bench.engine.boot_error = "runc: no such rootfs"
    with pytest.raises(EngineError, match="no such rootfs") as failed:
        await node.boot()
    assert failed.value.hint == "look there"
    await until(lambda: "failed" in events(heard))


async def test_a_request_outlives_the_node(bench: Bench) -> None:
    """The node dies while the app waits for its answer; the next one finds the request and answers it."""
    first, heard, _ = await bench.node()
    await first.assign(bench.assignment())
    await first.boot()
    asking = asyncio.create_task(bench.ask("POST /checkpoint"))
    await until(lambda: "request" in events(heard))
    await first.close()
    await asyncio.sleep(0.05)
    assert not asking.done()
    second, _, facts = await bench.node()
    assert facts["requests"] == [1]
    await second.answer(1, 200, {"status": "created"})
    assert await asking == (200, {"status": "created"})
    await second.answer(1, 200, {})  # twice is no error: the first may have been lost with its node
    assert (await second.ask("hello"))["requests"] == []


async def test_a_dump_outlives_the_node(bench: Bench) -> None:
    first, _, _ = await bench.node()
    port = await first.assign(bench.assignment())
    await first.boot()
    job = DumpJob("d1", "/i", "/w", "/h", "/u", 1, "", 1, False, 10.0)
    dumping = asyncio.create_task(first.dump(job))
    await asyncio.sleep(0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with pytest.raises(TimeoutError):  # nobody is dialled while it is frozen
        async with asyncio.timeout(0.1):
            await reader.read()
    await first.close()
    dumping.cancel()
    second, _, facts = await bench.node()
    assert facts["dump"] == {"dump_id": "d1", "requests": [], "running": True}
    waiting = asyncio.create_task(second.dumped("d1"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    bench.engine.gate.set()
    assert await waiting == DumpResult("d1", seconds=1.5, held={"files": 1})
    assert await second.dumped("d2") is None
    writer.close()


async def test_the_end(bench: Bench) -> None:
    """The status is on disk before anybody is told, and the keeper goes when it has told."""
    node, heard, _ = await bench.node()
    await node.assign(bench.assignment())
    await node.boot()
    await node.signal(signal.SIGKILL)
    await until(lambda: "exit" in events(heard))
    assert json.loads((bench.directory / "exit.json").read_text())["exit_code"] == 137
    async with asyncio.timeout(5):
        await bench.running
        await node.lost.wait()
    with pytest.raises(KeeperLost):
        await node.note("too late")


async def test_an_end_on_a_full_disk(bench: Bench) -> None:
    """It is told, and written as soon as there is room: until then the keeper stays."""
    place = bench.directory / "full"
    place.touch()  # what is no folder, for now
    node, heard, _ = await bench.node()
    await node.assign(bench.assignment(exit_file=str(place / "exit.json")))
    await node.boot()
    await bench.engine.kill()
    await until(lambda: "exit" in events(heard))
    await node.close()
    await asyncio.sleep(0.6)
    node, _, facts = await bench.node()
    assert (facts["phase"], facts["exit_code"]) == ("exited", 137)
    place.unlink()
    place.mkdir()
    async with asyncio.timeout(5):
        await bench.running
    assert json.loads((place / "exit.json").read_text())["exit_code"] == 137


async def test_an_end_that_nobody_will_ever_read(bench: Bench) -> None:
    """The folder of the state is gone: the keeper goes too."""
    node, _, _ = await bench.node()
    await node.assign(bench.assignment(exit_file=str(bench.directory / "gone" / "exit.json")))
    await node.boot()
    await node.close()
    await bench.engine.kill()
    async with asyncio.timeout(5):
        await bench.running


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, HostError), (errno.EACCES, EngineError)])
async def test_what_the_machine_lacks_is_told_as_that(
    bench: Bench, number: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full /run says nothing about the checkpoint that was to be restored."""
    node, _, _ = await bench.node()
    await node.assign(bench.assignment())

    async def boot() -> int:
        raise OSError(number, "no", "/run/criu.conf")

    monkeypatch.setattr(bench.engine, "boot", boot)
    with pytest.raises(kind, match=r"/run/criu\.conf"):
        await node.boot()


async def test_an_end_that_no_node_saw(bench: Bench) -> None:
    node, _, _ = await bench.node()
    await node.assign(bench.assignment())
    await node.boot()
    await node.close()
    await bench.engine.kill()
    async with asyncio.timeout(5):
        await bench.running
    assert json.loads((bench.directory / "exit.json").read_text())["exit_code"] == 137


async def test_an_instance_does_not_notice_nodes_that_come_and_go(bench: Bench) -> None:
    node, heard, _ = await bench.node()
    await node.assign(bench.assignment())
    await node.boot()
    await until(lambda: "ready" in events(heard))
    for _ in range(3):
        node, _, facts = await bench.node()
        assert facts["phase"] == "ready"
        await node.close()
    await asyncio.sleep(0.05)
    assert not bench.running.done()


@pytest.mark.parametrize(
    "nonsense", [b"\n", b"[]\n", b"{\n", b"\xff\xfe\n", b'{"op": "hello"', b"x" * (LINE_LIMIT + 1)]
)
async def test_nonsense_ends_that_connection_only(bench: Bench, nonsense: bytes) -> None:
    node, _, _ = await bench.node()
    await node.assign(bench.assignment())
    await node.boot()
    reader, writer = await asyncio.open_unix_connection(bench.directory / "keeper.sock")
    writer.write(nonsense)
    writer.write_eof()
    async with asyncio.timeout(5):
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            pass
    writer.close()
    assert (await node.ask("hello"))["pid"] == bench.engine.pid


async def test_a_spare_goes_with_its_node(bench: Bench) -> None:
    node, _, _ = await bench.node()
    await node.close()
    async with asyncio.timeout(5):
        await bench.running


async def test_a_spare_that_nobody_fetches_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node was killed between starting it and connecting to it."""
    monkeypatch.setattr(instance_module, "Criu", FakeEngine)
    monkeypatch.setattr(server_module, "_GRACE", 0.1)
    monkeypatch.setattr(server_module, "_LOOK_AROUND", 0.1)
    container = Container("i-1", str(tmp_path), "/bin/runc", "/r", "/c", "/relume/n/i-1", outgoing=False)
    async with asyncio.timeout(5):
        await Server(container, tmp_path / "keeper.sock").run()


async def test_a_lost_keeper_fails_who_waits(bench: Bench) -> None:
    node, _, _ = await bench.node()
    await node.assign(bench.assignment())
    await node.boot()
    job = DumpJob("d1", "/i", "/w", "/h", "/u", 1, "", 1, False, 10.0)
    dumping = asyncio.create_task(node.dump(job))
    await asyncio.sleep(0.05)
    await node.end()
    with pytest.raises(KeeperLost):
        await dumping
    assert node.lost.is_set()
    bench.engine.gate.set()


async def test_a_fault_of_the_node_does_not_make_it_deaf(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    node, _, _ = await bench.node()
    heard: list[str] = []

    def faulty(event: dict[str, Any]) -> None:
        heard.append(event["event"])
        raise KeyError("a bug")

    node.on_event = faulty
    await node.assign(bench.assignment())
    await node.boot()
    await until(lambda: "ready" in heard)
    assert (await node.ask("hello"))["phase"] == "ready"
    assert "a bug" in caplog.text


async def test_a_keeper_that_never_listens(tmp_path: Path) -> None:
    container = Container("i-1", str(tmp_path), "/bin/runc", "/r", "/c", "/relume/n/i-1", outgoing=False)
    with pytest.raises(KeeperLost) as lost:
        await Keeper(container, lambda event: None).connect(patience=0.05)
    assert "keeper.log" in lost.value.hint


async def test_a_keeper_that_cannot_be_looked_for_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(asyncio, "open_unix_connection", connect)
    container = Container("i-1", str(tmp_path), "/bin/runc", "/r", "/c", "/relume/n/i-1", outgoing=False)
    with pytest.raises(OSError, match="Too many"):
        await Keeper(container, lambda event: None).connect(patience=0.05)


async def test_what_the_caller_gave_is_told_to_a_node_that_adopts(bench: Bench) -> None:
    node, _, _ = await bench.node()
    await node.assign(bench.assignment(environment={"TOKEN": "t", "A": "1"}, given={"A": "1"}))
    _, _, facts = await bench.node()
    assert facts["given"] == {"A": "1"}


async def test_an_app_whose_queue_is_full_does_not_hold_a_dump_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection to it waits for two minutes, and no probe may go on while it is frozen."""
    monkeypatch.setattr(probe, "PATIENCE", 0.2)
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):  # listen(2) keeps one more than it is told
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        node, _, _ = await bench.node()
        await node.assign(bench.assignment(port=listener.getsockname()[1]))
        before = len(list(Path("/proc/self/fd").iterdir()))
        await node.boot()
        bench.engine.gate.set()
        await asyncio.sleep(0.05)  # it probes
        async with asyncio.timeout(5):
            await node.dump(DumpJob("d1", "/i", "/w", "/h", "/u", 1, "", 1, False, 10.0))
        await asyncio.sleep(1)
        after = len(list(Path("/proc/self/fd").iterdir()))
    assert after <= before + 3, (
        "the sidecar's listener, the container, one probe: each that was given up is closed"
    )
