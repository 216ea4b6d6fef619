"""A small workload, and candidates whose answers, speed and faults a test writes down."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tokenmill.core import TokenmillError, Usage, UsageError
from tokenmill.optimize import Artefact, Expected, Opened, Problem, Workshop, problem_of
from tokenmill.optimize.records import Kind, Lineage
from tokenmill.router.backend import BackendState, Embedded, Job, Prepared, Spent
from tokenmill.wire import Begin, Call, Finish, Piece, Prompt, TextPiece, TokenText, Totals
from tokenmill.workload import Incumbent, Quality, Terms, WorkloadConfig, read_rows, split_rows

__all__ = ["FakeBackend", "FakeCandidate", "question_of", "workload", "write_log"]

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("la", "mo", "ni", "ru", "ta", "xe")]
LABELS = ("refund", "balance", "transfer", "card")
PRICED = Incumbent(name="large", price_in=10.0, price_out=30.0, price_date="2026-08-01", price_source="test")


def write_log(
    path: Path, num_rows: int = 600, *, terms: Callable[[int], Sequence[str]] = lambda at: ("own",)
) -> Path:
    """A log of questions with their label as the answer: the label follows from a word of the question."""
    random = Random(5)
    with path.open("w", encoding="utf-8") as file:
        for at in range(num_rows):
            label = LABELS[at % len(LABELS)]
            words = random.sample(WORDS, 6)
            text = " ".join([*words[:3], f"{label}ing", *words[3:]])
            line = {
                "id": f"row-{at}",
                "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}],
                "terms": list(terms(at)),
                "usage": {"prompt_tokens": 40, "completion_tokens": 4},
            }
            file.write(json.dumps(line) + "\n")
    return path


def workload(folder: Path, num_rows: int = 600, **config: Any) -> Problem:
    """The problem of such a log."""
    terms = config.pop("row_terms", lambda at: ("own",))
    log = write_log(folder / "log.jsonl", num_rows, terms=terms)
    fields: dict[str, Any] = {
        "incumbent": PRICED,
        "quality": Quality(scorer="label", margin=0.05),
        "labels": LABELS,
        "price_per_hour": 0.1,
        **config,
    }
    found = WorkloadConfig(log=log, **fields)
    rows = read_rows(found)
    return problem_of(found, rows, split_rows(found, rows))


def question_of(call: Call) -> str:
    """What the user asked last."""
    return next(each.content or "" for each in reversed(call.messages) if each.role == "user")


def right(text: str) -> str:
    """The right label of a question."""
    return next(label for label in LABELS if f"{label}ing" in text)


def wrong(text: str) -> str:
    """Another label."""
    return LABELS[(LABELS.index(right(text)) + 1) % len(LABELS)]


class FakeBackend:
    """Answers with `answer(question)`: a text, and the probability that it gives itself."""

    name = model = "fake"
    is_local = True
    state: BackendState = "ready"

    def __init__(self, answer: Callable[[str], tuple[str, float]], delay_s: float = 0.0) -> None:
        self.answer = answer
        self.delay_s = delay_s
        self.calls: list[str] = []

    async def prepare(self, call: Call) -> Prepared:
        return Prepared(call=call, num_prompt_tokens=10, max_output_tokens=4)

    def start(self, prepared: Prepared, job: Job) -> "FakeAttempt":
        self.calls.append(question_of(prepared.call))
        return FakeAttempt(self, prepared.call, job)

    async def embed(self, texts: Sequence[Prompt], job: Job) -> Embedded:
        raise UsageError("a fake has no vectors")

    async def drain(self, deadline_s: float) -> None: ...

    async def close(self) -> None: ...


class FakeAttempt:
    def __init__(self, backend: FakeBackend, call: Call, job: Job) -> None:
        self._backend = backend
        self._call = call
        self._job = job

    async def __aiter__(self) -> AsyncIterator[Piece]:
        if self._backend.delay_s:
            await asyncio.sleep(self._backend.delay_s)
        text, probability = self._backend.answer(question_of(self._call))
        yield Begin(self._job.request_id, "fake")
        yield TextPiece(text, logprobs=(TokenText(text, math.log(probability)),))
        yield Finish("completed")
        yield Totals(_USAGE)

    def cancel(self) -> None: ...

    async def spent(self) -> Spent:
        return Spent(usage=_USAGE, finish="completed", nanoseconds=1_000_000)


_USAGE = Usage(num_prompt_tokens=10, num_cached_tokens=0, num_output_tokens=4)


@dataclass(kw_only=True)
class FakeCandidate:
    """A candidate of a test. `trained` are the ids that it says it saw; by default all that it was given."""

    name: str
    answer: Callable[[str], tuple[str, float]] = lambda text: (right(text), 0.9)
    delay_s: float = 0.0
    num_bytes: int = 1000
    kind: Kind = "model"
    is_control: bool = False
    is_trained: bool = False
    make_error: TokenmillError | None = None
    serve_error: TokenmillError | None = None
    trained: Sequence[str] | None = None
    make_s: float = 0.0
    num_made: int = 0
    backends: list[FakeBackend] = field(default_factory=list)
    on_open: Callable[["FakeCandidate"], None] = lambda candidate: None

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"fake": self.name}

    @property
    def num_asked(self) -> int:
        return sum(len(each.calls) for each in self.backends)

    def expected(self, workshop: Workshop, num_items: int) -> Expected:
        return Expected(self.make_s, 1.0)

    def make(self, workshop: Workshop, share: float) -> Artefact:
        self.num_made += 1
        if self.make_error is not None:
            raise self.make_error
        workshop.folder.mkdir(parents=True, exist_ok=True)
        (workshop.folder / "weights").write_text(self.name)
        seen = [case.id for case in workshop.train] if self.trained is None else self.trained
        return Artefact(
            path=str(workshop.folder),
            digest=f"digest of {self.name}",
            num_bytes=self.num_bytes,
            seconds=time.monotonic() * 0,
            lineage=(Lineage(what="model", name=self.name, digest="0" * 8, terms=("Apache-2.0",)),),
            trained_on=tuple(seen),
        )

    @asynccontextmanager
    async def opened(self, artefact: Artefact, workshop: Workshop) -> AsyncIterator[Opened]:
        self.on_open(self)
        if self.serve_error is not None:
            raise self.serve_error
        backend = FakeBackend(self.answer, self.delay_s)
        self.backends.append(backend)
        yield Opened(backend, lambda: 12345)

    def deployment(self, artefact: Artefact, name: str) -> Mapping[str, Any]:
        return {"models": [{"name": name, "model": artefact.path}]}


ALLOWED = Terms(answers=("own",))
