"""Line S16: hostile grammars. Each must be accepted or refused within two seconds, and the engine survive.

`python -m scripts.scorecard.s16` runs the long form. The control without the guard (no process, none of our
limits) runs in a child that it is expected to kill or to hang.
"""

import gzip
import json
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher

from scripts.scorecard import Line
from scripts.scorecard.hostile_grammars import Hostile, hostile_grammars, mutated
from tokenmill.core import Grammar, ResourceError, TokenmillError, UsageError
from tokenmill.engine.structured.compile_worker import library_tokenizer
from tokenmill.engine.structured.grammar import CheckedGrammar, GrammarCompiler

__all__ = ["run"]

_WHAT = (
    "hostile grammars and mutated schemas: each ends within 2 s, and nothing but an error of ours comes of it"
)
_SCHEMAS = Path(__file__).parents[3] / "shared/data/json_schemas/glaiveai2k.jsonl.gz"
_MAX_SECONDS = 2.0
_NUM_TOKENS = 8
_CONTROL_SECONDS = 12.0
_SHORT_FORM = 1000
_END = 256


class _PairTokens:
    """A vocabulary that needs no files: bytes, an end token, and all pairs of printable ASCII characters."""

    def __init__(self) -> None:
        printable = [chr(code) for code in range(0x20, 0x7F)]
        pairs = [(a + b).encode() for a in printable for b in printable]
        self.tokens = [*(bytes([code]) for code in range(256)), b"<end>", *pairs]

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id] if token_id < len(self.tokens) else b""

    def is_special(self, token_id: int) -> bool:
        return token_id == _END

    def encode_after(self, text: str) -> list[int]:
        return list(text.encode())


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """Grammars made by hand and `cases` mutated schemas; without the guard, until the first violation.

    With fewer than 1,000 mutations it is a short form, for the tests: every eighth of those made by hand.
    """
    started = time.monotonic()
    rng = random.Random(seed)
    schemas = _schemas()
    grammars = hostile_grammars()[:: 1 if cases >= _SHORT_FORM or not guard else 8]
    grammars += [Hostile("mutated", "json_schema", mutated(rng.choice(schemas), rng)) for _ in range(cases)]
    count, violations, figures = _guarded(grammars, seed) if guard else _unguarded(grammars)
    return Line(
        name="S16",
        what=_WHAT,
        cases=count,
        violations=violations,
        seconds=time.monotonic() - started,
        figures=figures,
    )


def _schemas() -> list[Any]:
    """Schemas to mutate: the collected ones, or where they are not at hand those of the hand-made set."""
    if _SCHEMAS.is_file():
        with gzip.open(_SCHEMAS, "rt") as lines:
            return [json.loads(line)["schema"] for line in lines]
    small = [each for each in hostile_grammars() if each.family in ("enum", "object", "anyOf", "nested")]
    return [json.loads(each.source) for each in small if len(each.source) < 2000]


def _guarded(grammars: list[Hostile], seed: int) -> tuple[int, int, dict[str, float | int | str]]:
    """Try each. The figures name the first violation and say how slow the slowest were."""
    outcomes: Counter[str] = Counter()
    violations: list[str] = []
    slowest_check = slowest_mask = 0.0
    before = _peak_mib()
    tokens = _PairTokens()
    with GrammarCompiler(tokens, len(tokens.tokens) + 7, [_END]) as compiler:
        compiler.check(Grammar(kind="json_object"))
        for index, (family, kind, source) in enumerate(grammars):
            began = time.monotonic()
            try:
                outcome, mask_seconds = _try(compiler, kind, source, random.Random(seed + index))
                slowest_mask = max(slowest_mask, mask_seconds)
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"[:200]
                violations.append(f"{family}: {outcome}")
            seconds = time.monotonic() - began
            slowest_check = max(slowest_check, seconds)
            outcomes[outcome] += 1
            if seconds > _MAX_SECONDS:
                violations.append(f"{family}: {seconds:.2f} s")
        cache_bytes = compiler.cache_bytes
        if cache_bytes > compiler.limits.cache_bytes:
            violations.append(f"the cache holds {cache_bytes} bytes")
    figures: dict[str, float | int | str] = {**outcomes}
    figures |= {
        "slowest_s": round(slowest_check, 3),
        "slowest_mask_ms": round(1e3 * slowest_mask, 2),
        "cache_mib": round(cache_bytes / 2**20, 1),
        "engine_grew_mib": round(_peak_mib() - before, 1),
        "first_violation": violations[0] if violations else "none",
    }
    return len(grammars), len(violations), figures


def _try(compiler: GrammarCompiler, kind: Any, source: str, rng: random.Random) -> tuple[str, float]:
    """How it ended, and the seconds of the slowest mask. Any error but ours is the caller's to count."""
    try:
        checked = compiler.check(Grammar(kind=kind, source=source), tenant=str(rng.randrange(8)))
    except UsageError:
        return "refused", 0.0
    except ResourceError:
        return "refused_as_too_costly", 0.0
    return _follow(checked, compiler.num_words, rng)


def _follow(checked: CheckedGrammar, num_words: int, rng: random.Random) -> tuple[str, float]:
    """Draw a few tokens. After the first mask a limit may end the sequence with an error of ours."""
    state, mask_W = checked.start(), np.empty(num_words, np.uint32)
    began = time.monotonic()
    state.fill_mask(mask_W)
    slowest = time.monotonic() - began
    for _ in range(_NUM_TOKENS):
        began = time.monotonic()
        try:
            state.fill_mask(mask_W)
            slowest = max(slowest, time.monotonic() - began)
            choices = np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))
            token_id = int(rng.choice(choices))
            state.accept(token_id)
        except TokenmillError:
            return "accepted_then_stopped_at_a_limit", slowest
        if token_id == _END:
            break
    return "accepted", slowest


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _unguarded(grammars: list[Hostile]) -> tuple[int, int, dict[str, float | int | str]]:
    """One child compiles all, one after the other, until it dies or one takes longer than two seconds."""
    command = [sys.executable, "-m", "scripts.scorecard.s16", "unguarded"]
    data = json.dumps([(kind, source) for _, kind, source in grammars])
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, text=True, timeout=_CONTROL_SECONDS, check=False
        )
        printed, ended = done.stdout, f"exit {done.returncode}"
    except subprocess.TimeoutExpired as late:
        printed, ended = (late.stdout or b"").decode(), f"killed after {_CONTROL_SECONDS:.0f} s"
    count = len(printed.splitlines())
    violated = count < len(grammars)
    family = grammars[count].family if violated else "none"
    return min(count + 1, len(grammars)), int(violated), {"first_violation": f"{family}: {ended}"}


def _compile_unguarded() -> None:
    """In the child of the control: a line for each grammar, until one is too slow."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # the machine is not part of the experiment
    tokens = _PairTokens()
    blank = [b"" if tokens.is_special(i) else token for i, token in enumerate(tokens.tokens)]
    tokenizer = library_tokenizer(blank, [_END], tokens.encode_after)
    compilers: dict[str, Callable[[str], str]] = {
        "json_schema": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
    }
    for kind, source in json.loads(sys.stdin.read()):
        began = time.monotonic()
        try:
            grammar = compilers.get(kind, LLMatcher.grammar_from_lark)(source)
            LLMatcher(tokenizer, grammar, log_level=0).compute_bitmask()
        except (ValueError, UnicodeEncodeError):
            pass
        if time.monotonic() - began > _MAX_SECONDS:
            raise SystemExit(f"{time.monotonic() - began:.1f} s")
        print(kind, flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["unguarded"]:
        _compile_unguarded()
    else:
        print(run(cases=5000, seed=16, guard=True))
        print(run(cases=0, seed=16, guard=False))
