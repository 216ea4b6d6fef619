"""Line S23: what is one tenant's is no other's: objects, answers, the time a cached prefix saves, the cache.

    python -m benchmarks.reliability.s23 --cases 1000000 --trials 2000
    python -m benchmarks.reliability.s23 --cases 20000 --trials 200 --guard off

Five parts, on a server with a mock whose rows take time. Objects: every path of /openapi.json with an id in
it, by every method, as another project, with a revoked key and with none, then as the owner and another key
of the project. Canaries: `cases` answers over connections of 200 tenants that stay open, some broken off;
each must be what its own prompt gives. Timing: a project asks for prefixes that another one has just
used, and for new ones; the area under the curve of its times must be that of a guess, and that of the
project's own other key must not. Flood: a victim's hit rate beside one who fills the cache. Keys: structured
pairs of fields and tokens.

With `--guard off` all tenants are one project, two answers in a hundred are exchanged, and keys are fields
put together without lengths: every part must notice.
"""

import asyncio
import itertools
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.reliability.command import main
from benchmarks.reliability.server import Server, deployment
from benchmarks.reliability.tenants import Client, make_objects, once, opened, tenant_server
from scripts.scorecard import Line
from tokenmill.engine.mock import MockScript, reference_tokens
from tokenmill.kernels import KV_BLOCK
from tokenmill.kvcache import PrefixChain, prefix_root

__all__ = ["Found", "run"]

_CANARY = "canary-5ae1"
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "OPTIONS", "TRACE", "DELETE")
_TENANTS = 200
_CONNECTIONS = 24
_PROMPTS = 32
_ANSWER = 3
_PREFIX = 512
_WHAT = "tenants: leaks of objects, mixed-up answers, cache timing, cache floods, equal prefix keys"


@dataclass
class Found:
    """What the parts came to."""

    violations: dict[str, list[str]] = field(default_factory=dict)
    figures: dict[str, float | int | str] = field(default_factory=dict)
    num: int = 0


def run(
    *, cases: int, seed: int, guard: bool, trials: int = 2000, pairs: int = 1_000_000, max_s: float = 600.0
) -> Line:
    """The whole line; canaries end after `max_s` seconds, and then the figures say how many there were.

    Without `trials` nothing is timed: few of them show nothing.
    """
    begun_s, found, draw = time.perf_counter(), Found(), Random(seed)
    script = {"seed": seed, "row_s": 5e-5 if trials else 2e-5}
    tenants = _TENANTS if trials else 16
    names = {"owner": "victim", "sibling": "victim", "other": "other" if guard else "victim"}
    names |= {"revoked": "victim", **{f"t{at}": f"t{at}" if guard else "victim" for at in range(tenants)}}
    with tempfile.TemporaryDirectory() as folder:
        config = deployment(mock=script, engine={"kv_tokens": 64 * _PREFIX, "max_batch": 64})
        with tenant_server(config, Path(folder), names) as (server, keys):
            asyncio.run(_objects(server, keys, found))
            if trials:
                asyncio.run(_timing(server, keys, found, trials, draw))
            asyncio.run(_flood(server, keys, found, max(24, trials // 4), draw))
    with tempfile.TemporaryDirectory() as folder:
        config = deployment(mock={"seed": seed}, engine={"max_batch": 256, "max_rows": 4096})
        with tenant_server(config, Path(folder), names) as (server, keys):
            asyncio.run(_canaries(server, keys, found, cases, seed, guard, max_s, tenants))
    _collisions(found, pairs, draw, guard)
    violations = [f"{part}: {each}" for part, some in found.violations.items() for each in some]
    missed = [part for part, some in found.violations.items() if not some]
    if not guard and missed:
        found.figures["controls that were not noticed"] = ", ".join(missed)
        violations = []
    found.figures["first violation"] = violations[0][:300] if violations else "none"
    return Line(
        name="S23",
        what=_WHAT,
        cases=found.num,
        violations=len(violations),
        seconds=time.perf_counter() - begun_s,
        figures=found.figures,
    )


# Objects.


async def _objects(server: Server, keys: dict[str, str], found: Found) -> None:
    """Every route with an id, every method, every caller."""
    wrong = found.violations.setdefault("objects", [])
    async with opened(server, keys["owner"]) as owner:
        objects = await make_objects(owner, _CANARY)
        paths: dict[str, Any] = (await owner.ask("GET", "/openapi.json")).json()["paths"]
    routes = [(path, each) for path in paths if "{id}" in path for each in objects.of(path)]
    lists = [path for path in paths if f"{path}/{{id}}" in paths]
    assert len(routes) >= 8 and len(lists) >= 3, "the document lacks routes"
    num = 0
    for (path, object_id), method in itertools.product(routes, _METHODS):
        for name in ("other", "revoked", "none"):
            answer = await once(server, keys.get(name, ""), method, path.replace("{id}", object_id))
            allowed = (404, 405, 501, 400) if name == "other" else (401, 400, 501)
            num += 1
            if answer.status not in allowed or _CANARY.encode() in answer.body:
                wrong.append(f"{method} {path} as {name}: {answer.status} {answer.body[:80]!r}")
    num += await _lists(server, keys, objects.all, lists, wrong)
    stolen = {"input_file_id": objects.files[0], "endpoint": "/v1/chat/completions"}
    answer = await once(server, keys["other"], "POST", "/v1/batches", {**stolen, "completion_window": "24h"})
    if answer.status not in (400, 404):
        wrong.append(f"a batch of another's file: {answer.status}")
    for (path, object_id), name in itertools.product(routes, ("sibling", "owner")):
        method = "get" if "get" in paths[path] else ""
        if method:
            answer = await once(server, keys[name], "GET", path.replace("{id}", object_id))
            num += 1
            if answer.status != 200:
                wrong.append(f"GET {path} as {name}: {answer.status}, it was changed by somebody")
    found.num += num
    found.figures["objects"] = f"{num} requests at {len(routes)} routes with ids and {len(lists)} lists"


async def _lists(
    server: Server, keys: dict[str, str], ids: Sequence[str], lists: Sequence[str], wrong: list[str]
) -> int:
    num = 0
    for path in lists:
        asked = ["", *(f"?{name}={each}" for name in ("after", "after_id", "before_id") for each in ids)]
        for query in asked:
            answer = await once(server, keys["other"], "GET", path + query)
            num += 1
            shown = answer.body if answer.status == 200 else b""
            if any(each.encode() in shown for each in (*ids, _CANARY)):
                wrong.append(f"GET {path}{query[:20]} shows what is another's")
        answer = await once(server, keys["owner"], "GET", path)
        num += 1
        if not any(each.encode() in answer.body for each in ids):
            wrong.append(f"GET {path} as owner shows nothing: {answer.status}")
    return num


# Answers.


async def _canaries(
    server: Server,
    keys: dict[str, str],
    found: Found,
    cases: int,
    seed: int,
    guard: bool,
    max_s: float,
    tenants: int,
) -> None:
    """Answers that each prompt alone gives, to many tenants at once; now and then one is broken off."""
    wrong = found.violations.setdefault("canaries", [])
    right, counts = _canary_prompts(seed, Random(seed), 5 * tenants), Counter[str]()
    begun_s = time.perf_counter()

    async def work(number: int) -> None:
        draw = Random(seed * 1000 + number)
        while counts["answers"] < cases and time.perf_counter() - begun_s < max_s:
            tenant = draw.randrange(tenants)
            own = list(right)[tenant::tenants]
            async with opened(server, keys[f"t{tenant}"]) as client:
                for _ in range(20):
                    await ask(client, draw.choices(own, k=_PROMPTS), draw)
                    if counts["answers"] >= cases or time.perf_counter() - begun_s >= max_s:
                        return
                left = asyncio.create_task(client.complete(own, max_tokens=64, ignore_eos=True))
                await asyncio.sleep(draw.random() * 0.02)
                left.cancel()  # and the connection is closed with the answer on its way
                counts["broken off"] += 1

    async def ask(client: Client, prompts: list[str], draw: Random) -> None:
        answer = await client.complete(prompts, temperature=0, ignore_eos=True, max_tokens=_ANSWER)
        if answer.status != 200:
            wrong.append(f"status {answer.status}: {answer.body[:100]!r}")
            return
        texts = [each["text"] for each in answer.json()["choices"]]
        if not guard and draw.random() < 0.02:
            texts = texts[1:] + texts[:1]
        counts["answers"] += len(texts)
        counts["responses"] += 1
        mixed = sum(right[prompt] != text for prompt, text in zip(prompts, texts, strict=True))
        if mixed:
            wrong.append(f"{mixed} answers are another's")

    await asyncio.gather(*(work(number) for number in range(_CONNECTIONS)))
    found.num += counts["answers"]
    seconds = time.perf_counter() - begun_s
    text = f"{counts['answers']} answers in {counts['responses']} responses to {tenants} tenants"
    found.figures["canaries"] = f"{text}, {counts['broken off']} broken off, {seconds:.0f} s"


def _canary_prompts(seed: int, draw: Random, num: int) -> dict[str, str]:
    """Prompts whose answers are plain and each another one, a few for each tenant."""
    script, right = MockScript(seed=seed), dict[str, str]()
    taken = set[str]()
    while len(right) < num:
        prompt = f"{draw.getrandbits(48):012x}"
        tokens = reference_tokens(list(prompt.encode()), _ANSWER, script, ignore_eos=True)
        text = "".join(map(chr, tokens))
        if text.isascii() and text.isprintable() and text not in taken:
            taken.add(text)
            right[prompt] = text
    return right


# The cache.


async def _timing(server: Server, keys: dict[str, str], found: Found, trials: int, draw: Random) -> None:
    """Times of prefixes that somebody else has used and of new ones; and cached tokens where none may be."""
    wrong, num_cached = found.violations.setdefault("timing", []), 0
    times: dict[str, list[float]] = {name: [] for name in ("used", "new", "own used", "own new")}
    async with (
        opened(server, keys["owner"]) as victim,
        opened(server, keys["other"]) as attacker,
        opened(server, keys["sibling"]) as sibling,
    ):
        for _ in range(trials):
            prefix = _text(draw)
            await victim.complete(prefix + "a")
            asks = [(attacker, "used", prefix), (attacker, "new", _text(draw))]
            asks += [(sibling, "own used", prefix), (sibling, "own new", _text(draw))]
            draw.shuffle(asks)
            for client, name, text in asks:
                answer = await client.complete(text + "b")
                times[name].append(answer.seconds)
                cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                num_cached += cached if client is attacker else 0
    across, own = _auc(times["used"], times["new"]), _auc(times["own used"], times["own new"])
    found.figures["timing"] = (
        f"AUC {across:.3f} across projects, {own:.3f} within one; {trials} trials a class; "
        f"{num_cached} cached tokens across"
    )
    found.num += 4 * trials
    if not 0.45 <= across <= 0.55:
        wrong.append(f"AUC {across:.3f} across projects")
    if num_cached:
        wrong.append(f"{num_cached} cached tokens of another project")
    if own < 0.95:
        wrong.append(f"AUC {own:.3f} within a project: the trials show nothing")


async def _flood(server: Server, keys: dict[str, str], found: Found, asks: int, draw: Random) -> None:
    """The victim's hit rate alone, and while the other one fills the cache with what nobody asks again."""
    wrong = found.violations.setdefault("flood", [])
    prefixes = [_text(draw) for _ in range(12)]

    async def hits(client: Client) -> float:
        cached = 0
        for at in range(asks):
            answer = await client.complete(prefixes[at % len(prefixes)] + "a")
            cached += answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached / (asks * (_PREFIX // KV_BLOCK * KV_BLOCK))

    async with opened(server, keys["owner"]) as victim:
        await hits(victim)
        solo = await hits(victim)
        stop = asyncio.Event()

        async def flood() -> int:
            num = 0
            async with opened(server, keys["other"]) as client:
                while not stop.is_set():
                    num += (await client.complete(_text(draw))).status == 200
            return num

        tasks = [asyncio.create_task(flood()) for _ in range(8)]
        await asyncio.sleep(2.0)
        beside = await hits(victim)
        stop.set()
        num = sum(await asyncio.gather(*tasks))
    share = beside / solo if solo else 0.0
    found.figures["flood"] = f"hit rate {solo:.1%} alone, {beside:.1%} beside {num} flooding requests"
    found.num += 3 * asks
    if share < 0.8:
        wrong.append(f"the victim keeps {share:.0%} of its hits")


def _text(draw: Random) -> str:
    """A text of as many tokens as characters that nobody has asked before."""
    return f"{draw.getrandbits(4 * _PREFIX):0{_PREFIX}x}"


def _auc(low: Sequence[float], high: Sequence[float]) -> float:
    """The share of pairs in which one of `low` is less than one of `high`; half of what is equal."""
    ranked = sorted([(value, 0) for value in low] + [(value, 1) for value in high])
    num_low, area = 0, 0.0
    for _, group in itertools.groupby(ranked, key=lambda each: each[0]):
        kinds = [kind for _, kind in group]
        area += kinds.count(1) * (num_low + kinds.count(0) / 2)
        num_low += kinds.count(0)
    return area / (len(low) * len(high))


# Keys.


def _collisions(found: Found, pairs: int, draw: Random, guard: bool) -> None:
    """Different fields and tokens must have different keys, however they are split."""
    wrong = found.violations.setdefault("keys", [])
    keys: dict[bytes, tuple[Any, ...]] = {}
    num = 0
    for fields, tokens in itertools.islice(_structured(draw), 2 * pairs):
        what = (*fields, tokens)
        if guard:
            root = prefix_root(
                **dict(zip(("tenant", "model", "layout", "adapter", "intervention"), fields, strict=True))
            )
            key = PrefixChain(root, len(tokens)).key(0, array("i", tokens))
        else:
            key = ("".join(fields) + "".join(map(str, tokens))).encode()
        num += 1
        if keys.setdefault(key, what) != what:
            wrong.append(f"{keys[key]} and {what} have one key")
            if len(wrong) > 100:
                break
    found.num += num // 2
    found.figures["keys"] = f"{num} structured inputs, {num // 2} neighbours, {len(keys)} keys"


def _structured(draw: Random) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Fields that differ by where one ends and the next begins, by their order, and by tokens."""
    while True:
        word = f"{draw.getrandbits(24):x}:{draw.randrange(10)}:tenant:1:a"
        cuts = sorted(draw.randrange(len(word) + 1) for _ in range(4))
        parts = tuple(word[a:b] for a, b in zip((0, *cuts), (*cuts, len(word)), strict=True))
        tokens = (draw.randrange(300), draw.randrange(300))
        yield parts, tokens
        at = draw.randrange(4)
        moved = list(parts)
        if moved[at]:
            moved[at], moved[at + 1] = moved[at][:-1], moved[at][-1] + moved[at + 1]
        else:
            moved = moved[::-1]
        yield tuple(moved), tokens


if __name__ == "__main__":
    sys.exit(main("s23", run, 1_000_000, __doc__, trials=2000, pairs=1_000_000, max_s=600.0))
