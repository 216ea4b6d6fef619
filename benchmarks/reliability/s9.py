"""Line S9: upstreams that fail. No cut stream may look like an answer, and no outage may be made worse.

    python -m benchmarks.reliability.s9 --cases 1920
    python -m benchmarks.reliability.s9 --cases 960 --guard off

Twelve faults at four places of a stream, of either API, over real sockets, with a healthy deployment behind
the faulty one: what fails before its first token must be answered by the other one or be an error, what
fails later must be an error, and the record of every attempt must fit. Then an upstream that is down for a
minute at 500 calls a second, in virtual time. With `--guard off` an answer that has begun counts as ended
however its stream ends, and there is neither breaker nor budget: both parts must notice.
"""

import asyncio
import math
import os
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from unittest.mock import patch

from benchmarks.reliability import command
from benchmarks.reliability.fault_proxy import FAULTS, PHASES, PROMPT_TOKENS, Case, FaultProxy, certificate
from benchmarks.reliability.scripted_backend import ScriptedBackend
from benchmarks.reliability.virtual_time import run_virtual
from scripts.scorecard import Line
from tokenmill.core import EndpointError, Message, TokenmillError
from tokenmill.router import (
    AttemptRecord,
    BreakerConfig,
    BudgetConfig,
    Job,
    Price,
    RouteConfig,
    Router,
    TargetConfig,
    UpstreamBackend,
    UpstreamConfig,
)
from tokenmill.router.answer import UpstreamAnswer
from tokenmill.wire import Api, Call, Finish, Piece, TextPiece

__all__ = ["Outage", "main", "outage", "run", "run_faults"]

_APIS: tuple[Api, ...] = ("openai", "anthropic")
_KINDS = len(FAULTS) * len(PHASES) * len(_APIS)
_PRICE = Price(input_usd=0.25, output_usd=2.0)
_OPEN = 32
_PATIENCE_S = 20.0
_MOST_ATTEMPTS = 1.2
_INTERVAL_S = 10.0
_NO_BREAKER = BreakerConfig(failures=1 << 20, window=1 << 20, share=1.0)
_NO_BUDGET = BudgetConfig(share=1.0, spare=1000)
_WHAT = "upstream faults: cut streams that look like answers, wrong records, outages made worse"


@dataclass
class _Found:
    """What the cases came to."""

    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class _Believing(UpstreamAnswer):
    """The control: what has begun counts as ended, as servers do that make up an end."""

    @property
    def is_complete(self) -> bool:
        return self.has_token or super().is_complete

    def end(self) -> Iterator[Piece]:
        yield Finish("completed")


def run(*, cases: int, seed: int, guard: bool, rate: int = 500, down_s: int = 60) -> Line:
    """At least `cases` faults, as many of each kind, and an outage of `down_s` seconds."""
    began_s = time.monotonic()
    found, num_cases = run_faults(cases, seed, guard=guard)
    outages = {kind: outage(kind, seed, guard=guard, rate=rate, down_s=down_s) for kind in _OUTAGES}
    worse = [f"{kind}: {each.fault}" for kind, each in outages.items() if each.fault]
    violations = found.violations + worse
    if not guard and not (found.violations and worse):
        violations = []  # a control that was not noticed: the line fails
    figures: dict[str, float | int | str] = dict(sorted(found.counts.items()))
    for kind, each in outages.items():
        figures[f"outage, {kind}"] = str(each)
    figures["first violation"] = violations[0][:300] if violations else "none"
    return Line(
        name="S9",
        what=_WHAT,
        cases=num_cases + len(outages),
        violations=len(violations),
        seconds=time.monotonic() - began_s,
        figures=figures,
    )


def run_faults(cases: int, seed: int, *, guard: bool) -> tuple[_Found, int]:
    """The faults over sockets; how many there were."""
    made = _cases(cases, seed)
    answer = UpstreamAnswer if guard else _Believing
    with patch("tokenmill.router.upstream.UpstreamAnswer", answer):
        return asyncio.run(_faults(made)), len(made)


def _cases(cases: int, seed: int) -> list[Case]:
    """As many of each kind, in random order."""
    random = Random(seed)
    made: list[Case] = []
    for repeat in range(math.ceil(cases / _KINDS)):
        for api in _APIS:
            for fault in FAULTS:
                for phase in range(len(PHASES)):
                    name = f"{api}-{fault}-{phase}-{repeat}"
                    words = tuple(f"{len(made)}.{at} " for at in range(random.randint(3, 12)))
                    made.append(
                        Case(
                            id=name,
                            api=api,
                            fault=fault,
                            phase=phase,
                            seed=random.getrandbits(40),
                            words=words,
                        )
                    )
    random.shuffle(made)
    return made


async def _faults(cases: list[Case]) -> _Found:
    found = _Found()
    with tempfile.TemporaryDirectory() as folder:
        cert, key = certificate(Path(folder))
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(cert, key)
        async with FaultProxy(cases, tls).running() as proxy:
            with _trusted(cert):
                router = _router(proxy)
            todo = iter(cases)

            async def work() -> None:
                for case in todo:
                    await _try(router, case, found)

            await asyncio.gather(*(work() for _ in range(_OPEN)))
            await router.close()
            if len(asyncio.all_tasks()) > 1 + proxy.num_asked:
                found.violations.append("tasks are left")
    return found


@contextmanager
def _trusted(cert: Path) -> Iterator[None]:
    """Trust this certificate in what is opened meanwhile."""
    before = os.environ.get("SSL_CERT_FILE")
    os.environ["SSL_CERT_FILE"] = str(cert)
    try:
        yield
    finally:
        del os.environ["SSL_CERT_FILE"]
        if before is not None:
            os.environ["SSL_CERT_FILE"] = before


def _router(proxy: FaultProxy) -> Router:
    """For each API a route over TLS and one without: the faulty deployment first, then the healthy one."""
    backends, routes = [], []
    for api in _APIS:
        for scheme, port in (("http", proxy.port), ("https", proxy.tls_port)):
            names = [f"{api}-{scheme}-{model}" for model in ("faulty", "healthy")]
            for name in names:
                config = UpstreamConfig(
                    name=name,
                    url=f"{scheme}://127.0.0.1:{port}/v1",
                    model=name.rpartition("-")[2],
                    api=api,
                    price=_PRICE,
                    first_token_s=2.0,
                    between_s=1.0,
                    total_s=_PATIENCE_S / 2,
                )
                backends.append(UpstreamBackend(config))
            targets = (TargetConfig(backend=names[0]), TargetConfig(backend=names[1], weight=0.0))
            routes.append(RouteConfig(name=f"{api}-{scheme}", targets=targets, max_attempts=2))
    return Router(backends, routes, breaker=_NO_BREAKER)


async def _try(router: Router, case: Case, found: _Found) -> None:
    """Ask for one case, and compare what came with what must come."""
    scheme = "https" if case.fault == "TLS cut" else "http"
    call = Call(model=f"{case.api}-{scheme}", messages=(Message(role="user", content=case.id),), stream=True)
    routed = router.start(await router.prepare(call), Job(request_id=case.id))
    pieces: list[Piece] = []
    error: TokenmillError | None = None
    try:
        async with asyncio.timeout(_PATIENCE_S):
            async for piece in routed:
                pieces.append(piece)
    except TokenmillError as raised:
        error = raised
    except TimeoutError:
        found.violations.append(f"{case.id}: no end in {_PATIENCE_S:g} s")
        return
    records = await routed.spent()
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    has_end = any(isinstance(piece, Finish) for piece in pieces)
    outcome = _outcome(case, text, has_end, error, records)
    wrong = _wrong(case, outcome) or _wrong_record(case, outcome, text, records[-1])
    found.counts[outcome] += 1
    if wrong:
        found.violations.append(f"{case.id}: {wrong}")


def _outcome(
    case: Case, text: str, has_end: bool, error: TokenmillError | None, records: tuple[AttemptRecord, ...]
) -> str:
    """What the client saw."""
    if error is not None:
        return "end and error" if has_end else "error" if case.text.startswith(text) else "wrong text, error"
    if not has_end:
        return "neither end nor error"
    if text == case.text:
        return "whole" if len(records) == 1 else "whole, from the other deployment"
    if case.fault == "duplicate chunk" and _is_doubled(text, case.words):
        return "whole, with the piece that was sent twice"
    return "cut, and it looks whole" if case.text.startswith(text) else "wrong text"


def _is_doubled(text: str, words: tuple[str, ...]) -> bool:
    return any("".join((*words[: at + 1], *words[at:])) == text for at in range(len(words)))


def _wrong(case: Case, outcome: str) -> str:
    """Why an outcome is none that may be, or nothing."""
    good = {"error"} if case.phase >= 2 else {"error", "whole, from the other deployment"}
    if case.fault == "duplicate chunk":
        good = {"whole", "whole, with the piece that was sent twice", "error"}
    elif case.fault == "no [DONE]" and case.phase == 3:
        good = {"whole"}
    elif case.fault == "wrong content type":
        good = {"error", "whole, from the other deployment"}  # seen before the first token
    return "" if outcome in good else outcome


def _wrong_record(case: Case, outcome: str, text: str, record: AttemptRecord) -> str:
    """What is wrong with the record of the attempt that the client saw."""
    usage, spent = record.spent.usage, record.spent
    if spent.cost_nano_usd != _PRICE.cost_nano_usd(usage):
        return f"a cost of {spent.cost_nano_usd} for {usage}"
    if outcome.startswith("whole"):
        is_right = (usage.num_prompt_tokens, usage.num_output_tokens) == (PROMPT_TOKENS, len(case.words))
        return "" if is_right and spent.is_exact and spent.finish == "completed" else f"recorded as {spent}"
    num_words = text.count(" ")
    is_right = spent.finish == "failed" and bool(record.error) and usage.num_output_tokens >= num_words
    return "" if is_right and not (text and spent.is_exact) else f"recorded as {spent}"


# An upstream that is down.

_OUTAGES: Mapping[str, tuple[float | TokenmillError, ...]] = {
    "refused at once": (0.001, EndpointError("no connection", hint="up?")),
    "late": (1.0, EndpointError("no token in 1 s", hint="up?")),
}


@dataclass(frozen=True, kw_only=True)
class Outage:
    """What an upstream that was down got: attempts, and the tries of its breaker."""

    num_requests: int
    num_attempts: int
    num_probes: int
    shortest_s: float
    healed_s: float

    @property
    def fault(self) -> str:
        """What of it may not be."""
        if self.num_attempts > _MOST_ATTEMPTS * self.num_requests:
            return f"{self.num_attempts} attempts for {self.num_requests} calls"
        if self.num_probes > 1 and self.shortest_s < _INTERVAL_S:
            return f"two tries within {self.shortest_s:.2f} s"
        return "" if self.healed_s <= _INTERVAL_S + 1.0 else f"healed after {self.healed_s:.1f} s"

    def __str__(self) -> str:
        share = self.num_attempts / self.num_requests
        return (
            f"{self.num_attempts} attempts for {self.num_requests} calls ({share:.4f} each), "
            f"{self.num_probes} tries at least {self.shortest_s:.1f} s apart, "
            f"answers again after {self.healed_s:.1f} s"
        )


def outage(kind: str, seed: int, *, guard: bool, rate: int, down_s: int) -> Outage:
    """An upstream that is down for so long while calls come at a rate; in virtual time."""
    return run_virtual(_outage(kind, seed, guard, rate, down_s))


async def _outage(kind: str, seed: int, guard: bool, rate: int, down_s: int) -> Outage:
    loop, script, events = asyncio.get_running_loop(), _OUTAGES[kind], list[float]()
    backend = ScriptedBackend("a", lambda number: script if loop.time() < down_s else (0.001, "ok"))
    router = Router(
        [backend],
        breaker=BreakerConfig(open_s=_INTERVAL_S) if guard else _NO_BREAKER,
        budget=None if guard else _NO_BUDGET,
        random=Random(seed),
        clock=loop.time,
        on_event=lambda event: events.append(loop.time()) if event.kind == "breaker-half-open" else None,
    )
    call = Call(model="a", messages=(Message(role="user", content="Hi"),))
    healed: list[float] = []

    async def one(at: int) -> None:
        await asyncio.sleep(at / rate)
        routed = router.start(await router.prepare(call), Job(request_id=str(at)))
        try:
            async for _ in routed:
                pass
            healed.append(loop.time())
        except TokenmillError:
            pass

    async with asyncio.TaskGroup() as group:
        for at in range(rate * (down_s + 15)):
            group.create_task(one(at))
    down = [at_s for at_s in backend.started_s if at_s < down_s]
    gaps = [later - before for before, later in pairwise(events)]
    return Outage(
        num_requests=rate * down_s,
        num_attempts=len(down),
        num_probes=sum(at_s < down_s for at_s in events),
        shortest_s=min(gaps, default=math.inf),
        healed_s=min(healed, default=math.inf) - down_s,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the line and print its record."""
    return command.main("s9", run, 20 * _KINDS, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
