"""Is the gate honest? Synthetic items with known truth are judged, and the rates of the verdicts are counted.

`python -m scripts.gate_honesty` makes the table of docs/statistics.md with 2,000 runs a row. A row holds
unless what was counted would happen with a probability below 0.001 if the stated rate were true. The rows
named "wrong" judge in ways that are known to be wrong, and must be caught.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenmill.evals.statistics import (
    Difference,
    Interval,
    MeanBootstrap,
    PairedCounts,
    cost_per_pass,
    exact_interval,
    items_needed,
    mean_interval,
    quantile_interval,
    retention,
    verdicts,
    wilson_interval,
)
from tokenmill.evals.statistics.interval import binomial_tail, normal_quantile

NUM_RUNS = 2000
MARGIN = 0.05
CONFIDENCE = 0.95
DISAGREEMENT = 0.1
_NUM_RESAMPLES = 2000

Draw = Callable[[np.random.Generator], Difference]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: what was counted in how many runs, and the rate that was stated for it."""

    name: str
    stated: str
    num_hits: int
    num_runs: int
    holds: bool

    @property
    def cells(self) -> list[str]:
        """For the table."""
        share = self.num_hits / self.num_runs
        return [self.name, self.stated, f"{share:.1%}", str(self.num_runs), "yes" if self.holds else "no"]


def at_most(name: str, hits: int, runs: int, rate: float) -> Row:
    """A row whose share must not be above a rate."""
    holds = binomial_tail(hits, runs, rate) >= 0.001
    return Row(name=name, stated=f"<= {rate:.0%}", num_hits=hits, num_runs=runs, holds=holds)


def at_least(name: str, hits: int, runs: int, rate: float) -> Row:
    """A row whose share must not be below a rate."""
    holds = binomial_tail(runs - hits, runs, 1 - rate) >= 0.001
    return Row(name=name, stated=f">= {rate:.0%}", num_hits=hits, num_runs=runs, holds=holds)


def counts(num: int, difference: float, disagreement: float = DISAGREEMENT) -> Draw:
    """Items that are right or wrong, with a true difference and share of disagreement."""
    shares = [(disagreement + difference) / 2, (disagreement - difference) / 2, 1 - disagreement]

    def draw(rng: np.random.Generator) -> PairedCounts:
        wins, losses, _ = rng.multinomial(num, shares)
        return PairedCounts(int(wins), int(losses), num)

    return draw


def graded(num: int, difference: float) -> Draw:
    """Scores in steps of a quarter: small gains are common, whole losses are rare."""
    gain = 0.12
    loss = 0.25 * gain - difference

    def draw(rng: np.random.Generator) -> MeanBootstrap:
        values_N = rng.choice([0.25, -1.0, 0.0], size=num, p=[gain, loss, 1 - gain - loss])
        return MeanBootstrap.of(values_N, seed=int(rng.integers(1 << 30)), num_resamples=_NUM_RESAMPLES)

    return draw


def conversations(num: int, difference: float) -> Draw:
    """Items in conversations of one to nine, half of which are much more in disagreement than the others."""

    def draw(rng: np.random.Generator) -> MeanBootstrap:
        values_N, cluster_N = clustered(rng, num, difference)
        seed = int(rng.integers(1 << 30))
        return MeanBootstrap.of(values_N, cluster_N.tolist(), seed=seed, num_resamples=_NUM_RESAMPLES)

    return draw


def clustered(
    rng: np.random.Generator, num: int, difference: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Differences of items and the conversation of each."""
    sizes_G = rng.integers(1, 10, size=num)
    cluster_N = np.repeat(np.arange(num), sizes_G)
    # Both the level and the amount of disagreement are the conversation's own.
    shift_G = rng.choice([-0.4, 0.4], size=num)
    wins_N = 0.5 * (0.5 + difference + shift_G[cluster_N])
    losses_N = 0.5 * (0.5 - difference - shift_G[cluster_N])
    place_N = rng.random(len(cluster_N))
    values_N = np.where(place_N < wins_N, 1.0, np.where(place_N < wins_N + losses_N, -1.0, 0.0))
    return values_N, cluster_N


def gate_rows(num_runs: int) -> Iterator[Row]:
    """The two errors of the verdict at the margin, and its power at the planned size."""
    for num in (1, 20):
        yield from errors(
            f"right or wrong, 400 items, {num} at the margin", counts(400, -MARGIN), num, num_runs
        )
        planned = items_needed(MARGIN, disagreement=DISAGREEMENT, confidence=CONFIDENCE, num_candidates=num)
        good, bad = counts(planned, 0.0), counts(planned, -MARGIN)
        yield power(f"an equal one of {num}, {planned} items as planned", good, bad, num, num_runs)
    rare = counts(400, -0.02, 0.03)
    yield from errors("right or wrong, 3 % disagree, margin 0.02, 20", rare, 20, num_runs, margin=0.02)
    for num in (1, 20):
        yield from errors(f"graded and skewed, 200 items, {num}", graded(200, -MARGIN), num, num_runs)


def cluster_rows(num_runs: int) -> Iterator[Row]:
    """The two errors where the items of a conversation hang together."""
    for num in (1, 20):
        yield from errors(f"100 conversations, {num}", conversations(100, -MARGIN), num, num_runs)


def errors(name: str, draw: Draw, num: int, num_runs: int, margin: float = MARGIN) -> Iterator[Row]:
    """How often a candidate exactly at the margin, or any of `num` such, is passed or failed."""
    rng = np.random.default_rng(len(name) + num)
    passed = failed = 0
    for _ in range(num_runs):
        found = verdicts({str(at): draw(rng) for at in range(num)}, margin=margin, confidence=CONFIDENCE)
        outcomes = {each.outcome for each in found.values()}
        passed += "pass" in outcomes
        failed += "fail" in outcomes
    yield at_most(f"{name}: passed", passed, num_runs, 1 - CONFIDENCE)
    yield at_most(f"{name}: failed", failed, num_runs, 1 - CONFIDENCE)


def power(name: str, good: Draw, bad: Draw, num: int, num_runs: int) -> Row:
    """How often the good candidate among bad ones passes."""
    rng = np.random.default_rng(num)
    passed = 0
    for _ in range(num_runs):
        draws = {"good": good(rng)} | {str(at): bad(rng) for at in range(1, num)}
        passed += verdicts(draws, margin=MARGIN, confidence=CONFIDENCE)["good"].outcome == "pass"
    return at_least(f"{name}: passed", passed, num_runs, 0.8)


def coverage_rows(num_runs: int) -> Iterator[Row]:
    """How often the intervals hold the truth."""
    makers: dict[str, Callable[[np.random.Generator], tuple[Interval, float]]] = {
        "wilson, 50 items, any share": lambda rng: share_case(rng, wilson_interval),
        "exact, 50 items, any share": lambda rng: share_case(rng, exact_interval),
        "difference of right and wrong, 300 items": difference_case,
        "difference, graded and skewed, 300 items": graded_case,
        "difference in 100 conversations": cluster_case,
        "mean of seconds, log-normal, 300 items": seconds_case,
        "p99 of 1,000 values": lambda rng: p99_case(rng, 1000),
        "cost per passing answer, 200 items, half pass": lambda rng: cost_case(rng, 0.5),
        "cost per passing answer, 200 items, 3 % pass": lambda rng: cost_case(rng, 0.03),
        "retention, 400 items, chance 0.25": retention_case,
    }
    for name, make in makers.items():
        rng = np.random.default_rng(len(name))
        hits = 0
        for _ in range(num_runs):
            interval, truth = make(rng)
            hits += interval.low <= truth <= interval.high
        yield at_least(f"covers: {name}", hits, num_runs, CONFIDENCE)


def share_case(rng: np.random.Generator, maker: Callable[..., Interval]) -> tuple[Interval, float]:
    """A share drawn anew for every run."""
    truth = float(rng.random())
    return maker(int(rng.binomial(50, truth)), 50, confidence=CONFIDENCE), truth


def difference_case(rng: np.random.Generator) -> tuple[Interval, float]:
    """Pairs of right and wrong."""
    return counts(300, -0.03)(rng).interval(CONFIDENCE), -0.03


def graded_case(rng: np.random.Generator) -> tuple[Interval, float]:
    """Pairs of graded scores."""
    return graded(300, -0.03)(rng).interval(CONFIDENCE), -0.03


def cluster_case(rng: np.random.Generator) -> tuple[Interval, float]:
    """Pairs in conversations."""
    return conversations(100, -0.03)(rng).interval(CONFIDENCE), -0.03


def seconds_case(rng: np.random.Generator) -> tuple[Interval, float]:
    """A mean with a long tail."""
    values_N = rng.lognormal(0.0, 1.0, size=300)
    seed = int(rng.integers(1 << 30))
    found = mean_interval(values_N, confidence=CONFIDENCE, seed=seed, num_resamples=_NUM_RESAMPLES)
    return found, math.exp(0.5)


def p99_case(rng: np.random.Generator, num: int) -> tuple[Interval, float]:
    """A tail quantile of log-normal values."""
    truth = math.exp(normal_quantile(0.99))
    return quantile_interval(rng.lognormal(0.0, 1.0, size=num), 0.99, confidence=CONFIDENCE), truth


def cost_case(rng: np.random.Generator, share: float) -> tuple[Interval, float]:
    """Answers that cost more when they fail, for the model goes on for longer."""
    passes_N = (rng.random(200) < share).astype(np.float64)
    costs_N = rng.gamma(2.0, 1.0, size=200) * np.where(passes_N, 1.0, 1.5)
    truth = (2.0 * share + 3.0 * (1 - share)) / share
    return cost_per_pass(costs_N, passes_N, confidence=CONFIDENCE, num_resamples=_NUM_RESAMPLES), truth


def retention_case(rng: np.random.Generator) -> tuple[Interval, float]:
    """A student that is right where its teacher is, mostly."""
    teacher_N = rng.random(400) < 0.7
    student_N = np.where(rng.random(400) < 0.85, teacher_N, rng.random(400) < 0.4)
    truth = (0.85 * 0.7 + 0.15 * 0.4 - 0.25) / (0.7 - 0.25)
    student, teacher = student_N.astype(np.float64), teacher_N.astype(np.float64)
    return retention(student, teacher, chance=0.25, confidence=CONFIDENCE), truth


def wrong_rows(num_runs: int) -> Iterator[Row]:
    """Controls: ways to judge that are wrong, and must be caught by the same counting."""
    rng = np.random.default_rng(7)
    point = normal_quantile(CONFIDENCE)
    best, unpaired, split = 0, 0, 0
    for _ in range(num_runs):
        many = [counts(400, -MARGIN)(rng) for _ in range(20)]
        best += any(each.p_above(-MARGIN) <= 1 - CONFIDENCE for each in many)
        planned = items_needed(MARGIN, disagreement=DISAGREEMENT, confidence=CONFIDENCE)
        equal = counts(planned, 0.0)(rng)
        # The z-test of two samples, as if the items were not the same: a share of 0.8 each.
        unpaired += equal.mean + MARGIN > point * math.sqrt(2 * 0.8 * 0.2 / planned)
        values_N, _ = clustered(rng, 150, -MARGIN)
        error = values_N.std() / math.sqrt(len(values_N))
        split += values_N.mean() + MARGIN > point * error
    yield at_most("wrong: best of 20 at the margin, not corrected: passed", best, num_runs, 1 - CONFIDENCE)
    yield at_least("wrong: unpaired z-test of an equal one: passed", unpaired, num_runs, 0.8)
    yield at_most("wrong: 150 conversations as if items were alone: passed", split, num_runs, 1 - CONFIDENCE)


def main() -> int:
    """Print the table; 1 if a row does not hold, or a wrong way is not caught."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--runs", type=int, default=NUM_RUNS, metavar="N", help="runs a row")
    num_runs = parser.parse_args().runs
    print("| what | stated | counted | runs | holds |\n|---|---:|---:|---:|---|")
    is_honest = True
    for maker in (gate_rows, cluster_rows, coverage_rows, wrong_rows):
        for row in maker(num_runs):
            print(f"| {' | '.join(row.cells)} |", flush=True)
            is_honest &= row.holds != row.name.startswith("wrong")
    return 0 if is_honest else 1


if __name__ == "__main__":
    sys.exit(main())
