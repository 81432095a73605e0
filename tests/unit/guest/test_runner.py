"""The runner as containers run it: a process of its own, an app's ``main.py``, and real requests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relume import guest

APP = """
    import asyncio
    import json
    import threading
    import time
    from collections import OrderedDict
    from dataclasses import dataclass
    from os.path import join

    from pydantic import BaseModel, field_serializer, field_validator

    print("loading", flush=False)
    COUNT = {"calls": 0}
    RUNNING = {"now": 0, "most": 0}
    CLOSED = []

    class Item(BaseModel):
        name: str
        price: float = 1.0

    def predict(prompt: str, n: int = 1):
        COUNT["calls"] += 1
        return {"text": prompt * n, "calls": COUNT["calls"]}

    async def later(x):
        await asyncio.sleep(0)
        return {"x": x, "thread": threading.current_thread() is threading.main_thread()}

    def thread():
        return threading.current_thread() is threading.main_thread()

    def item(item: Item, others: list[Item] | None = None):
        assert isinstance(item, Item)
        return {"name": item.name, "price": item.price, "others": len(others or [])}

    def model():
        return {"items": [Item(name="a")]}

    def anything(**kwargs):
        return kwargs

    def only_positional(a, /, b):
        return [a, b]

    def only_positional_defaults(a=1, b=2, /):
        return [a, b]

    class Unshowable:
        def __repr__(self):
            raise RuntimeError("secret")

    def keyed(p, key="sk-secret", model: Unshowable = Unshowable(), n: int | None = None, x: float = 0.5):
        return key

    def my_run(run_id):
        return run_id

    def teapot():
        return {"status_code": 418, "short": True}

    def bare(status_code: int):
        return {"status_code": status_code}

    def echo(text):
        return {"text": text}

    def cancels():
        raise asyncio.CancelledError("odd")

    async def cancels_async():
        raise asyncio.CancelledError("odd")

    async def leaves_async():
        raise SystemExit(0)

    class Odd(BaseModel):
        name: str = ""

        @field_validator("name")
        def check(cls, value):
            return {}["secret"]

    def odd(odd: Odd):
        return 1

    class Written(BaseModel):
        a: int = 1
        how: str = ""

        @field_serializer("a")
        def write(self, value):
            raise {"KeyError": KeyError, "ValueError": ValueError, "SystemExit": SystemExit}[self.how]("secret")

    def written(how):
        return [Written(how=how)]

    class Holds(BaseModel):
        field: object = None

    def holds():
        return Holds(field=threading.Lock())

    def streamed():
        from starlette.responses import StreamingResponse

        async def body():
            RUNNING["now"] += 1
            RUNNING["most"] = max(RUNNING["most"], RUNNING["now"])
            yield str(RUNNING["now"]) + " "
            await asyncio.sleep(0.1)
            RUNNING["now"] -= 1
            yield str(RUNNING["most"])

        return StreamingResponse(body(), media_type="text/plain")

    def streamed_exit():
        from starlette.responses import StreamingResponse

        async def body():
            yield "a"
            raise SystemExit(0)

        return StreamingResponse(body(), media_type="text/plain")

    def count(upper: int):
        for i in range(upper):
            yield f"Number {i}"

    async def objects():
        yield {"i": 0}
        yield "two\\nlines"
        yield "data: [DONE]\\n\\n"

    def endless():
        try:
            while True:
                yield "more"
                time.sleep(0.01)
        finally:
            CLOSED.append("endless")

    async def endless_async():
        try:
            while True:
                yield "more"
                await asyncio.sleep(0.01)
        finally:
            CLOSED.append("endless_async")

    def closed():
        return CLOSED

    def breaks(where="here"):
        raise ValueError("secret: 12345")

    def leaves():
        raise SystemExit(0)

    def stops():
        raise StopIteration("odd")

    def stream_breaks(after: int):
        for i in range(after):
            yield i
        raise ValueError("secret: 12345")

    def not_json():
        return {"a": [1, {2, 3}]}

    def nan():
        return {"score": float("nan")}

    def slow():
        RUNNING["now"] += 1
        RUNNING["most"] = max(RUNNING["most"], RUNNING["now"])
        time.sleep(0.1)
        RUNNING["now"] -= 1
        return RUNNING["most"]

    def response():
        from starlette.responses import PlainTextResponse
        return PlainTextResponse("plain", 202)

    def _private():
        return 1
"""


class Runner:
    """A running server: its port, and what it wrote."""

    def __init__(self, directory: Path, source: str, *, concurrency: int = 4) -> None:
        (directory / "main.py").write_text(textwrap.dedent(source))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        argv = guest.runner_argv(self.port, concurrency=concurrency)
        trees = os.pathsep.join(str(tree) for tree in (guest.sdk_tree(), guest.runner_tree()))
        self._log = directory / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *argv[1:]],
                cwd=directory,
                env={**os.environ, "PYTHONPATH": trees},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.request("GET", "/ready")[0] == 200:
                    return
            except OSError:
                time.sleep(0.02)
        raise AssertionError(self.log)

    def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def call(self, function: str, **arguments: Any) -> tuple[int, Any]:
        status, _, body = self.request("POST", f"/{function}", json.dumps(arguments).encode())
        return status, json.loads(body)

    def result(self, function: str, **arguments: Any) -> Any:
        status, answer = self.call(function, **arguments)
        assert status == 200, answer
        return answer["result"]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("app"), APP)
    runner.wait_until_ready()
    yield runner
    runner.stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Runner]]:
    started: list[Runner] = []

    def start(source: str, **options: Any) -> Runner:
        started.append(Runner(tmp_path, source, **options))
        return started[-1]

    yield start
    for runner in started:
        if runner.process.poll() is None:
            runner.process.kill()
        runner.process.wait(10)


def test_answers_in_the_documented_shape(runner: Runner) -> None:
    status, answer = runner.call("predict", prompt="ab", n=2)
    assert status == 200
    assert set(answer) == {"run_id", "result", "run_time_ms"}
    assert answer["result"]["text"] == "abab"
    assert answer["run_time_ms"] >= 0
    assert f"run_id={answer['run_id']} POST /predict 200" in runner.log


def test_prints_of_the_app_reach_the_log_at_once(runner: Runner) -> None:
    assert runner.log.startswith("loading\n")


def test_health_ready_and_index(runner: Runner) -> None:
    assert runner.request("GET", "/health")[0] == 200
    assert runner.request("GET", "/ready")[0] == 200
    functions = json.loads(runner.request("GET", "/")[2])["functions"]
    assert functions["predict"] == "(prompt: str, n: int = 1)"


def test_default_values_that_may_be_secret_are_not_shown(runner: Runner) -> None:
    status, _, body = runner.request("GET", "/")
    assert status == 200
    assert json.loads(body)["functions"]["keyed"] == (
        "(p, key=..., model: main.Unshowable = ..., n: int | None = None, x: float = 0.5)"
    )
    status, _, body = runner.request("POST", "/keyed", b"{}")
    assert status == 422
    assert b"key=..." in body
    assert b"secret" not in body


def test_only_public_functions_of_the_file_itself_are_offered(runner: Runner) -> None:
    functions = json.loads(runner.request("GET", "/")[2])["functions"]
    assert not {"_private", "join", "OrderedDict", "dataclass", "Item"} & set(functions)
    for name in ("_private", "join", "Item", "nothing"):
        status, answer = runner.call(name)
        assert (status, answer["error"]["code"]) == (404, "no_function")
        assert "predict" in answer["error"]["message"]


def test_functions_run_in_threads_and_coroutines_on_the_loop(runner: Runner) -> None:
    assert runner.result("thread") is False
    assert runner.result("later", x=1) == {"x": 1, "thread": True}


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "no JSON"),
        (b"[1]", 400, "not list"),
        (b"\xff", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"", 422, "missing argument: prompt"),
        (b'{"prompt": "a", "m": 1}', 422, "unknown argument: m"),
        (b'{"prompt": "a", "\\ud800": 1}', 422, "unknown argument: \ud800"),
    ],
)
def test_a_wrong_body_is_refused_with_the_reason(
    runner: Runner, body: bytes, status: int, reason: str
) -> None:
    got, _, answer = runner.request("POST", "/predict", body)
    error = json.loads(answer)["error"]
    assert (got, error["code"]) == (status, "bad_arguments")
    assert reason in " ".join([error["message"], *error["problems"]])


def test_wrong_methods_and_paths(runner: Runner) -> None:
    assert runner.request("GET", "/predict")[0] == 405
    assert runner.request("POST", "/predict/deep/er")[0] == 404
    assert runner.request("PUT", "/health")[0] == 405


def test_openai_clients_append_their_path(runner: Runner) -> None:
    assert runner.request("POST", "/anything/chat/completions", b'{"model": "m"}')[0] == 200


def test_arguments_of_every_kind(runner: Runner) -> None:
    assert runner.result("anything", a=1, b=[2]) == {"a": 1, "b": [2]}
    assert runner.result("only_positional", a=1, b=2) == [1, 2]
    assert runner.result("only_positional_defaults", b=5) == [1, 5]
    assert runner.result("only_positional_defaults", a=5) == [5, 2]
    status, answer = runner.call("my_run")
    assert (status, answer["result"]) == (200, answer["run_id"])
    assert runner.result("my_run", run_id="mine") == "mine"


def test_pydantic_models_in_annotations_are_validated(runner: Runner) -> None:
    assert runner.result("item", item={"name": "a"}, others=[{"name": "b"}]) == {
        "name": "a",
        "price": 1.0,
        "others": 1,
    }
    status, answer = runner.call("item", item={"price": "dear"})
    assert status == 422
    problems = " ".join(answer["error"]["problems"])
    assert "item.name: Field required" in problems
    assert "item.price" in problems
    assert runner.result("model") == {"items": [{"name": "a", "price": 1.0}]}


def test_a_status_code_in_the_result_is_the_answers(runner: Runner) -> None:
    status, answer = runner.call("teapot")
    assert (status, answer["result"]["short"]) == (418, True)


@pytest.mark.parametrize("code", [204, 205, 304])
def test_a_status_without_a_body_has_none(runner: Runner, code: int) -> None:
    """Twice on one connection: a body that nobody expects would be taken for the next answer."""
    connection = http.client.HTTPConnection("127.0.0.1", runner.port, timeout=10)
    for _ in range(2):
        connection.request("POST", "/bare", json.dumps({"status_code": code}))
        response = connection.getresponse()
        assert (response.status, response.read()) == (code, b"")
        assert response.headers["x-run-id"]
    connection.close()


def test_half_a_surrogate_pair_comes_back(runner: Runner) -> None:
    status, _, body = runner.request("POST", "/echo", b'{"text": "a\\ud800b"}')
    assert status == 200
    assert json.loads(body)["result"]["text"] == "a\ud800b"


def test_a_response_object_is_passed_on(runner: Runner) -> None:
    status, headers, body = runner.request("POST", "/response")
    assert (status, body) == (202, b"plain")
    assert "x-run-id" in headers


def test_a_generator_is_streamed_as_events(runner: Runner) -> None:
    status, headers, body = runner.request("POST", "/count", b'{"upper": 2}')
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert body == b"data: Number 0\n\ndata: Number 1\n\n"
    assert runner.request("POST", "/count", b'{"upper": 0}')[2] == b""


def test_an_async_generator_is_streamed_as_events(runner: Runner) -> None:
    body = runner.request("POST", "/objects")[2]
    assert body == b'data: {"i":0}\n\ndata: two\ndata: lines\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("name", ["endless", "endless_async"])
def test_a_client_that_hangs_up_ends_its_generator(runner: Runner, name: str) -> None:
    """Six times, with four slots: a slot that leaked would block the rest."""
    before = len(runner.result("closed"))
    for _ in range(6):
        connection = http.client.HTTPConnection("127.0.0.1", runner.port, timeout=10)
        connection.request("POST", f"/{name}")
        response = connection.getresponse()
        assert response.read(10)
        response.close()
        connection.close()
    deadline = time.monotonic() + 10
    while len(runner.result("closed")) < before + 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(runner.result("closed")) == before + 6


@pytest.mark.parametrize(
    ("name", "exception"),
    [
        ("breaks", "ValueError"),
        ("leaves", "SystemExit"),
        ("leaves_async", "SystemExit"),
        ("stops", "StopIteration"),
        ("cancels", "CancelledError"),
        ("cancels_async", "CancelledError"),
    ],
)
def test_an_exception_stays_in_the_log(runner: Runner, name: str, exception: str) -> None:
    status, answer = runner.call(name)
    assert (status, answer["error"]["code"]) == (500, "exception")
    assert exception in answer["error"]["message"]
    assert "secret" not in json.dumps(answer)
    log = runner.log[runner.log.index(f"run_id={answer['run_id']} the app raised") :]
    assert f"in {name}\n" in log
    assert "relume_runner" not in log.split("Traceback")[1].split("INFO")[0], "only the app's own frames"


def test_a_validator_that_raises_is_an_exception_of_the_apps(runner: Runner) -> None:
    status, answer = runner.call("odd", odd={"name": "a"})
    assert (status, answer["error"]["code"]) == (500, "exception")
    assert "KeyError" in answer["error"]["message"]
    log = runner.log[runner.log.index(f"run_id={answer['run_id']} the app raised") :]
    assert "in check\n" in log


@pytest.mark.parametrize("kind", ["KeyError", "ValueError", "SystemExit"])
def test_a_serializer_that_raises_is_an_exception_of_the_apps(runner: Runner, kind: str) -> None:
    status, answer = runner.call("written", how=kind)
    assert (status, answer["error"]["code"]) == (500, "exception")
    assert kind in answer["error"]["message"]
    assert "secret" not in json.dumps(answer)
    log = runner.log[runner.log.index(f"run_id={answer['run_id']} the app raised {kind}") :]
    assert "in write\n" in log


def test_a_model_with_a_field_that_is_not_json(runner: Runner) -> None:
    status, answer = runner.call("holds")
    assert (status, answer["error"]["code"]) == (500, "not_json")
    assert "result is of type main.Holds" in answer["error"]["message"]


def test_a_stream_that_breaks(runner: Runner) -> None:
    status, answer = runner.call("stream_breaks", after=0)
    assert (status, answer["error"]["code"]) == (500, "exception")
    status, _, body = runner.request("POST", "/stream_breaks", b'{"after": 1}')
    assert status == 200
    assert body.startswith(b"data: 0\n\nevent: error\ndata: ")
    assert b"secret" not in body


@pytest.mark.parametrize(
    ("name", "reason"),
    [("not_json", "result['a'][1] is of type builtins.set"), ("nan", "result['score'] is nan")],
)
def test_a_result_that_is_not_json(runner: Runner, name: str, reason: str) -> None:
    status, answer = runner.call(name)
    assert (status, answer["error"]["code"]) == (500, "not_json")
    assert reason in answer["error"]["message"]


def test_so_many_at_once_and_no_more(runner: Runner) -> None:
    most: list[int] = []
    threads = [threading.Thread(target=lambda: most.append(runner.result("slow"))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 4


def test_a_response_keeps_its_slot_until_it_is_sent(runner: Runner) -> None:
    bodies: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: bodies.append(runner.request("POST", "/streamed", b"{}")[2]))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(int(number) for body in bodies for number in body.split()) == 4


def test_an_exit_in_the_body_of_a_response_does_not_end_the_server(runner: Runner) -> None:
    for _ in range(6):
        with pytest.raises(http.client.IncompleteRead):
            runner.request("POST", "/streamed_exit", b"{}")
    assert runner.result("predict", prompt="on")["text"] == "on"


def test_a_call_waits_for_a_slot_while_health_answers(start: Callable[..., Runner], tmp_path: Path) -> None:
    go = tmp_path / "go"
    slow = f"while not os.path.exists({str(go)!r}): time.sleep(0.01)"
    runner = start(f"import os, time\ndef slow():\n    {slow}\n    return 1\n", concurrency=1)
    runner.wait_until_ready()
    threads = [threading.Thread(target=runner.call, args=("slow",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert runner.request("GET", "/health")[0] == 200
    go.touch()
    for thread in threads:
        thread.join()


def test_an_import_that_fails_ends_the_process_with_the_apps_traceback(start: Callable[..., Runner]) -> None:
    runner = start("def load():\n    raise RuntimeError('no weights')\nload()\n")
    assert runner.process.wait(20) == 1
    assert "RuntimeError: no weights" in runner.log
    assert "line 3, in <module>" in runner.log
    assert "relume_runner" not in runner.log, "only the app's own frames"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(:\n", "SyntaxError"),
        ("import sys\nsys.exit(0)\n", "ended the process while it was imported (exit 0)"),
        ("x = 1\nfrom os.path import join\n", "defines no public function"),
        ("import nothing_of_that_name\ndef f(): pass\n", "ModuleNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_served(start: Callable[..., Runner], source: str, reason: str) -> None:
    runner = start(source)
    assert runner.process.wait(20) == 1
    assert reason in runner.log


def test_no_main_py(tmp_path: Path, start: Callable[..., Runner]) -> None:
    runner = start("def f(): pass")
    (tmp_path / "main.py").unlink()
    assert runner.process.wait(20) == 1
    assert "main.py does not exist" in runner.log


def test_sigterm_ends_an_import(tmp_path: Path, start: Callable[..., Runner]) -> None:
    runner = start("import time\nprint('busy')\ntime.sleep(60)\ndef f(): pass\n")
    deadline = time.monotonic() + 20
    while "busy" not in runner.log and time.monotonic() < deadline:
        time.sleep(0.02)
    assert runner.stop() == 128 + signal.SIGTERM


def test_sigterm_ends_the_server(start: Callable[..., Runner]) -> None:
    runner = start("def f(): pass")
    runner.wait_until_ready()
    assert runner.stop() == 128 + signal.SIGTERM
    assert "Traceback" not in runner.log


def test_nothing_listens_while_the_app_is_imported(start: Callable[..., Runner], tmp_path: Path) -> None:
    go = tmp_path / "go"
    slow = f"while not os.path.exists({str(go)!r}): time.sleep(0.01)"
    runner = start(f"import os, time\nprint('busy')\n{slow}\ndef f(): return 1\n")
    deadline = time.monotonic() + 20
    while "busy" not in runner.log and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(ConnectionRefusedError):
        runner.request("GET", "/health")
    go.touch()
    runner.wait_until_ready()


def test_multiprocessing_spawn_finds_the_apps_functions(start: Callable[..., Runner]) -> None:
    runner = start(
        """
        import multiprocessing

        def square(x):
            return x * x

        def total(n):
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                return sum(pool.map(square, range(n)))
        """
    )
    runner.wait_until_ready()
    assert runner.result("total", n=4) == 14


QUIET = "import logging.config\nlogging.config.dictConfig({'version': 1})\n"


def test_a_logging_configuration_of_the_apps_leaves_the_runners_lines(start: Callable[..., Runner]) -> None:
    runner = start(QUIET + "def f():\n    raise ValueError('no')\n")
    runner.wait_until_ready()
    assert runner.call("f")[0] == 500
    assert "serving POST /f" in runner.log
    assert "ValueError: no" in runner.log


def test_a_logging_configuration_does_not_hide_why_an_import_failed(start: Callable[..., Runner]) -> None:
    runner = start(QUIET + "1 / 0\n")
    assert runner.process.wait(20) == 1
    assert "ZeroDivisionError" in runner.log


def test_a_logging_configuration_leaves_the_servers_lines(start: Callable[..., Runner]) -> None:
    runner = start(
        QUIET
        + "import logging\ndef f():\n"
        + "    return [logging.getLogger(n).disabled for n in ('uvicorn', 'uvicorn.error', 'uvicorn.asgi')]\n"
    )
    runner.wait_until_ready()
    assert runner.result("f") == [False, False, False]


def test_an_annotation_that_cannot_be_resolved_is_one_parameters_affair(start: Callable[..., Runner]) -> None:
    runner = start(
        """
        from __future__ import annotations

        import functools
        from typing import TYPE_CHECKING

        from pydantic import BaseModel

        if TYPE_CHECKING:
            from nowhere import Thing

        class Item(BaseModel):
            name: str

        class Plain:
            pass

        def f(item: Item, thing: Thing = None, either: Item | Plain = None) -> Thing:
            return [type(item).__name__, thing, either]
        """
    )
    runner.wait_until_ready()
    assert runner.result("f", item={"name": "a"}, thing={"b": 1}, either={"c": 2}) == [
        "Item",
        {"b": 1},
        {"c": 2},
    ]
    assert runner.call("f", item={})[0] == 422
    (warning,) = [line for line in runner.log.splitlines() if line.startswith("WARNING")]
    assert "f: values of either are passed on" in warning


def test_the_annotations_of_a_decorated_function_are_those_of_its_module(
    tmp_path: Path, start: Callable[..., Runner]
) -> None:
    (tmp_path / "helpers.py").write_text(
        "import functools\n"
        "def traced(function):\n"
        "    @functools.wraps(function)\n"
        "    def call(*args, **kwargs):\n"
        "        return function(*args, **kwargs)\n"
        "    return call\n"
    )
    runner = start(
        """
        from __future__ import annotations

        from pydantic import BaseModel

        from helpers import traced

        class Item(BaseModel):
            name: str

        @traced
        def f(item: Item):
            return type(item).__name__
        """
    )
    runner.wait_until_ready()
    assert runner.result("f", item={"name": "a"}) == "Item"
