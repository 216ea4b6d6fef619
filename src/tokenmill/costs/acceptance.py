"""What speculation and cached prefixes save, from measured acceptance and measured hits.

One constant rate of acceptance promises too much: later guesses are accepted less often. So acceptance is
by position, each given that all before it were accepted.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence

__all__ = ["best_guesses", "expected_tokens", "prefix_hits", "speculation_speedup"]


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Tokens of one step of the large model: 1 + Σ_j Π_(i<=j) a_i."""
    total, product = 1.0, 1.0
    for rate in acceptance:
        product *= rate
        total += product
    return total


def speculation_speedup(acceptance: Sequence[float], *, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Speed against no guessing. `draft_cost`: a draft's step in steps of the large model.

    `verify_cost`: the step over all guesses and one, in plain steps; 1 only while memory binds.
    """
    return expected_tokens(acceptance) / (len(acceptance) * draft_cost + verify_cost)


def best_guesses(
    acceptance: Sequence[float], *, draft_cost: float, verify_cost: Callable[[int], float]
) -> tuple[int, float]:
    """How many of the measured positions to guess, and the speed-up; (0, 1.0) where none pays.

    `verify_cost(g)` is the step over g guesses and one, in plain steps.
    """
    best = (0, 1.0)
    for count in range(1, len(acceptance) + 1):
        speedup = speculation_speedup(
            acceptance[:count], draft_cost=draft_cost, verify_cost=verify_cost(count)
        )
        if speedup > best[1]:
            best = (count, speedup)
    return best


def prefix_hits(requests: Iterable[Sequence[Hashable]], capacity: int) -> float:
    """The share of blocks found in a cache of `capacity` blocks, least recently used out first.

    Each request is its chain of block hashes; a block counts as found only if all before it were.
    """
    held: OrderedDict[Hashable, None] = OrderedDict()
    num_blocks = num_hits = 0
    for blocks in requests:
        is_prefix = True
        for block in blocks:
            is_prefix = is_prefix and block in held
            num_hits += is_prefix
            num_blocks += 1
            held[block] = None
            held.move_to_end(block)
        while len(held) > capacity:
            held.popitem(last=False)
    return num_hits / num_blocks if num_blocks else 0.0
