"""S22: attacks on keys, paths, names and secrets of a server, by hand-made requests on raw sockets.

    python -m benchmarks.reliability.s22 [--cases 100000] [--seed 1] [--guard off]

Every route that the server has, and some that it has not, written in two dozen ways, without a key and with
headers that lie; keys that are almost right; what a foreign page can make a browser send; SQL in every
field; names that lead out of folders; URLs to be fetched, beside a listener that must see nobody; addresses
to listen on; a key revoked amid 500 requests a second; secrets in every log and page; the time that a wrong
key takes. A bypass is a status that is not right for its attack. Without the guard the server asks for no
keys.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.reliability import command
from benchmarks.reliability.attacks import (
    Attack,
    bind_cases,
    fetches,
    foreign_pages,
    paths,
    statements,
    traversals,
    wrong_keys,
)
from benchmarks.reliability.raw import Came, exchange
from benchmarks.reliability.server import Server, deployment, running
from scripts.scorecard import Line
from tokenmill.core import UsageError
from tokenmill.costs.prices import load_prices
from tokenmill.engine.mock import MockScript
from tokenmill.server import deploy
from tokenmill.server.app import create_app
from tokenmill.server.config import Deployment, ModelConfig
from tokenmill.server.edge import EdgeConfig, check_exposure, needed_scope
from tokenmill.server.erasing import EraseApi
from tokenmill.server.keys import KeyCache
from tokenmill.server.observer import Observer, ObserverConfig
from tokenmill.store import Key, hash_secret, new_secret
from tokenmill.store.sqlite import SqliteStore

__all__ = ["PUBLIC", "main", "run", "served_routes", "timing_auc"]

PUBLIC: Final = (
    *("/health", "/health/live", "/health/ready", "/health/drained"),
    *("/", "/dashboard/style.css", "/dashboard/app.js"),
)
"""The paths that need no key, all of them: the dashboard's page has no figures."""
_AT_ONCE: Final = 8
_STORM_PER_S: Final = 500
_STORM_S: Final = 3.0
_SAMPLES: Final = 20_000


async def served_routes(folder: Path) -> list[tuple[str, str]]:
    """Method and path of every route of a server, with parameters filled in."""
    model = ModelConfig(name="mock", mock=MockScript())
    config = Deployment(models=(model,), store=str(folder / "routes.db"))
    observer = Observer(ObserverConfig(), prices=load_prices())
    async with deploy._opened(config, observer) as (gateway, store, room, capture):
        more = [*observer.routes, *EraseApi(store, capture.folder).routes()]
        more += [] if room is None else deploy._batch_routes(room)
        app = create_app(gateway, EdgeConfig(), _no_key, more)
        routes = app._app.routes  # type: ignore[attr-defined]
        return [
            (method, _filled(route.path)) for route in routes for method in sorted(route.methods or {"GET"})
        ]


async def _no_key(secret: str) -> Key | None:
    return None


def _filled(path: str) -> str:
    """A route's path with `x` for each parameter."""
    parts = path.replace("{", "\0{").split("\0")
    return "".join("x" + part.partition("}")[2] if part.startswith("{") else part for part in parts)


async def _keys(path: Path) -> dict[str, str]:
    """Keys in a new store: one that is good, one for metrics, one that has ended, one that was revoked."""
    store = SqliteStore(path)
    now_s = time.time()
    made: dict[str, str] = {}
    for name, more in {
        "good": {},
        "storm": {},
        "metrics": {"scopes": ("metrics",)},
        "old": {"expires_s": now_s - 1.0},
        "gone": {"revoked_s": now_s - 1.0},
    }.items():
        secret, secret_hash = new_secret()
        key = Key(id=f"key_{name}", name=name, project="p", created_s=now_s, **more)  # type: ignore[arg-type]
        await store.add_key(key, secret_hash)
        made[name] = secret
    await store.close()
    return made


async def _digest(path: Path) -> str:
    """Of all keys in a store."""
    store = SqliteStore(path)
    found = repr(await store.keys())
    await store.close()
    return hashlib.sha256(found.encode()).hexdigest()


class _Suite:
    """Counts what was tried and what was wrong."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self.port = port
        self.num = 0
        self.faults: list[str] = []
        self._rng = rng
        self._turns = asyncio.Semaphore(_AT_ONCE)

    def check(self, name: str, is_right: bool) -> None:
        """One more case."""
        self.num += 1
        if not is_right:
            self.faults.append(name)

    async def attack(self, attacks: Iterable[Attack], port: int = 0, most: int | None = None) -> None:
        """Try them; `most` of them, drawn at random."""
        chosen = list(attacks)
        if most is not None and len(chosen) > most:
            chosen = self._rng.sample(chosen, most)
        await asyncio.gather(*(self._one(each, port or self.port) for each in chosen))

    async def _one(self, attack: Attack, port: int) -> None:
        async with self._turns:
            came = await exchange(port, attack.data, wait_s=8.0)
        statuses = came.statuses
        is_open = b"access-control-allow" in came.data.lower() or b"root:" in came.data
        is_right = bool(statuses) and all(status in attack.right for status in statuses)
        self.check(
            f"{attack.name}: {statuses}{' says too much' if is_open else ''}", is_right and not is_open
        )


def _get(target: str, secret: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {secret}\r\n\r\n".encode()


async def _scopes(suite: _Suite, secrets: dict[str, str]) -> None:
    """What each key opens, and that none of them opens what is not listed."""
    opens = {"good": "inference", "metrics": "metrics", "old": "", "gone": ""}
    for name, scope in opens.items():
        for target in ("/v1/models", "/metrics", "/openapi.json", "/admin", "/v1", "//v1/models"):
            came = await exchange(suite.port, _get(target, secrets[name]), wait_s=8.0)
            is_due = bool(scope) and needed_scope(target) == scope
            right = (200,) if is_due else (401, 403)
            suite.check(
                f"{name} at {target}: {came.statuses}", came.statuses[:1] in [[status] for status in right]
            )


async def _storm(suite: _Suite, path: Path, secret: str) -> float:
    """Revoke a key amid requests that show it; seconds until the last one that was let in."""
    begun, let_in, tasks = time.monotonic(), list[float](), list[asyncio.Task[None]]()
    revoked_s = float("inf")

    async def ask() -> None:
        sent_s = time.monotonic()
        came = await exchange(suite.port, _get("/v1/models", secret), wait_s=8.0)
        if came.statuses == [200]:
            let_in.append(sent_s)
        if sent_s > revoked_s + 1.0:
            suite.check(f"a revoked key opens after {sent_s - revoked_s:.2f} s", came.statuses != [200])

    for number in range(int(_STORM_S * _STORM_PER_S)):
        await asyncio.sleep(max(0.0, begun + number / _STORM_PER_S - time.monotonic()))
        tasks.append(asyncio.create_task(ask()))
        if number == int(_STORM_S * _STORM_PER_S) // 3:
            store = SqliteStore(path)
            key = next(each for each in await store.keys() if each.id == "key_storm")
            await store.update_key(dataclasses.replace(key, revoked_s=time.time()))
            await store.close()
            revoked_s = time.monotonic()
    await asyncio.gather(*tasks)
    suite.check("the storm's key was never let in", bool(let_in))
    return max(0.0, max(let_in, default=0.0) - revoked_s)


@contextlib.asynccontextmanager
async def _listener() -> AsyncIterator[tuple[int, list[int]]]:
    """A port of this machine, and how often somebody came."""
    visits = [0]

    async def visited(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visits[0] += 1
        writer.close()

    server = await asyncio.start_server(visited, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], visits


def _binds(suite: _Suite) -> None:
    for host, keyless, is_refused in bind_cases():
        refused = False
        try:
            check_exposure(host, EdgeConfig(keyless=keyless, hosts=("localhost",)))
        except UsageError:
            refused = True
        suite.check(f"listening on {host!r}, keyless {keyless}", refused == is_refused)


def timing_auc(samples: int, seed: int, *, leaky: bool) -> float:
    """How well the time that a wrong key takes tells whether its first half is right: 0.5 is not at all.

    `leaky` compares character by character and stops at the first that differs.
    """
    right = new_secret().secret
    rng = random.Random(seed)
    store = _OneKey(right)
    cache = KeyCache(store)
    asyncio.run(cache(right))
    halves = [right[: len(right) // 2], "tm_" + "!" * (len(right) // 2 - 3)]
    rest = "".join(rng.choices("abc", k=len(right) - len(halves[0])))
    loop = asyncio.new_event_loop()
    taken: tuple[list[int], list[int]] = ([], [])
    try:
        for _ in range(samples):
            for kind in rng.sample((0, 1), 2):
                guess = halves[kind] + rest
                begun = time.perf_counter_ns()
                if leaky:
                    _equal(guess, right)
                else:
                    loop.run_until_complete(cache(guess))
                taken[kind].append(time.perf_counter_ns() - begun)
    finally:
        loop.close()
    return _auc(*taken)


class _OneKey:
    """A store with one key, as fast as a store can be."""

    def __init__(self, secret: str) -> None:
        self._hash = hash_secret(secret)
        self._key = Key(id="key_1", name="a", project="p", created_s=0.0)

    async def find_key(self, secret_hash: bytes) -> Key | None:
        """The key."""
        return self._key if hmac.compare_digest(secret_hash, self._hash) else None

    async def key_version(self) -> int:
        """Always the same."""
        return 1


def _equal(one: str, other: str) -> bool:
    """As nobody should compare secrets."""
    for a, b in zip(one, other, strict=True):  # noqa: SIM110
        if a != b:
            return False
    return True


def _auc(ones: Sequence[int], others: Sequence[int]) -> float:
    """The probability that one of the first is the longer, ties half (Mann and Whitney)."""
    ranked = sorted([(value, 0) for value in ones] + [(value, 1) for value in others])
    total, at = 0.0, 0
    while at < len(ranked):
        end = at
        while end < len(ranked) and ranked[end][0] == ranked[at][0]:
            end += 1
        total += (at + end + 1) / 2 * sum(1 for _, kind in ranked[at:end] if kind == 0)
        at = end
    return (total - len(ones) * (len(ones) + 1) / 2) / (len(ones) * len(others))


def _hits(folder: Path, pages: Sequence[Came], canaries: Sequence[str]) -> list[str]:
    """Where a secret is written."""
    texts = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    texts |= {f"page {at}": page.data for at, page in enumerate(pages)}
    return [
        f"{canary[:6]}... in {name}"
        for name, text in texts.items()
        for canary in canaries
        if canary.encode() in text
    ]


async def _secrets(suite: _Suite, server: Server, secrets: dict[str, str]) -> None:
    """Canaries in prompts, headers and URLs: in no log, no page, no file of the server."""
    canaries = [f"CANARY{number}{random.Random(number).getrandbits(64):x}" for number in range(4)]
    key = f"Authorization: Bearer {secrets['good']}\r\n"
    prompt = f'{{"model":"mock","max_tokens":2,"prompt":"{canaries[0]}","bad":'.encode()
    lines = f"{key}X-Secret: {canaries[1]}\r\nCookie: a={canaries[1]}\r\n"
    for body in (prompt + b"1}", prompt, prompt[:-7] + b"}"):
        await exchange(server.port, _post(body, lines), wait_s=8.0)
    for target in (f"/v1/models?secret={canaries[2]}", f"/{canaries[2]}", f"/v1/%0d%0a{canaries[2]}"):
        await exchange(server.port, _get(target, secrets["good"]), wait_s=8.0)
    await exchange(server.port, _get("/v1/models", f"tm_{canaries[3]}"), wait_s=8.0)
    pages = [
        await exchange(server.port, _get(target, secrets["metrics"]), wait_s=8.0)
        for target in ("/", "/metrics")
    ]
    suite.check("metrics and dashboard are there", all(page.statuses[:1] == [200] for page in pages))
    found = _hits(server.log.parent, pages, [*canaries, *secrets.values()])
    for canary in (*canaries, *secrets.values()):
        suite.check(f"secrets: {found}", not any(hit.startswith(canary[:6]) for hit in found))
    log = server.log.read_bytes()
    suite.check("control characters in the log", not any(byte < 32 and byte != 10 for byte in log))


def _post(body: bytes, headers: str) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


async def _run(
    folder: Path, keyed: Server, keyless: Server, secrets: dict[str, str], most: int, seed: int
) -> tuple[_Suite, float, int]:
    suite = _Suite(keyed.port, random.Random(seed))
    routes = await served_routes(folder)
    part = None if most >= 10_000 else max(8, most // 7)
    digest = await _digest(keyed.store)
    await suite.attack(paths(routes, PUBLIC), most=part)
    await suite.attack(wrong_keys(secrets["good"]), most=part)
    await suite.attack(foreign_pages(), keyless.port, most=part)
    await suite.attack(statements(secrets["good"]), most=part)
    await suite.attack(traversals(secrets["good"]), most=part)
    async with _listener() as (port, visits):
        await suite.attack(fetches(secrets["good"], port), most=part)
        suite.check(f"{visits[0]} URLs were fetched", visits[0] == 0)
    suite.check("the keys in the store have changed", digest == await _digest(keyed.store))
    await _scopes(suite, secrets)
    _binds(suite)
    await _secrets(suite, keyed, secrets)
    late_s = await _storm(suite, keyed.store, secrets["storm"])
    return suite, late_s, len(routes)


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """Try at most so many of the attacks, all of them by default."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folders = [Path(place, name) for name in ("keyed", "keyless", "routes")]
        for folder in folders:
            folder.mkdir()
        secrets = asyncio.run(_keys(folders[0] / "server.db"))
        config = deployment(mock={}, http={"keyless": not guard})
        keyed = stack.enter_context(running(config, folders[0]))
        keyless = stack.enter_context(running(deployment(mock={}), folders[1]))
        suite, late_s, num_routes = asyncio.run(_run(folders[2], keyed, keyless, secrets, cases, seed))
    samples = _SAMPLES if cases >= 10_000 else _SAMPLES // 10
    auc, leaky = (timing_auc(samples, seed, leaky=each) for each in (False, True))
    margin = 0.02 if samples == _SAMPLES else 0.06
    suite.check(f"the time of a wrong key tells: AUC {auc:.3f}", abs(auc - 0.5) <= margin)
    suite.check(f"the leaky comparison is not seen: AUC {leaky:.3f}", leaky > 0.9)
    return Line(
        name="s22",
        what="attacks on keys, paths, names, addresses and secrets",
        cases=suite.num,
        violations=len(suite.faults),
        seconds=time.monotonic() - began,
        figures={
            "routes": num_routes,
            "a revoked key opened for, s": round(late_s, 3),
            "AUC of a wrong key's time": f"{auc:.3f}, {samples} samples a class",
            "AUC of a leaky comparison": f"{leaky:.3f}",
            **{f"fault {at}": fault for at, fault in enumerate(suite.faults[:12])},
        },
    )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    return command.main("s22", run, 100_000, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
