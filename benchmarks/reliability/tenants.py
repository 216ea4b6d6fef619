"""A server with the keys of several projects, for the line of tenant isolation: keys, objects, calls."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.client import Connection, connect
from benchmarks.reliability.server import Server, running
from tokenmill.store import Key, SqliteStore, new_key_id, new_secret

__all__ = ["Asked", "Client", "Objects", "make_objects", "once", "opened", "tenant_server"]

_MAX_WAIT_S = 60.0
_BOUNDARY = "x7f3"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An answer: status, body, seconds."""

    status: int
    body: bytes
    seconds: float

    def json(self) -> Any:
        """The body as a value."""
        return json.loads(self.body)


class Client:
    """One connection that stays open, with the key of somebody; empty: none."""

    def __init__(self, connection: Connection, secret: str) -> None:
        self._connection = connection
        self._headers = {"authorization": f"Bearer {secret}"} if secret else {}

    async def ask(
        self,
        method: str,
        path: str,
        value: Any = None,
        *,
        body: bytes = b"",
        kind: str = "application/json",
    ) -> Asked:
        """Ask, and read the whole answer."""
        data = body if value is None else json.dumps(value).encode()
        begun_s = time.perf_counter()
        self._connection.send(method, path, data, {**self._headers, "content-type": kind})
        status, headers = await self._connection.head()
        answer = b""
        if method != "HEAD" and status != 204:
            answer = b"".join([piece async for piece in self._connection.pieces(headers)])
        return Asked(status=status, body=answer, seconds=time.perf_counter() - begun_s)

    async def complete(self, prompt: str | Sequence[str], **more: Any) -> Asked:
        """A completion of the mock, of one token unless `more` says otherwise."""
        return await self.ask(
            "POST", "/v1/completions", {"model": "mock", "prompt": prompt, "max_tokens": 1, **more}
        )


@contextlib.asynccontextmanager
async def opened(server: Server, secret: str) -> AsyncIterator[Client]:
    """A client that is closed at the end of the block."""
    async with connect(server.port) as connection:
        yield Client(connection, secret)


async def once(server: Server, secret: str, method: str, path: str, value: Any = None) -> Asked:
    """One request on a connection of its own, as refusals may close it."""
    async with opened(server, secret) as client:
        return await client.ask(method, path, value)


@contextlib.contextmanager
def tenant_server(
    config: Mapping[str, Any], folder: Path, projects: Mapping[str, str]
) -> Iterator[tuple[Server, dict[str, str]]]:
    """A server that asks for keys, and the secret of each name; one that is called `revoked` is."""
    secrets = asyncio.run(_make_keys(folder / "server.db", projects))
    with running({**config, "http": {"keyless": False}}, folder) as server:
        yield server, secrets


async def _make_keys(path: Path, projects: Mapping[str, str]) -> dict[str, str]:
    store, made = SqliteStore(path), {}
    try:
        for name, project in projects.items():
            new, now_s = new_secret(), time.time()
            made[name] = new.secret
            key = Key(
                id=new_key_id(),
                name=name,
                project=project,
                created_s=now_s,
                revoked_s=now_s if name == "revoked" else None,
            )
            await store.add_key(key, new.secret_hash)
    finally:
        await store.close()
    return made


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Ids of what the owner has: files (the input, the results) and batches of either API."""

    files: tuple[str, ...]
    batches: tuple[str, ...]
    message_batches: tuple[str, ...]

    def of(self, path: str) -> tuple[str, ...]:
        """Those that belong into a path such as `/v1/files/{id}`."""
        if path.startswith("/v1/files/"):
            return self.files
        return self.batches if path.startswith("/v1/batches/") else self.message_batches

    @property
    def all(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.files, *self.batches, *self.message_batches)


async def make_objects(client: Client, canary: str) -> Objects:
    """A file with the canary, a batch of it, and a batch of messages; both have ended."""
    body = {"model": "mock", "max_tokens": 4, "messages": [{"role": "user", "content": canary}]}
    line = {"custom_id": canary, "method": "POST", "url": "/v1/chat/completions", "body": body}
    upload = (
        f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="{canary}.jsonl"\r\n\r\n'
        f"{json.dumps(line)}\n\r\n--{_BOUNDARY}--\r\n"
    )
    kind = f"multipart/form-data; boundary={_BOUNDARY}"
    file = _good(await client.ask("POST", "/v1/files", body=upload.encode(), kind=kind))
    batch = await client.ask(
        "POST",
        "/v1/batches",
        {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"},
    )
    messages = await client.ask(
        "POST", "/v1/messages/batches", {"requests": [{"custom_id": "c-1", "params": body}]}
    )
    done = await _wait(client, f"/v1/batches/{_good(batch)['id']}", "status", "completed")
    ended = await _wait(client, f"/v1/messages/batches/{_good(messages)['id']}", "processing_status", "ended")
    return Objects(
        files=(file["id"], done["output_file_id"]), batches=(done["id"],), message_batches=(ended["id"],)
    )


async def _wait(client: Client, path: str, field: str, value: str) -> Any:
    until_s = time.monotonic() + _MAX_WAIT_S
    while time.monotonic() < until_s:
        found = _good(await client.ask("GET", path))
        if found[field] == value:
            return found
        await asyncio.sleep(0.05)
    raise RuntimeError(f"{path} is not {value} after {_MAX_WAIT_S:g} s")


def _good(asked: Asked) -> Any:
    if asked.status >= 300:
        raise RuntimeError(f"status {asked.status}: {asked.body[:300]!r}")
    return asked.json()
