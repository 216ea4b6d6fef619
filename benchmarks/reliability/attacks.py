"""Attacks on who may ask what: requests made by hand, and which statuses are right for each."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.reliability.raw import post

__all__ = [
    "Attack",
    "bind_cases",
    "fetches",
    "foreign_pages",
    "paths",
    "statements",
    "traversals",
    "wrong_keys",
]

_REFUSED: Final = (400, 401, 421, 431)
_HOST: Final = "Host: 127.0.0.1\r\n"
_OTHER_PATHS: Final = (
    "/admin",
    "/keys",
    "/v1",
    "/V1/models",
    "/debug",
    "/docs",
    "/v1.0/models",
    "/internal/v1/models",
)
_POISON: Final = (
    *(
        f"{name}: /health/live\r\n"
        for name in ("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Path", "Referer")
    ),
    *("X-Forwarded-For: 127.0.0.1\r\n", "X-Real-IP: 127.0.0.1\r\n", "Forwarded: for=127.0.0.1\r\n"),
    *(
        "X-Forwarded-Host: localhost\r\n",
        "X-HTTP-Method-Override: OPTIONS\r\n",
        "Authorization: Basic Og==\r\n",
    ),
    *(
        "Authorization: Bearer\r\n",
        "Authorization: Bearer null\r\n",
        "Cookie: key=tm_x\r\n",
        "X-Api-Key: \r\n",
    ),
)
_HOSTS: Final = (
    *("/health/live", "127.0.0.1/health/live?", "127.0.0.1:80@x", "x/../health/live#", "localhost\\health"),
    *("127.0.0.1/", "a?b", "#"),
)
_SQL: Final = (
    *(
        "' OR '1'='1",
        "'; DROP TABLE keys;--",
        '" OR ""="',
        "') UNION SELECT * FROM keys--",
        "1; SELECT pg_sleep(9)",
    ),
    *(
        "\\'; --",
        "' || (SELECT secret_hash FROM keys) || '",
        "%27%20OR%201=1",
        "x' AND randomblob(1e9)--",
        "\x00' OR 1",
    ),
    *(
        "admin'--",
        "' OR 1=1 LIMIT 1 OFFSET 1--",
        "key_' OR id LIKE '%",
        "'; ATTACH DATABASE '/tmp/x' AS x;--",
        "`id`",
    ),
    *("$(id)", "{{7*7}}", "%s%n", "../../etc/passwd", "'; UPDATE keys SET body='{}';--"),
)
_NAMES: Final = (
    *(
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "....//etc/passwd",
        "..\\..\\etc",
    ),
    *(
        "/etc/passwd",
        "//etc/passwd",
        "%2fetc%2fpasswd",
        "file:///etc/passwd",
        "~root",
        "$HOME",
        "C:\\x",
        "CON",
        "NUL.",
    ),
    *(
        "x%00.json",
        "%00",
        "a/../../b",
        ".",
        "..",
        "...",
        "%252e%252e%252fetc",
        "server.db",
        "../server.db",
        "..;/x",
    ),
    *(
        "..%c0%af..%c0%afetc",
        "%ef%bc%8e%ef%bc%8e/x",
        "a" * 3000,
        "*",
        "?",
        "%25",
        "-rf",
        "file_../x",
        "batch_%2e%2e",
    ),
)
_URLS: Final = (
    *(
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://[::1]:{port}/",
        "http://2130706433:{port}/",
    ),
    *("http://0x7f000001:{port}/", "http://0177.0.0.1:{port}/", "http://127.1:{port}/", "http://0:{port}/"),
    *(
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://a@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}#@example.com/",
    ),
    *(
        "http://example.com@127.0.0.1:{port}/",
        "//127.0.0.1:{port}/",
        "ftp://127.0.0.1:{port}/",
        "file:///etc/passwd",
    ),
    *(
        "gopher://127.0.0.1:{port}/_x",
        "dict://127.0.0.1:{port}/",
        "http://169.254.169.254/latest/",
        "data:image/png,x",
    ),
    *(
        "http://127.0.0.1.nip.io:{port}/",
        "http://localtest.me:{port}/",
        "ws://127.0.0.1:{port}/",
        "jar:http://127.1!/",
    ),
)


@dataclass(frozen=True)
class Attack:
    """A request and the statuses that are right for it."""

    name: str
    data: bytes
    right: Sequence[int]


def _ask(method: str, target: str, headers: str = _HOST) -> bytes:
    return f"{method} {target} HTTP/1.1\r\n{headers}Content-Length: 0\r\n\r\n".encode("latin-1")


def _written(path: str) -> list[str]:
    """Ways to write a path that some reader may take for it, or for a public one."""
    first, _, rest = path[1:].partition("/")
    ways = [
        path,
        "/" + path,
        path + "/",
        path + "?",
        path + ";x",
        path + "%00",
        path + ".",
        path + "%2e",
        path + "%20",
    ]
    ways += [
        f"/{first}//{rest}",
        f"/{first}/./{rest}",
        f"/x/..{path}",
        f"/health/live/../..{path}",
        path.upper(),
    ]
    ways += [
        f"/%2e%2e{path}",
        f"/health/live/..%2f..{path}",
        path.replace("/", "%2f", 1),
        f"/health/live;{path}",
    ]
    ways += [
        path.replace("/", "\\"),
        f"/health/live%00{path}",
        f"/.{path}",
        "/%76" + path[2:],
        f"{path}#/health/live",
    ]
    return ways


def paths(routes: Sequence[tuple[str, str]], public: Sequence[str]) -> Iterator[Attack]:
    """Every route and some that are none, written in every way, without a key, with headers that lie."""
    closed = [(method, path) for method, path in routes if path not in public]
    for method, path in [*closed, *(("GET", path) for path in _OTHER_PATHS)]:
        for way in _written(path):
            yield Attack(f"{method} {way}", _ask(method, way), _REFUSED)
        for poison in _POISON:
            yield Attack(
                f"{method} {path} with {poison.strip()}", _ask(method, path, _HOST + poison), _REFUSED
            )
        for host in _HOSTS:
            yield Attack(f"{method} {path} at {host}", _ask(method, path, f"Host: {host}\r\n"), _REFUSED)
        for other in ("OPTIONS", "HEAD", "TRACE", "PATCH", "PUT", "DELETE"):
            yield Attack(f"{other} {path}", _ask(other, path), _REFUSED)


def wrong_keys(secret: str) -> Iterator[Attack]:
    """Keys that are almost right, or none."""
    wrong = [
        secret[:-1],
        secret + "x",
        secret.upper(),
        secret[::-1],
        secret[:20],
        secret[3:],
        "tm_",
        f"{secret}\t{secret}",
    ]
    wrong += [
        secret[:-1] + chr(ord(secret[-1]) ^ 1),
        "tm_" + "A" * 43,
        f"'{secret}'",
        f"{secret},",
        "x" * 5000,
        "\xff" * 8,
    ]
    wrong += [f"{secret[:10]} {secret[10:]}", *_SQL]
    for key in wrong:
        line = "".join(c for c in key if c not in "\r\n\x00")
        for header in (
            f"Authorization: Bearer {line}",
            f"X-Api-Key: {line}",
            f"Authorization: bearer {line}",
        ):
            yield Attack(
                f"key in {header[:40]!r}", _ask("GET", "/v1/models", f"{_HOST}{header}\r\n"), _REFUSED
            )
    for target in (
        f"/v1/models?key={secret}",
        f"/v1/models?api_key={secret}",
        f"/v1/models?access_token={secret}",
    ):
        yield Attack("key in the query", _ask("GET", target), _REFUSED)
    for header in (
        f"Cookie: key={secret}",
        f"Authorization: Basic {secret}",
        f"Authorization: Token {secret}",
        f"Api-Key: {secret}",
    ):
        yield Attack("key elsewhere", _ask("GET", "/v1/models", f"{_HOST}{header}\r\n"), _REFUSED)


def foreign_pages() -> Iterator[Attack]:
    """What a page of the web can make somebody's browser send to a server on loopback without keys."""
    hosts = [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "169.254.169.254",
        "0.0.0.0",
        "[::]",
        "2130706433",
    ]
    hosts += [
        "127.1",
        "0x7f.1",
        "localhost@evil.example",
        "evil.example:80",
        "xn--localhost",
        "localhost%00",
        "LOCALHOST.EVIL",
    ]
    origins = [
        "http://evil.example",
        "null",
        "https://localhost.evil.example",
        "http://127.0.0.1.evil",
        "file://",
        "http://[",
    ]
    origins += [
        "http://localhost@evil.example",
        "chrome-extension://localhost",
        "http://0.0.0.0",
        "moz-extension://x",
    ]
    for target, host in itertools.product(("/v1/models", "/metrics", "/", "/health/ready"), hosts):
        yield Attack(f"{target} at {host}", _ask("GET", target, f"Host: {host}\r\n"), (400, 421))
    for method, origin in itertools.product(("GET", "POST", "OPTIONS", "DELETE"), origins):
        headers = f"{_HOST}Origin: {origin}\r\nContent-Type: text/plain\r\n"
        yield Attack(f"{method} from {origin}", _ask(method, "/v1/models", headers), (400, 403))
    headers = f"{_HOST}Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\n"
    yield Attack("a part of a foreign page", _ask("GET", "/metrics", headers), (403,))
    for target in ("/admin", "/keys", "/v1/../keys", "//v1/models"):
        yield Attack(f"{target} without a key", _ask("GET", target), (400, 401))


def statements(secret: str) -> Iterator[Attack]:
    """SQL and other languages in every field that has text. They may be refused or answered."""
    fine = (200, 400, 401, 403, 404, 405, 413, 415, 422, 431)
    key = f"Authorization: Bearer {secret}\r\n"
    fields = ("model", "prompt", "user", "suffix", "service_tier", "stop")
    for text in _SQL:
        for name in fields:
            body: dict[str, Any] = {"model": "mock", "prompt": "hi", "max_tokens": 1, name: text}
            yield Attack(f"{name} {text!r}", post("/v1/completions", json.dumps(body).encode(), key), fine)
        line = text.replace("\x00", "")
        yield Attack(
            f"feature {line!r}", post("/v1/completions", b"{}", f"{key}X-Tokenmill-Feature: {line}\r\n"), fine
        )
        query = "".join(c if c.isalnum() else f"%{ord(c):02x}" for c in text)
        for target in (
            f"/v1/models/{query}",
            f"/v1/files/{query}",
            f"/v1/batches?after={query}",
            f"/v1/files?purpose={query}",
        ):
            yield Attack(f"target {target[:40]}", _ask("GET", target, _HOST + key), fine)


def traversals(secret: str) -> Iterator[Attack]:
    """Names that lead elsewhere, where a name is asked for."""
    key = f"{_HOST}Authorization: Bearer {secret}\r\n"
    wanted = ("/v1/models/", "/v1/files/", "/v1/batches/", "/v1/messages/batches/", "/dashboard/", "/static/")
    for place, name in itertools.product(wanted, _NAMES):
        yield Attack(
            f"GET {place}{name[:30]}", _ask("GET", place + name, key), (400, 401, 403, 404, 405, 431)
        )
    for name in _NAMES:
        yield Attack(
            f"DELETE {name[:30]}", _ask("DELETE", f"/v1/files/{name}", key), (400, 401, 403, 404, 405, 431)
        )
        content = f"/v1/files/{name}/content"
        yield Attack(f"content of {name[:30]}", _ask("GET", content, key), (400, 401, 403, 404, 405, 431))


def fetches(secret: str, port: int) -> Iterator[Attack]:
    """URLs that the server should fetch, it is asked: it fetches none."""
    key = f"Authorization: Bearer {secret}\r\n"
    for url in (each.format(port=port) for each in _URLS):
        image = {"type": "image_url", "image_url": {"url": url}}
        source = {"type": "image", "source": {"type": "url", "url": url}}
        document = {"type": "document", "source": {"type": "url", "url": url}}
        for path, part in (
            ("/v1/chat/completions", image),
            ("/v1/messages", source),
            ("/v1/messages", document),
        ):
            messages = [{"role": "user", "content": [part]}]
            body = json.dumps({"model": "mock", "max_tokens": 1, "messages": messages}).encode()
            yield Attack(f"fetch {url}", post(path, body, key), (400, 422))
        asked = [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]
        body = json.dumps({"model": "mock", "input": asked}).encode()
        yield Attack(f"fetch {url} by responses", post("/v1/responses", body, key), (400, 422))


def bind_cases() -> Iterator[tuple[str, bool, bool]]:
    """Addresses to listen on, whether keys are asked for, and whether that is to be refused."""
    public = (
        "0.0.0.0",
        "::",
        "10.0.0.1",
        "192.168.1.1",
        "8.8.8.8",
        "2001:db8::1",
        "127.evil.example",
        "",
        "::ffff:8.8.8.8",
    )
    for host, keyless in itertools.product(public, (True, False)):
        yield host, keyless, keyless
    for host, keyless in itertools.product(("127.0.0.1", "::1", "localhost", "127.9.9.9"), (True, False)):
        yield host, keyless, False
