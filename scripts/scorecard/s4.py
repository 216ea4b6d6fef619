"""S4: the engine's core under random histories (reliability.md F02, F03, F04, F06).

`cases` are events: submissions of every kind, floods, cancellations, deadlines, guesses right and wrong,
taps, adapters, forks, and steps of engines most of which are too small. A violation is what `machine.py`
asserts: a block lost or shared wrongly, a request that ends twice, never, or with another answer than its
own tokens demand, starvation, a fifth preemption.

Without the guard two rules are broken, in turn: nobody is left alone after four preemptions, and the key of
a block does not say what came before it.
"""

import hashlib
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from random import Random
from typing import NamedTuple
from unittest.mock import patch

from tqdm import tqdm

from scripts.scorecard import Line
from scripts.scorecard.machine import Machine, Sizes
from tokenmill.engine import scheduler
from tokenmill.kvcache import PrefixChain

__all__ = ["run"]

_EVENTS_PER_MACHINE = 2000


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """Run this many events; every machine that meets a violation counts once."""
    began, counts, violations, done = time.perf_counter(), Counter[str](), Counter[str](), 0
    # A history ends with some steps more, in which everything comes to its end.
    num_machines = max(2, -(-cases // _EVENTS_PER_MACHINE))
    num_events = min(cases, _EVENTS_PER_MACHINE)
    histories = [_History(seed * 1_000_003 + i, num_events, guard) for i in range(num_machines)]
    with ProcessPoolExecutor() as pool:
        results = pool.map(_live, histories, chunksize=8)
        for num_done, of_one, violation in tqdm(results, total=num_machines, unit="history", disable=None):
            counts += of_one
            done += num_done
            violations += Counter([violation] if violation else [])
    return Line(
        name="S4",
        what="random histories of the engine's core: blocks, answers, ends, starvation, preemptions",
        cases=done,
        violations=violations.total(),
        seconds=time.perf_counter() - began,
        figures={**dict(sorted(counts.items())), **{f"violation: {k}": n for k, n in violations.items()}},
    )


class _History(NamedTuple):
    seed: int
    num_events: int
    guard: bool


def _live(history: _History) -> tuple[int, Counter[str], str]:
    """How many events one machine went through, what it met, and the violation that ended it, if any."""
    seed, num_events, guard = history
    breaks = [_nothing] if guard else [_no_end_of_preemption, _keys_without_a_past]
    sizes = Sizes.drawn(Random(seed)) if guard else Sizes(num_blocks=7, max_sequences=3)
    with breaks[seed % len(breaks)]():
        machine = Machine(sizes, seed=seed)
        try:
            while machine.num_events < num_events:
                machine.random_event()
            machine.drain()
        except AssertionError as error:
            print(f"seed {seed}: {error}", file=sys.stderr)
            return machine.num_events, machine.counts, str(error).partition(" (")[0]
    return machine.num_events, machine.counts, ""


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _no_end_of_preemption() -> Iterator[None]:
    with patch.object(scheduler, "MAX_PREEMPTIONS", 1 << 30):
        yield


@contextmanager
def _keys_without_a_past() -> Iterator[None]:
    def key(chain: PrefixChain, index: int, tokens: "array[int]") -> bytes:
        return hashlib.sha256(chain.tokens_of(index, tokens)).digest()

    with patch.object(PrefixChain, "key", key):
        yield
