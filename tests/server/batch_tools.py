"""`tokenmill serve` on the mock with known answers, and what a test of batches asks of it."""

import asyncio
import http.client
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenmill.store import Key, LedgerQuery, SqliteStore, hash_secret

__all__ = ["KEYS", "add_keys", "ask", "bills_of", "chat_lines", "config", "form", "until_ended"]

KEYS = {"tm_one": "one", "tm_two": "two", "tm_fast": "one"}
"""Secrets and their projects; the last one may not have batches."""
_NUM_ANSWERS = 400
_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}="


def config(*, keys: bool = False, **more: Any) -> dict[str, Any]:
    """A deployment: the mock answers `q7` with `a7`; a prompt with `poison` breaks its step."""
    mock = {
        "answers": [[[*f"q{at}=".encode()], [*f"a{at}".encode()]] for at in range(_NUM_ANSWERS)],
        "template": _TEMPLATE,
        "faults": [{"kind": "raise", "marker": [*b"poison"]}],
        **more.pop("mock", {}),
    }
    price = {"standard": {"input_usd": 2, "output_usd": 2}, "batch": {"input_usd": 1, "output_usd": 1}}
    model = {"name": "mock", "mock": mock, "engine": {"max_batch": 16}, "price": price}
    batches = {"max_in_flight": 12, "retry_s": 0.05, "idle_s": 0.1, **more.pop("batches", {})}
    return {"models": [model], "batches": batches, "http": {"keyless": not keys}, **more}


def add_keys(store: Path) -> None:
    """Make the keys, before a server has the store."""

    async def go() -> None:
        opened = SqliteStore(store)
        for secret, project in KEYS.items():
            tiers: Any = ("fast",) if secret == "tm_fast" else ("standard", "batch")
            key = Key(id=secret[3:], name=secret, project=project, tiers=tiers, created_s=0.0)
            await opened.add_key(key, hash_secret(secret))
        await opened.close()

    asyncio.run(go())


def bills_of(store: Path, batch_id: str) -> dict[str, int]:
    """The price of each line of a batch in the ledger, by request id; a second one would be seen."""

    async def go() -> dict[str, int]:
        opened, found = SqliteStore(store), dict[str, int]()
        async for entry in opened.entries(LedgerQuery()):
            if entry.request_id.startswith(batch_id) and entry.price_nano_usd:
                assert entry.request_id not in found, "billed twice"
                found[entry.request_id] = entry.price_nano_usd
        await opened.close()
        return found

    return asyncio.run(go())


def chat_lines(numbers: Iterable[int], **more: Any) -> bytes:
    """Input lines of chats that the mock knows."""
    lines = []
    for at in numbers:
        body = {"model": "mock", "messages": [{"role": "user", "content": f"q{at}"}], **more}
        line = {"custom_id": f"c{at}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(line) + "\n")
    return "".join(lines).encode()


def ask(
    port: int, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, decoded body (bytes if it is no JSON) and headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(
            method, path, body, {name.replace("_", "-"): value for name, value in headers.items()}
        )
        answer = connection.getresponse()
        data = answer.read()
        try:
            value = json.loads(data)
        except ValueError:
            value = data
        return answer.status, value, {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


def form(content: bytes, purpose: str | None = "batch", filename: str = "x.jsonl") -> tuple[bytes, str]:
    """A form with a file, and its content type."""
    parts = [
        b'--limit\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n',
        (purpose or "").encode(),
        b"\r\n",
    ]
    head = f'--limit\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n'
    file = [head.encode(), content, b"\r\n--limit--\r\n"]
    return b"".join([*(parts if purpose is not None else []), *file]), "multipart/form-data; boundary=limit"


def until_ended(find: Callable[[], Any], is_there: Callable[[Any], bool], patience_s: float = 30.0) -> Any:
    """Ask again until it is there."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        found = find()
        if is_there(found):
            return found
        time.sleep(0.03)
    raise AssertionError(f"waited in vain: {found}")
