"""Who gets past the edge: names, paths, keys, sizes, by raw ASGI messages."""

import asyncio
import logging
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from tokenmill.core import StorageError, UsageError
from tokenmill.server.edge import Edge, EdgeConfig, Receive, Scope_, Send, check_exposure, is_loopback
from tokenmill.server.edge import needed_scope as scope_of
from tokenmill.store import Key

KEYED = EdgeConfig(keyless=False, hosts=())
LOCAL = EdgeConfig()


@dataclass
class Answered:
    """What came back, and whether the application was asked."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    was_asked: bool = False


def key(**more: Any) -> Key:
    return Key(id="key_1", name="a", project="p", created_s=0.0, **more)


async def find(secret: str) -> Key | None:
    keys = {"tm_good": key(), "tm_admin": key(scopes=("admin",)), "tm_old": key(expires_s=1.0)}
    keys["tm_gone"] = key(revoked_s=1.0)
    return keys.get(secret)


def ask(
    path: str = "/v1/models",
    headers: Mapping[str, str] | None = None,
    *,
    config: EdgeConfig = KEYED,
    body: tuple[bytes, ...] = (b"",),
    fails: str = "",
    finder: Any = find,
) -> Answered:
    """Ask an application behind the edge that reads its body and answers 200."""
    answered = Answered()

    async def app(scope: Scope_, receive: Receive, send: Send) -> None:
        answered.was_asked = True
        if fails:
            raise ValueError(fails)
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answered.status, answered.headers = message["status"], dict(message["headers"])
        answered.body += message.get("body", b"")

    chunks = list(body)

    async def receive() -> MutableMapping[str, Any]:
        chunk = chunks.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    all_headers = {"host": "localhost:8000", **(headers or {})}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in all_headers.items()]
    scope: Scope_ = {"type": "http", "method": "GET", "path": path, "headers": raw}
    asyncio.run(Edge(app, config, finder)(scope, receive, send))
    return answered


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/health/live", None),
        ("/health/other", "metrics"),
        ("/metrics", "metrics"),
        ("/", None),
        ("/openapi.json", "inference"),
        ("/v1/models", "inference"),
        ("/v1/models/org/name", "inference"),
        ("/v1/models/", "inference"),
        ("/v1", "admin"),
        ("/V1/models", "admin"),
        ("//v1/models", "admin"),
        ("/v1//models", "admin"),
        ("/v1/../admin", "admin"),
        ("/v1/./models", "admin"),
        ("/v1/..", "admin"),
        ("/v1/models\x00", "admin"),
        ("/v1/%2e%2e/admin", "admin"),
        ("/v1/..\\admin", "admin"),
        ("/v1/\ufffd", "admin"),
        ("/v1/models\r\nx", "admin"),
        ("/health/live/", "metrics"),
        ("/health/live/../../admin", "admin"),
        ("/dashboard/../admin", "admin"),
        ("/anything", "admin"),
        ("", "admin"),
    ],
)
def test_a_path_is_closed_unless_it_is_listed_and_plain(path: str, scope: str | None) -> None:
    assert scope_of(path) == scope


def test_a_model_with_dots_in_its_name_is_plain() -> None:
    assert scope_of("/v1/models/smollm2-1.7b..q4") == "inference"


@pytest.mark.parametrize("secret", ["", "tm_wrong", "tm_old", "tm_gone", "tm_good'--", "TM_GOOD", "x" * 9999])
def test_without_a_valid_key_nobody_gets_in(secret: str) -> None:
    answered = ask(headers=bearer(secret))
    assert answered.status == 401 and not answered.was_asked
    assert answered.headers[b"www-authenticate"] == b"Bearer"


def test_a_key_opens_its_scopes_and_no_more() -> None:
    assert ask(headers=bearer("tm_good")).status == 200
    assert ask(headers={"x-api-key": "tm_good"}).status == 200
    assert ask("/other", bearer("tm_good")).status == 403
    assert ask("/metrics", bearer("tm_good")).status == 403
    assert ask("/other", bearer("tm_admin")).status == 200
    assert ask("/v1/models", bearer("tm_admin")).status == 403


def test_public_paths_need_no_key_but_refuse_a_wrong_one() -> None:
    assert ask("/health/ready").status == 200
    assert ask("/health/ready", bearer("tm_wrong")).status == 401


def test_headers_that_name_another_path_decide_nothing() -> None:
    for name in ("x-original-url", "x-rewrite-url", "x-forwarded-prefix", "x-forwarded-host", "referer"):
        assert ask("/admin", {name: "/health/live", **bearer("tm_good")}).status == 403
        assert ask("/v1/models", {name: "/health/live"}).status == 401


def test_without_keys_this_machine_gets_inference_and_metrics_but_never_admin() -> None:
    assert ask(config=LOCAL).status == 200
    assert ask("/metrics", config=LOCAL).status == 200
    assert ask("/keys", config=LOCAL).status == 401
    assert ask(headers=bearer("sk-of-some-client"), config=LOCAL).status == 200
    assert ask(headers=bearer("tm_gone"), config=LOCAL).status == 401


@pytest.mark.parametrize(
    "host",
    [
        *("", "evil.example", "localhost.evil.example", "localhost@evil.example", "localhost:80:80", "127.1"),
        *("2130706433", "0x7f000001", "localhost:8000/x", "localhost\x00", "[::1", "169.254.1.1", "::1"),
    ],
)
def test_another_host_is_refused_without_keys(host: str) -> None:
    answered = ask(headers={"host": host}, config=LOCAL)
    assert answered.status == 421 and not answered.was_asked


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1:8000", "[::1]:8000", "[0:0::1]"])
def test_names_of_this_machine_are_taken(host: str) -> None:
    assert ask(headers={"host": host}, config=LOCAL).status == 200


@pytest.mark.parametrize(
    "origin",
    [
        *("null", "http://evil.example", "http://[", "file://localhost", "http://localhost@evil.example"),
        *("http://localhost.evil.example:8000", "https://", "localhost", "http://localhost/x"),
    ],
)
def test_a_page_of_another_origin_is_refused_without_keys(origin: str) -> None:
    assert ask(headers={"origin": origin}, config=LOCAL).status == 403


def test_a_page_of_this_origin_may_ask_and_one_of_another_site_may_not_load_parts() -> None:
    assert ask(headers={"origin": "http://localhost:8000"}, config=LOCAL).status == 200
    cross = {"sec-fetch-site": "cross-site"}
    assert ask(headers={**cross, "sec-fetch-mode": "no-cors"}, config=LOCAL).status == 403
    assert ask(headers={**cross, "sec-fetch-mode": "navigate"}, config=LOCAL).status == 200


def test_compressed_bodies_are_refused() -> None:
    for coding in ("gzip", "zstd", "br", "deflate, gzip", "GZIP", "x"):
        assert ask(headers={"content-encoding": coding, **bearer("tm_good")}).status == 415
    assert ask(headers={"content-encoding": "identity", **bearer("tm_good")}).status == 200


@pytest.mark.parametrize("length", ["9", "99999999999999999999", "9" * 5000, "0", "-1", "x"])
def test_a_body_is_bounded_whatever_its_length_says(length: str) -> None:
    config = EdgeConfig(keyless=False, hosts=(), max_body_bytes=8)
    headers = {"content-length": length, **bearer("tm_good")}
    answered = ask(headers=headers, config=config, body=(b"1234",) * 4)
    assert answered.status == 413 and answered.headers[b"connection"] == b"close"


def test_a_failure_is_500_and_its_words_stay_out_of_answer_and_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG):
        answered = ask(headers=bearer("tm_good"), fails="the prompt was CANARY")
    assert answered.status == 500 and b"CANARY" not in answered.body
    assert "ValueError" in caplog.text and "CANARY" not in caplog.text and "tm_good" not in caplog.text


def test_keys_that_cannot_be_checked_open_nothing() -> None:
    async def broken(secret: str) -> Key | None:
        raise StorageError("the disk is gone")

    answered = ask(headers=bearer("tm_good"), finder=broken)
    assert answered.status == 503 and not answered.was_asked and answered.headers[b"retry-after"] == b"1"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "127.evil.example", "", "10.0.0.1", "::2"])
def test_a_public_address_without_keys_is_refused(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(UsageError, match="no key is asked for"):
        check_exposure(host, LOCAL)
    check_exposure(host, KEYED)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_exposure(host, LOCAL)
