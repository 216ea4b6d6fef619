"""How much of what the machine can multiply a training run uses.

Counted are the operations that the model's arithmetic needs, not those that an implementation spends: two a
multiply-accumulate forward and four backward (two where weights are frozen), the head for target rows only,
attention for the pairs of tokens that see each other.
"""

from collections.abc import Iterable

from tokenmill.kernels.probe import measure_machine
from tokenmill.models.architecture import Architecture

__all__ = ["peak_flops", "row_flops"]


def row_flops(
    architecture: Architecture, lengths: Iterable[int], num_targets: int, *, is_frozen: bool = False
) -> float:
    """Floating point operations of one row of sequences, forward and backward.

    `is_frozen`: the model's own matrices need no gradient (an adapter's are left out: they are small).
    """
    lengths = list(lengths)
    passes = 2 if is_frozen else 3
    macs = sum(lengths) * architecture.block_macs_per_token + num_targets * architecture.head_macs_per_token
    attention = sum(_seen(architecture, length) for length in lengths)
    return 2.0 * passes * macs + 3.0 * attention


def peak_flops(num_threads: int) -> float:
    """bf16 operations a second that this machine reaches with so many threads; measured, in about 0.3 s."""
    limits = measure_machine(num_threads=num_threads, working_sets_mb=(1,), num_runs=2)
    return limits.bf16_tops * 1e12


def _seen(architecture: Architecture, length: int) -> float:
    """Forward operations of the attention of a sequence: token t sees t + 1, or its window."""
    total = 0
    for layer in architecture.layers:
        window = min(length, layer.window or length)
        pairs = window * (window + 1) // 2 + (length - window) * window
        total += 4 * architecture.query_size * pairs
    return float(total)
