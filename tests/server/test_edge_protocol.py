"""Connections that do what clients should not, against a server of its own process."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.reliability.raw import Came, exchange, post
from benchmarks.reliability.server import Server, deployment, running

BODY = b'{"model":"mock","prompt":"hi","max_tokens":4}'
STREAM = b'{"model":"mock","prompt":"hi","max_tokens":4000,"stream":true}'
HOST = "Host: localhost\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
LIMITS = {"receive_s": 2.0, "write_s": 2.0, "max_per_host": 4}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = deployment(mock={"context_length": 65536}, http={"limits": LIMITS})
    with running(config, tmp_path_factory.mktemp("edge")) as found:
        yield found


def ask(server: Server, data: bytes | str, wait_s: float = 3.0) -> Came:
    data = data.encode("latin-1") if isinstance(data, str) else data
    return asyncio.run(exchange(server.port, data, wait_s=wait_s))


def get(headers: str, path: str = "/v1/models", version: str = "HTTP/1.1") -> str:
    return f"GET {path} {version}\r\n{headers}\r\n"


def chunks(body: str, headers: str = CHUNKED) -> str:
    return f"POST /v1/completions HTTP/1.1\r\n{HOST}{headers}\r\n{body}"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(chunks("0\r\n\r\n", CHUNKED + "Content-Length: 3\r\n"), id="two lengths"),
        pytest.param(chunks("0\r\n\r\n", "Transfer-Encoding: gzip, chunked\r\n"), id="two codings"),
        pytest.param(chunks("abc", "Content-Length: 3\r\nContent-Length: 3\r\n"), id="length twice"),
        pytest.param(chunks("abc", "Content-Length: -3\r\n"), id="negative length"),
        pytest.param(chunks("fffffffffffffffff\r\nab"), id="huge chunk"),
        pytest.param(chunks("3\nabc\n0\n\n"), id="bare line feeds in chunks"),
        pytest.param(chunks("0\r\n\r\n").replace("1.1", "1.0"), id="chunks in 1.0"),
        pytest.param(get(HOST + HOST), id="two hosts"),
        pytest.param(get(""), id="no host"),
        pytest.param(get(HOST + "A: b\r\n c\r\n"), id="folded"),
        pytest.param(get(HOST).replace("\r\n", "\n"), id="bare line feeds"),
        pytest.param(get(HOST + "Authorization: a\r\nAuthorization: b\r\n"), id="two keys"),
        pytest.param(get(HOST, "http://localhost/v1/models"), id="absolute target"),
        pytest.param(get(HOST, "*"), id="no target"),
        pytest.param(get(HOST, "/v1/models#x"), id="fragment"),
        pytest.param("CONNECT a:443 HTTP/1.1\r\n" + HOST + "\r\n", id="connect"),
        pytest.param("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="http2"),
        pytest.param("\x16\x03\x01\x02\x00\x01\x00", id="tls"),
    ],
)
def test_what_two_readers_could_read_in_two_ways_is_refused(server: Server, data: str) -> None:
    came = ask(server, data)
    assert came.statuses == [400] and came.closed
    assert b'"type":"invalid_request_error"' in came.data


def test_versions_headers_and_heads_are_bounded(server: Server) -> None:
    assert ask(server, get(HOST, version="HTTP/2.0")).statuses == [505]
    assert ask(server, get(HOST + "a: b\r\n" * 63)).statuses == [200]
    assert ask(server, get(HOST + "a: b\r\n" * 64)).statuses == [431]
    assert ask(server, get(HOST + "a: b\r\n" * 10_000)).statuses == [431]
    assert ask(server, get(HOST + f"a: {'b' * 40_000}\r\n")).statuses == [431]
    assert ask(server, f"GET / HTTP/1.1\r\n{HOST}a: {'b' * 400_000}").statuses == [431]
    assert ask(server, chunks("1\r\n{\r\n0\r\nA: " + "b" * 400_000)).statuses == [431]
    assert ask(server, get(HOST) * 40).statuses[-1] == 400


def test_errors_have_the_shape_of_the_api_that_was_asked(server: Server) -> None:
    bad = f"POST /v1/messages HTTP/1.1\r\n{HOST}Content-Length: 1\r\n{CHUNKED}\r\n"
    assert b"error" in ask(server, bad).data
    late = f"POST /v1/messages HTTP/1.1\r\n{HOST}" + "a: b\r\n" * 99
    assert b'{"type":"error","error":{"type":"invalid_request_error"' in ask(server, late).data


def test_one_connection_serves_many_requests_also_after_errors(server: Server) -> None:
    requests = [
        post("/v1/completions", BODY),
        post("/v1/completions", b"{"),
        get(HOST, "/nothing").encode(),
        post("/v1/completions", BODY),
    ]

    async def run() -> list[bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        lines = []
        for request in requests:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            lines.append(head[:12])
        writer.close()
        return lines

    assert [line[-3:] for line in asyncio.run(run())] == [b"200", b"400", b"401", b"200"]


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    came = ask(server, post("/v1/completions", BODY) + get(HOST, "/health/x").encode() + get(HOST).encode())
    assert came.statuses[:1] == [200]


def test_a_client_that_offers_http2_is_answered_in_http1(server: Server) -> None:
    """As the HTTP client of Java does, which sends the body at once."""
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    for data in (post("/v1/completions", BODY, offer), post("/v1/completions", BODY, offer) + b""):
        came = ask(server, data)
        assert came.statuses == [200] and b'"text_completion"' in came.data


def test_headers_after_the_body_decide_nothing(server: Server) -> None:
    size = f"{len(BODY):x}"
    came = ask(server, chunks(f"{size}\r\n{BODY.decode()}\r\n0\r\nOrigin: http://evil\r\nHost: evil\r\n\r\n"))
    assert came.statuses == [200]


def test_a_body_that_is_too_long_is_refused_and_the_client_reads_why(server: Server) -> None:
    assert ask(server, post("/v1/completions", b"x" * (9 << 20)), wait_s=3.0).statuses == [413]
    flood = ("10000\r\n" + "x" * 65536 + "\r\n") * 160
    assert ask(server, chunks(flood), wait_s=3.0).statuses == [413]


@pytest.mark.parametrize("data", [b"", b"GE", get(HOST)[:-2].encode(), post("/v1/completions", BODY)[:-1]])
def test_a_request_that_does_not_come_is_cut_at_its_deadline(server: Server, data: bytes) -> None:
    began = time.monotonic()
    came = ask(server, data, wait_s=4.0)
    assert came.closed and 0.5 < time.monotonic() - began < 2.1
    assert came.statuses == ([408] if data else [])


def test_bytes_one_by_one_do_not_move_the_deadline(server: Server) -> None:
    async def drip() -> float:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(get(HOST).encode())
        await reader.readuntil(b"\r\n\r\n")
        answered = time.monotonic()
        rest = asyncio.create_task(reader.read())
        for _ in range(100):
            writer.write(b"\r\n")  # what a parser skips between two requests
            await asyncio.wait([rest], timeout=0.1)
            if rest.done():
                break
        writer.close()
        assert answered - began < 1.0
        return time.monotonic() - answered

    assert asyncio.run(drip()) < 2.5


def test_a_reader_that_takes_nothing_is_cut_and_its_call_ends(server: Server) -> None:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    body = b'{"model":"mock","prompt":"hi","max_tokens":60000,"stream":true,"n":8,"ignore_eos":true}'
    client.sendall(post("/v1/completions", body))
    time.sleep(5.0)
    client.settimeout(5.0)
    with contextlib.closing(client), pytest.raises(ConnectionResetError):
        while client.recv(65536):
            pass


def test_one_host_has_so_many_connections_and_this_machine_more(server: Server) -> None:
    def connect(address: str) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", server.port), source_address=(address, 0))
        client.settimeout(0.5)
        return client

    others = [connect("127.0.0.2") for _ in range(4)]
    refused = connect("127.0.0.2")
    assert refused.recv(12) == b"HTTP/1.1 503"
    mine = [connect("127.0.0.1") for _ in range(6)]
    mine[-1].sendall(get(HOST).encode())
    assert mine[-1].recv(12) == b"HTTP/1.1 200"
    others.pop().close()
    time.sleep(0.1)
    again = connect("127.0.0.2")
    again.sendall(get(HOST).encode())
    assert again.recv(12) == b"HTTP/1.1 200"
    for client in (*others, refused, *mine, again):
        client.close()


def test_the_log_has_nothing_of_what_was_sent(server: Server) -> None:
    ask(server, get(HOST + "X: CANARY\r\n", "/CANARY\r\n"))
    ask(server, get(HOST + "Authorization: Bearer tm_CANARY\r\n"))
    assert "CANARY" not in Path(server.log).read_text(encoding="utf-8")
