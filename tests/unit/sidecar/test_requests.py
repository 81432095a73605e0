"""What the sidecar answers to requests, well-formed and not."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

POST = b"POST /checkpoint HTTP/1.1\r\nHost: s\r\nContent-Length: 0\r\n\r\n"


def answers(raw: bytes, *methods: str) -> list[tuple[int, Any]]:
    """(status, JSON body) of each answer in ``raw``, which must hold nothing else."""
    found = []
    http = h11.Connection(h11.CLIENT)
    http.receive_data(raw)
    for method in methods:
        http.send(h11.Request(method=method, target="/", headers=[("host", "s")]))
        http.send(h11.EndOfMessage())
        body = b""
        status = 0
        while not isinstance(event := http.next_event(), h11.EndOfMessage):
            assert event is not h11.NEED_DATA, raw
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
        found.append((status, json.loads(body) if body else None))
        if http.our_state is h11.DONE and http.their_state is h11.DONE:
            http.start_next_cycle()
    assert not http.trailing_data[0], raw
    return found


@pytest.mark.parametrize(
    ("request_line", "status", "code"),
    [
        ("GET /checkpoint", 405, "method_not_allowed"),
        ("PUT /checkpoint", 405, "method_not_allowed"),
        ("DELETE /checkpoint", 405, "method_not_allowed"),
        ("POST /status", 405, "method_not_allowed"),
        ("POST /env", 405, "method_not_allowed"),
        ("OPTIONS *", 404, "not_found"),
        ("GET /", 404, "not_found"),
        ("POST /checkpoint/", 404, "not_found"),
        ("POST /checkpoint/../status", 404, "not_found"),
        ("POST //checkpoint", 404, "not_found"),
        ("CONNECT 10.0.0.1:80", 404, "not_found"),
    ],
)
async def test_refusals(serve: Any, request_line: str, status: int, code: str) -> None:
    served = await serve()
    raw = await served.exchange(f"{request_line} HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n".encode())
    method = request_line.split()[0]
    ((got, body),) = answers(raw, method if method != "CONNECT" else "GET")
    assert (got, body["error"]["code"]) == (status, code)
    assert (b"allow: POST" in raw) == (request_line.endswith("/checkpoint") and status == 405)
    assert served.asked == 0


@pytest.mark.parametrize(
    "target", ["/checkpoint", "/checkpoint?x=1", "http://169.254.169.253:8234/checkpoint"]
)
async def test_checkpoint(serve: Any, target: str) -> None:
    served = await serve()
    raw = await served.exchange(
        f"POST {target} HTTP/1.1\r\nHost: s\r\nContent-Length: 2\r\n\r\n{{}}".encode()
    )
    assert answers(raw, "POST") == [(200, {"status": "created"})]


async def test_http_1_0(serve: Any) -> None:
    """As `ab` and old health checkers speak it; the connection ends with the answer."""
    served = await serve()
    reader, writer = await served.connect()
    writer.write(b"GET /status HTTP/1.0\r\n\r\n")
    raw = await reader.read()  # to the end, without our having closed
    writer.close()
    assert answers(raw, "GET") == [(200, {"app": "a"})]


async def test_head_has_headers_and_no_body(serve: Any) -> None:
    served = await serve()
    raw = await served.exchange(b"HEAD /status HTTP/1.1\r\nHost: s\r\n\r\n")
    assert answers(raw, "HEAD") == [(405, None)]


async def test_a_failing_handler_says_neither_where_nor_what(serve: Any) -> None:
    served = await serve()
    raw = await served.exchange(b"GET /env HTTP/1.1\r\nHost: s\r\n\r\n")
    ((status, body),) = answers(raw, "GET")
    assert status == 500
    assert "secret" not in json.dumps(body) and "Traceback" not in json.dumps(body)


async def test_keep_alive(serve: Any) -> None:
    served = await serve()
    reader, writer = await served.connect()
    for _ in range(3):
        writer.write(POST)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
        assert json.loads(await reader.readexactly(length)) == {"status": "created"}
    writer.close()
    assert served.finished == 3


async def test_pipelined_requests_are_answered_in_order(serve: Any) -> None:
    served = await serve()
    served.gate.clear()
    reader, writer = await served.connect()
    writer.write(POST + b"GET /status HTTP/1.1\r\nHost: s\r\n\r\n" + b"GET /no HTTP/1.1\r\nHost: s\r\n\r\n")
    writer.write_eof()
    await asyncio.sleep(0.05)
    served.gate.set()
    statuses = [status for status, _ in answers(await reader.read(), "POST", "GET", "GET")]
    writer.close()
    assert statuses == [200, 200, 404]


async def test_chunked_body(serve: Any) -> None:
    served = await serve()
    head = b"POST /checkpoint HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw = await served.exchange(head + b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n")
    assert answers(raw, "POST") == [(200, {"status": "created"})]


async def test_expect_100_continue(serve: Any) -> None:
    """curl sends no body of some size before it has heard 100."""
    served = await serve()
    reader, writer = await served.connect()
    writer.write(b"POST /checkpoint HTTP/1.1\r\nHost: s\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
    assert served.asked == 0
    writer.write(b"abc")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_expect_is_refused_rather_than_continued_where_the_body_is_too_large(serve: Any) -> None:
    served = await serve(body_bytes=10)
    reader, writer = await served.connect()
    writer.write(
        b"POST /checkpoint HTTP/1.1\r\nHost: s\r\nContent-Length: 11\r\nExpect: 100-continue\r\n\r\n"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.close()


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("-1", 400),
        ("1e3", 400),
        ("", 400),
        ("0x10", 400),
        ("1, 2", 400),
        ("٣", 400),  # a digit, but not an ASCII one
        ("9" * 5000, 400),  # int() alone would raise ValueError
        ("99999999999999", 413),
    ],
)
async def test_content_lengths(serve: Any, value: str, status: int) -> None:
    served = await serve()
    request = f"POST /checkpoint HTTP/1.1\r\nHost: s\r\nContent-Length: {value}\r\n\r\n".encode()
    ((got, _),) = answers(await served.exchange(request), "POST")
    assert got == status
    assert served.asked == 0


@pytest.mark.parametrize(
    "rubbish",
    [
        b"rubbish\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of TLS
        b"POST /checkpoint HTTP/1.1\r\n\r\n",  # no Host
        b"POST /checkpoint HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /check\x00point HTTP/1.1\r\nHost: s\r\n\r\n",
        b"POST /checkpoint HTTP/1.1\r\nHost: s\r\nContent-Length: 5\r\n\r\nab",  # and then the end
        b"POST /checkpoint HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_rubbish_is_a_bad_request(serve: Any, rubbish: bytes) -> None:
    served = await serve()
    ((status, body),) = answers(await served.exchange(rubbish), "POST")
    assert status in (400, 501)
    assert body["error"]["code"] == "bad_request"
    assert served.asked == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from(
                [
                    POST,
                    POST[:40],
                    b"\r\n",
                    b"Content-Length: 7\r\n",
                    b"Transfer-Encoding: chunked\r\n",
                    b"0\r\n\r\n",
                ]
            ),
        ),
        max_size=6,
    ).map(b"".join)
)
async def test_any_bytes_get_http_or_nothing(serve: Any, data: bytes) -> None:
    """Never a traceback, never a hang: whatever arrives, what comes back is well-formed or empty."""
    served = await serve()
    async with asyncio.timeout(2):
        raw = await served.exchange(data)
    while raw:
        head, _, rest = raw.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 "), raw
        lengths = [line for line in head.split(b"\r\n") if line.startswith(b"content-length: ")]
        length = int(lengths[0].split()[1])
        json.loads(rest[:length])
        raw = rest[length:]
    await served.sidecar.close()
