"""S15: requests that are none: bad heads, bodies, codings, smuggled and cut ones; nothing breaks.

    python -m benchmarks.reliability.s15 [--cases 2400] [--seed 1] [--guard off]

Each is sent to a server of its own process, on a connection of its own. Made by hand: lengths and codings
that contradict each other, targets, versions, methods, numbers and sizes of headers, chunks, compressed
bodies, bodies of 1 GB, JSON that is none; the rest are whole requests with bytes changed, lost, doubled, or
cut off. Violations: a status of 500 or more (503 is for connections), an answer where one was due and none
came, a bomb that was taken, a server that ends, an engine that restarts, and memory that grows by twice the
limit of a body. Without the guard the bounds of heads and of time are not there.
"""

import asyncio
import gzip
import random
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.reliability import command
from benchmarks.reliability.raw import Came, exchange, post
from benchmarks.reliability.server import Server, deployment, running
from scripts.scorecard import Line

__all__ = ["bad_requests", "main", "run"]

_HOST: Final = "Host: localhost\r\n"
_PATH: Final = "/v1/completions"
_BODY: Final = b'{"model":"mock","prompt":"hi","max_tokens":2}'
_LIMIT_BYTES: Final = 8 << 20
_RECEIVE_S: Final = 3.0
_AT_ONCE: Final = 8
_LARGE_BYTES: Final = 1 << 20
"""What is longer is sent alone, so that the growth of memory is its own."""

_LENGTHS: Final = (
    *("-1", "+3", "0x3", "3.0", "3,3", "3 3", "1e3", "", " ", "three", "3\x00", "\u00b2"),
    *("99999999999999999999", "-0", "00000003x", "3;", "3\t3", "9" * 5000),
)
_TARGETS: Final = (
    *("", "*", "v1/models", "http://localhost/v1/models", "//", "/\x00", "/\x7f", "/%", "/%zz", "/%00"),
    *("/v1/models#a", "/v1/models?" + "a" * 3000, "/é", "/a b", "/\\", "?", "#", "localhost:80", "/v1/../"),
    *("/" + "../" * 300, "/" + "%2e%2e/" * 300, "/v1/models/" + "a/" * 2000, "ftp://x/", "http://[", "/\t"),
)
_METHODS: Final = (
    *("", "get", "G ET", "GET\x00", "CONNECT", "TRACE", "BREW", "A" * 300, "SOURCE", "PRI", "M-SEARCH"),
    "\x16\x03",
)
_VERSIONS: Final = (
    *("HTTP/0.9", "HTTP/1.2", "HTTP/2.0", "HTTP/3", "HTTP/1.10", "RTSP/1.0", "ICE/1.0", "http/1.1"),
    "HTTP/1.1 ",
)
_LINES: Final = (
    *(": b", " a: b", "a : b", "a\x00: b", "a: b\x00", "a: \x01", "a: b\rc: d", "a: b\nc: d", "é: b"),
    "(a): b",
)
_HOSTS: Final = (
    *("", "a b", "localhost\x00", "localhost:99999999", "[", "evil.example", "localhost, evil", "a" * 5000),
)


@dataclass(frozen=True)
class _Bad:
    """A request, and the statuses that are right; none: any below 500, or a connection that is closed."""

    name: str
    data: bytes
    right: tuple[int, ...] = ()


def bad_requests(cases: int, seed: int) -> Iterator[_Bad]:
    """So many of them: all that are made by hand, then mutants of whole requests."""
    made = [*_framings(), *_heads(), *_first_lines(), *_chunkings(), *_encodings(), *_bodies()]
    yield from made[:cases]
    rng = random.Random(seed)
    whole = [
        post(_PATH, _BODY),
        post("/v1/chat/completions", _BODY, "Authorization: Bearer tm_x\r\n"),
        post("/v1/messages", _BODY, "anthropic-version: 2023-06-01\r\n"),
        f"GET /v1/models HTTP/1.1\r\n{_HOST}\r\n".encode(),
        _chunked(b"%x\r\n%b\r\n0\r\nTrailer: a\r\n\r\n" % (len(_BODY), _BODY)),
    ]
    for number in range(len(made), cases):
        yield _Bad(f"mutant {number}", _mutant(rng.choice(whole), rng))


def _head(headers: str, target: str = _PATH, method: str = "POST", version: str = "HTTP/1.1") -> bytes:
    return f"{method} {target} {version}\r\n{headers}\r\n".encode("latin-1")


def _chunked(body: bytes, headers: str = "Transfer-Encoding: chunked\r\n") -> bytes:
    return _head(_HOST + headers) + body


def _framings() -> Iterator[_Bad]:
    """Two lengths, two codings, lengths that lie."""
    end = b"0\r\n\r\n"
    codings = [
        "chunked",
        "Chunked ",
        "xchunked",
        "gzip, chunked",
        "chunked, gzip",
        "chunked, chunked",
        "identity",
    ]
    codings += [
        "\tchunked",
        "chunked\x0b",
        '"chunked"',
        "chunked;q=1",
        "deflate",
        "",
        "chu\tnked",
        "chunked\x00",
    ]
    names = ["Transfer-Encoding", "transfer-encoding", "TRANSFER-ENCODING", "Transfer-Encoding "]
    names += [" Transfer-Encoding", "Transfer_Encoding", "Transfer-Encoding\t", "X: y\r\n Transfer-Encoding"]
    for coding in codings:
        for name in names:
            line = f"{name}: {coding}\r\n"
            yield _Bad(f"coding {line!r}", _chunked(end, line))
            yield _Bad(f"coding {line!r} and length", _chunked(end, line + "Content-Length: 5\r\n"))
            yield _Bad(f"length and coding {line!r}", _chunked(end, "Content-Length: 5\r\n" + line))
    both = "Transfer-Encoding: chunked\r\n"
    yield _Bad("both", _chunked(end, both + "Content-Length: 5\r\n"), (400,))
    yield _Bad("both", _chunked(end, "Content-Length: 5\r\n" + both), (400,))
    for length in _LENGTHS:
        yield _Bad(
            f"length {length[:20]!r}", _head(f"{_HOST}Content-Length: {length}\r\n") + b"abc", (400, 431)
        )
    for size in (1, 3, 10, 44, 46, 100, 4096):
        yield _Bad(f"lying length {size}", _head(f"{_HOST}Content-Length: {size}\r\n") + _BODY)
    for size in (_LIMIT_BYTES + 1, 1 << 30, 1 << 40, (1 << 63) - 1):
        yield _Bad(f"length {size}", _head(f"{_HOST}Content-Length: {size}\r\n") + b"x" * 100_000, (413,))
    yield _Bad("length twice", _head(f"{_HOST}Content-Length: 3\r\nContent-Length: 4\r\n") + b"abcd", (400,))
    for name in ("Host", "Authorization", "Origin", "Content-Type", "X-Api-Key", "Content-Encoding"):
        twice = f"{name}: localhost\r\n{name}: localhost\r\n"
        yield _Bad(f"{name} twice", _head(twice if name == "Host" else _HOST + twice), (400,))


def _heads() -> Iterator[_Bad]:
    """Too many headers, too long ones, and lines that are none."""
    for number in (65, 100, 1_000, 10_000):
        yield _Bad(f"{number} headers", _head(_HOST + "a: b\r\n" * number, method="GET"), (431,))
    for size in (33_000, 100_000, 1_000_000):
        yield _Bad(f"a header of {size}", _head(f"{_HOST}a: {'b' * size}\r\n", method="GET"), (431,))
        yield _Bad(f"a name of {size}", _head(f"{_HOST}{'a' * size}: b\r\n", method="GET"), (431,))
        yield _Bad(f"a target of {size}", _head(_HOST, "/" + "a" * size, "GET"), (431,))
        yield _Bad(f"a head without end of {size}", _head(f"{_HOST}a: {'b' * size}")[:-2], (431,))
    for line in _LINES:
        yield _Bad(f"line {line!r}", _head(f"{_HOST}{line}\r\n", "/v1/models", "GET"), (400,))
    for host in _HOSTS:
        yield _Bad(f"host {host[:20]!r}", _head(f"Host: {host}\r\n", "/v1/models", "GET"), (400, 421))
    yield _Bad("no host", _head("", "/v1/models", "GET"), (400,))


def _first_lines() -> Iterator[_Bad]:
    """Targets, methods, versions, and what is no HTTP at all."""
    for target in _TARGETS:
        for method in ("GET", "POST", "OPTIONS", "HEAD"):
            yield _Bad(f"{method} {target[:30]!r}", _head(_HOST, target, method))
    for method in _METHODS:
        yield _Bad(f"method {method[:10]!r}", _head(_HOST, "/v1/models", method))
    for version in _VERSIONS:
        yield _Bad(f"version {version!r}", _head(_HOST, "/v1/models", "GET", version))
    for data in (b"\x00" * 300, b"\r\n" * 200, b"\xff" * 300, b"\x16\x03\x01\x02\x00\x01\x00\x01", b"{}\n"):
        yield _Bad(f"no HTTP {data[:8]!r}", data)
    yield _Bad("a thousand at once", _head(_HOST, "/v1/models", "GET") * 1000)


def _chunkings() -> Iterator[_Bad]:
    """Chunks."""
    sizes = [
        b"zz",
        b"-1",
        b"0x3",
        b"+3",
        b" 3",
        b"3 ",
        b"f" * 17,
        b"1" * 40,
        b"",
        b"3;" + b"a" * 50_000,
        b"3\x00",
        b"\x003",
    ]
    for size in sizes:
        yield _Bad(f"chunk size {size[:8]!r}", _chunked(size + b"\r\nabc\r\n0\r\n\r\n"))
    for body in (
        b"3\nabc\n0\n\n",
        b"3\r\nabc0\r\n\r\n",
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"3\r\nab\r\n0\r\n\r\n",
        b"0\r\n",
        b"0\r\nA: b",
    ):
        yield _Bad(f"chunks {body!r}", _chunked(body))
    yield _Bad("a trailer of 1 MB", _chunked(b"0\r\nA: " + b"b" * (1 << 20)), (431,))
    yield _Bad("10,000 trailers", _chunked(b"1\r\n{\r\n0\r\n" + b"a: b\r\n" * 10_000 + b"\r\n"), (431,))
    yield _Bad("extensions of 1 MB", _chunked(b"1;" + b"a" * (1 << 20) + b"\r\n{\r\n0\r\n\r\n"), (400, 431))
    yield _Bad("chunks of one byte", _chunked(b"1\r\n{\r\n" * 50_000 + b"0\r\n\r\n"))
    yield _Bad("1 GB in chunks", _chunked((b"100000\r\n" + b"x" * (1 << 20) + b"\r\n") * 64), (413,))


def _encodings() -> Iterator[_Bad]:
    """Compressed bodies, small ones that would be large."""
    bomb = gzip.compress(b"\0" * (16 << 20))
    bodies = {"gzip": bomb, "deflate": zlib.compress(b"\0" * (16 << 20)), "gzip, gzip": gzip.compress(bomb)}
    for coding in (
        "gzip",
        "deflate",
        "br",
        "zstd",
        "gzip, gzip",
        "identity, gzip",
        "GZIP",
        "x-gzip",
        "compress",
        "a",
    ):
        for path in (_PATH, "/v1/chat/completions", "/v1/messages", "/v1/files", "/v1/models"):
            body = bodies.get(coding, bomb)
            yield _Bad(f"{coding} to {path}", post(path, body, f"Content-Encoding: {coding}\r\n"), (415,))


def _bodies() -> Iterator[_Bad]:
    """JSON that is none, or too much."""
    bodies = [
        b"",
        b"{",
        b"nul",
        b"[]",
        b"1",
        b'"a"',
        b"\x00",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"model":"\xff"}',
    ]
    bodies += [b'{"a":' * depth for depth in (63, 65, 1000, 100_000)] + [b"[" * 100_000, b"[" * 900_000]
    bodies += [
        b'{"model":' + value + b"}" for value in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 100_000)
    ]
    bodies += [
        b'{"model":"mock","prompt":' + value + b"}"
        for value in (b"1", b"[[]]", b"[1e400]", b'["\\ud800"]', b"{}")
    ]
    bodies += [
        b'{"model":"mock","model":"x","prompt":"a"}',
        b'{"model":"mock","prompt":"' + b"a" * 900_000 + b'"}',
    ]
    bodies += [
        b'{"model":"mock","prompt":"a","n":%b}' % n for n in (b"0", b"-1", b"1e9", b"9" * 40, b"null", b'"5"')
    ]
    for body in bodies:
        for path in (_PATH, "/v1/chat/completions", "/v1/messages"):
            yield _Bad(f"{body[:24]!r} to {path}", post(path, body))


def _mutant(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, lost, doubled, or the rest cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, size = rng.randrange(len(changed) + 1), rng.choice((1, 1, 2, 8, 40))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at : at + 1] = rng.randbytes(1)
        elif kind == 1:
            changed[at:at] = rng.choice(
                (b"\r\n", b"\n", b"\0", b" ", b":", b"\r", b"\t", b"\xff", b"0\r\n\r\n", b"%")
            )
        elif kind == 2:
            del changed[at : at + size]
        elif kind == 3:
            changed[at:at] = changed[at : at + size]
        else:
            del changed[at:]
    return bytes(changed)


async def _try(port: int, bad: _Bad) -> tuple[_Bad, Came]:
    """Send it. What is cut off is waited for a moment only, and left."""
    return bad, await exchange(port, bad.data, wait_s=4.0 if bad.right else 0.15)


async def _try_all(server: Server, cases: int, seed: int) -> tuple[list[str], Counter[str]]:
    faults, statuses = list[str](), Counter[str]()

    def judge(bad: _Bad, came: Came) -> None:
        found = came.statuses
        statuses[str(found[0]) if found else "closed" if came.closed else "left"] += 1
        if any(status >= 500 and status not in (503, 505) for status in found):
            faults.append(f"{bad.name}: {found}")
        elif bad.right and (not found or found[0] not in bad.right):
            faults.append(f"{bad.name}: {found[:3]}, not {bad.right}")

    turns = asyncio.Semaphore(_AT_ONCE)

    async def one(bad: _Bad) -> None:
        async with turns:
            judge(*await _try(server.port, bad))

    for large in (False, True):
        which = (b for b in bad_requests(cases, seed) if (len(b.data) > _LARGE_BYTES) == large)
        if large:
            for bad in which:
                judge(*await _try(server.port, bad))
        else:
            await asyncio.gather(*map(one, which))
    return faults, statuses


def _memory(pid: int, name: str) -> int:
    """Bytes of a process by its status: VmRSS now, VmHWM at most."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """Send so many."""
    began = time.monotonic()
    limits = {"receive_s": _RECEIVE_S} if guard else {"max_headers": 1 << 24, "max_head_bytes": 1 << 24}
    with (
        tempfile.TemporaryDirectory() as folder,
        running(deployment(mock={}, http={"limits": limits}), Path(folder)) as server,
    ):
        warm = post(_PATH, _BODY)
        for _ in range(20):
            asyncio.run(exchange(server.port, warm, wait_s=4.0))
        engines = server.engine_pids()
        Path(f"/proc/{server.pid}/clear_refs").write_text("5", encoding="ascii")
        before = _memory(server.pid, "VmRSS")
        faults, statuses = asyncio.run(_try_all(server, cases, seed))
        growth = _memory(server.pid, "VmHWM") - before
        if growth >= 2 * _LIMIT_BYTES:
            faults.append(f"memory grew by {growth >> 20} MiB")
        if asyncio.run(exchange(server.port, warm, wait_s=4.0)).statuses != [200]:
            faults.append("a good request is not answered any more")
        if server.process.poll() is not None or server.engine_pids() != engines:
            faults.append("a process ended")
    return Line(
        name="s15",
        what="bad HTTP: crashes, wrong statuses, memory",
        cases=cases,
        violations=len(faults),
        seconds=time.monotonic() - began,
        figures={
            "made by hand": sum(1 for bad in bad_requests(cases, seed) if not bad.name.startswith("mutant")),
            "growth of memory, MiB (limit 16)": round(growth / (1 << 20), 1),
            "statuses": ", ".join(f"{name} x {number}" for name, number in statuses.most_common()),
            **{f"fault {at}": fault for at, fault in enumerate(faults[:8])},
        },
    )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    return command.main("s15", run, 2400, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
