"""`relume bench`: its arguments, its questions, and what becomes of its rows."""

from __future__ import annotations

import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relume.cli import bench
from relume.cli.benchmark import measure, page_cache, report
from relume.cli.benchmark.workloads import WORKLOADS
from relume.config import load_app
from relume.errors import CallFailed, HostError


def row(way: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "workload": "tiny",
        "way": way,
        "cache": "warm",
        "first_answer_s": seconds,
        "runs": 3,
        "spread": [seconds / 2, seconds * 2],
        "image_bytes": 1_700_000_000,
        "touched_bytes": 400_000_000,
        "frozen_s": 1.2,
        "freeze_limits": {"memory_bytes_per_s": 2e9, "disk_bytes_per_s": 5e8},
        "freeze": {"frozen_s": 1.2, "memwrite_s": 0.9, "held_files_s": 0.1, "edit_s": 0.01, "hash_s": 0.4},
        **more,
    }


ROWS = [row("cold", 8.0), row("criu-eager", 2.0), row("learned", 0.25)]
CLONES = [row("learned", 0.3, clones=8, last_answer_s=0.5, pss_bytes=420_000_000, cgroup_bytes=450_000_000)]


class TestArguments:
    def test_the_command_and_its_parts_know_the_same_names(self) -> None:
        assert {*bench._WORKLOADS, *bench._ON_REQUEST} == set(WORKLOADS)
        assert set(bench._WAYS) == set(measure.WAYS)
        assert set(bench._CACHES) == set(measure.CACHES)

    @pytest.mark.parametrize(
        "words",
        [("--way", "faster"), ("--workload", "x"), ("--runs", "0"), ("--clones", "-1"), ("--cache", "hot")],
    )
    def test_what_is_not_there_is_refused_as_json_too(self, relume: Callable[..., Any], words: Any) -> None:
        ran = relume("bench", "--json", *words)
        assert ran.status == 2
        assert ran.json["error"]["code"] == "bad_request"
        assert words[1] in ran.json["error"]["message"]

    def test_clones_are_never_prepared_ones(self, relume: Callable[..., Any]) -> None:
        ran = relume("bench", "--clones", "2", "--way", "prepared", "-o", "json")
        assert ran.json["error"]["code"] == "bad_request"

    def test_a_workload_that_does_not_fit_the_machine_is_refused(self) -> None:
        bench._require_memory(1 << 20, "small")
        with pytest.raises(HostError, match="huge needs"):
            bench._require_memory(1 << 60, "huge")


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_workload_is_an_app_that_can_be_deployed(name: str) -> None:
    config = load_app(WORKLOADS[name].directory)
    config.require_deployable(gpus=1)
    assert config.warnings == ()
    assert config.checkpointing
    # Room for all of its memory, paged in privately, with what the node wants to spare.
    assert config.hardware.memory_bytes >= WORKLOADS[name].memory_bytes * 1.15
    assert (WORKLOADS[name].directory / "main.py").exists() or name == "redis"


class Answering(http.server.BaseHTTPRequestHandler):
    status, body = 200, b'{"checksum": 7}'

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        pass


class TestQuestions:
    @pytest.fixture
    def url(self) -> Iterator[str]:
        with http.server.HTTPServer(("127.0.0.1", 0), Answering) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
            thread.join()

    def test_http(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        assert WORKLOADS["tiny"].answer(url) == {"checksum": 7}
        monkeypatch.setattr(Answering, "status", 500)
        with pytest.raises(CallFailed, match="status 500"):
            WORKLOADS["tiny"].answer(url)

    @pytest.mark.parametrize(
        ("reply", "right"),
        [
            (b"*100\r\n" + b"$5\r\nvalue\r\n" * 100, True),
            (b"*99\r\n" + b"$5\r\nvalue\r\n" * 99, False),
            (b"-LOADING Redis is loading\r\n", False),
            (b"*100\r\n$-1\r\n", False),
            (b"", False),
        ],
    )
    def test_redis(self, reply: bytes, right: bool) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:

            def answer() -> None:
                connection, _ = server.accept()
                with connection:
                    asked = connection.recv(1 << 16)
                    assert asked.startswith(b"MGET key:0 key:9999 ")
                    connection.sendall(reply)

            thread = threading.Thread(target=answer)
            thread.start()
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            if right:
                assert WORKLOADS["redis"].answer(url) == ["value"] * 100
            else:
                with pytest.raises(CallFailed):
                    WORKLOADS["redis"].answer(url)
            thread.join()


STAGES = {
    "lookup": 0.001,
    "pager_ready": 0.019,
    "runc_started": 0.02,
    "namespaces": 0.06,
    "network": 0.065,
    "pager_restored": 0.1,
    "ready": 0.103,
}


class TestOwnShare:
    def test_is_what_is_neither_runcs_nor_crius(self) -> None:
        assert measure.own_share(STAGES) == pytest.approx(0.02 + 0.005 + 0.003)

    def test_ready_before_criu_was_done_costs_nothing_afterwards(self) -> None:
        assert measure.own_share(STAGES | {"ready": 0.09}) == pytest.approx(0.025)

    def test_a_trace_that_ends_before_criu_does_has_nothing_after_it(self) -> None:
        early = {name: at for name, at in STAGES.items() if name != "pager_restored"} | {"ready": 0.08}
        assert measure.own_share(early) == pytest.approx(0.025)

    def test_is_unknown_without_our_pager(self) -> None:
        assert measure.own_share({"runc_started": 0.02, "ready": 0.1}) is None


class TestSeries:
    def test_stages_are_medians_of_what_every_start_had(self) -> None:
        traces = [
            {"ready": 0.3, "lookup": 0.1},
            {"lookup": 0.3, "ready": 0.5, "extra": 1},
            {"lookup": 0.2, "ready": 0.4},
        ]
        series = measure.Series(None, "learned", "warm", [0.3, 0.5, 0.4], traces)  # type: ignore[arg-type]
        assert list(series.stages().items()) == [("lookup", 0.2), ("ready", 0.4)]


def test_a_dropped_file_is_read_from_the_disk_again(tmp_path: Path) -> None:
    (tmp_path / "pages-1.img").write_bytes(bytes(8 << 20))
    assert page_cache.sequential_speed(tmp_path) > 0
    page_cache.warm(tmp_path)


class TestReport:
    def test_the_longest_bar_is_the_slowest_way(self) -> None:
        title, cold, eager, learned = report.chart(ROWS, block="#")[1:]
        assert title == "tiny, page cache warm"
        assert cold.count("#") == 40
        assert eager.count("#") == 10
        assert learned.count("#") == 1
        assert learned.endswith("250 ms")

    def test_clones_are_charted_by_their_last_answer(self) -> None:
        assert report.chart(CLONES)[-1].endswith("500 ms")

    def test_table(self) -> None:
        shown = {line["way"]: line for line in report.table(ROWS)}
        assert shown["learned"]["against_eager"] == "8 x"
        assert shown["learned"]["spread"] == "125 ms - 500 ms"
        assert shown["cold"]["against_eager"] == "0.25 x"
        assert report.table(CLONES)[0]["against_eager"] == "-"

    def test_markdown(self) -> None:
        assert report.markdown(ROWS, cache="warm") == [
            "| workload | image | touched | cold | criu-eager | learned |",
            "|---|--:|--:|--:|--:|--:|",
            "| `tiny` | 1700 MB | 400 MB | 8.00 s (0.25 x) | 2.00 s | 250 ms (8 x) |",
        ]
        assert (
            "| 0.71 s | 0.50 s, 2.00 s | 900 ms | 100 ms | 10 ms, 400 ms |"
            in report.markdown_freeze(ROWS)[-1]
        )
        assert report.markdown_clones(CLONES)[-1] == (
            "| `tiny` | learned | 8 | 500 ms | 400 MB | 420 MB | 450 MB |"
        )


def test_the_pages_show_what_was_measured() -> None:
    root = Path(__file__).parents[3]
    assert list((root / "bench/results").glob("*.json"))
    done = subprocess.run(
        [sys.executable, root / "bench/render.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
