"""The process that compiles grammars: what it bounds, that it may die, that it ends with its owner."""

import gc
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.scorecard import s16
from tests.fast.grammar_tools import END, PieceTokens
from tokenmill.core import Grammar, ResourceError
from tokenmill.core.sampling import GrammarKind
from tokenmill.engine import grammar_process, grammar_worker
from tokenmill.engine.grammar import GrammarCompiler, GrammarLimits

TOKENS = PieceTokens()
GOOD = Grammar(kind="regex", source="a|b")
# Need 10 s, 6 MB, 2 MB and 4,000 nested calls of the library.
SLOW = json.dumps({"type": "integer", "multipleOf": 999983})
LONG = json.dumps({"const": "a b" * 5000})
LARGE = json.dumps({"enum": [f"{i:0700d}" for i in range(90)]})
NESTED = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(4000)) + '\nr4000: "a"'


def compiler(**limits: Any) -> GrammarCompiler:
    return GrammarCompiler(TOKENS, TOKENS.vocab_size, [END], GrammarLimits(**limits))


@pytest.fixture
def running() -> Iterator[GrammarCompiler]:
    with compiler() as each:
        each.check(GOOD)
        yield each


def child_of(each: GrammarCompiler) -> int:
    assert each._process._child is not None
    return each._process._child.pid


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [("json_schema", SLOW, "time"), ("lark", NESTED, "memory or nesting")],
)
def test_what_takes_too_much_is_stopped(
    running: GrammarCompiler, kind: GrammarKind, source: str, message: str
) -> None:
    child, started = child_of(running), time.monotonic()
    with pytest.raises(ResourceError, match=message):
        running.check(Grammar(kind=kind, source=source))
    assert time.monotonic() - started < 2.0
    running.check(Grammar(kind="regex", source="next"))
    assert child_of(running) == child, "only the fork ends"


def test_memory_is_bounded() -> None:
    held = 64 << 20
    with compiler(memory_bytes=4 << 20, held_bytes=held) as small, compiler(held_bytes=held) as large:
        large.check(Grammar(kind="json_schema", source=LONG))
        with pytest.raises(ResourceError, match="memory"):
            small.check(Grammar(kind="json_schema", source=LONG))


def test_what_a_grammar_holds_is_bounded() -> None:
    with compiler(held_bytes=1 << 20) as small, pytest.raises(ResourceError, match="holds"):
        small.check(Grammar(kind="json_schema", source=LARGE))


def test_a_limit_that_was_reached_is_not_remembered(running: GrammarCompiler) -> None:
    before = running.cache_bytes
    with pytest.raises(ResourceError):
        running.check(Grammar(kind="lark", source=NESTED))
    assert running.cache_bytes == before


def test_a_killed_child_is_replaced(running: GrammarCompiler) -> None:
    child = child_of(running)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    running.check(Grammar(kind="regex", source="again"))
    assert child_of(running) != child and not is_running(child)


def test_a_child_that_hangs_is_killed_and_replaced(running: GrammarCompiler) -> None:
    child = child_of(running)
    os.kill(child, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(ResourceError, match="ended"):
        running.check(Grammar(kind="regex", source="again"))
    assert time.monotonic() - started < 2.0 and not is_running(child)
    running.check(Grammar(kind="regex", source="again"))


def test_a_child_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(1)")
    monkeypatch.setattr(grammar_worker, "__file__", str(broken))
    with compiler() as each, pytest.raises(ResourceError, match="does not start"):
        each.check(GOOD)


def test_a_queue_of_grammars_is_bounded(running: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_process, "_QUEUE_SECONDS", 0.05)
    with running._process._lock, pytest.raises(ResourceError, match="too many grammars"):
        running.check(Grammar(kind="regex", source="waits"))


def test_the_child_ends_with_its_owner() -> None:
    each = compiler()
    each.check(GOOD)
    child = child_of(each)
    each.close()
    assert not is_running(child)
    assert each.start(GOOD).num_valid([ord("a")]) == 1, "checked grammars stay usable"
    each.check(Grammar(kind="regex", source="starts another"))
    child = child_of(each)
    del each
    gc.collect()
    assert not is_running(child)


def test_short_form_of_s16_and_its_control() -> None:
    line = s16.run(cases=60, seed=1, guard=True)
    assert (line.name, line.violations) == ("S16", 0) and line.cases >= 120
    assert line.figures["accepted"] and line.figures["refused"], "both happen"
    assert s16.run(cases=0, seed=1, guard=False).violations >= 1
