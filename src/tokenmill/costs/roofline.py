"""How fast a phase could be at most: its operations and bytes against what the machine can do.

The roofline of Williams, Waterman and Patterson (2009): a phase needs at least the time of its arithmetic
at the full rate, and at least the time of its memory reads at the full bandwidth; the longer one binds.
Counted is what no implementation of this model and format can avoid: the products of the matrices, the
scores and sums of attention, each weight once a step, each cached key and value once a step. Not counted:
norms, activations, sampling, writes, and the table of embeddings, of which a token reads one row.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = [
    "Ceiling",
    "DecoderCost",
    "LimitName",
    "MachineRates",
    "ReadRate",
    "Work",
    "bandwidth_at",
    "ceiling",
    "decode_work",
    "prefill_work",
]

LimitName: TypeAlias = Literal["compute", "bandwidth"]


@dataclass(frozen=True, kw_only=True)
class ReadRate:
    """Bytes a second, reading a working set of `working_set` bytes again and again."""

    working_set: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class MachineRates:
    """What the machine can do. Operations a second, a multiply-add counted as two.

    `reads` are measured points, by growing working set; at least one.
    """

    int8_ops_per_s: float
    float_ops_per_s: float
    reads: tuple[ReadRate, ...]

    def __post_init__(self) -> None:
        sizes = [point.working_set for point in self.reads]
        rates = [self.int8_ops_per_s, self.float_ops_per_s, *(point.bytes_per_s for point in self.reads)]
        assert sizes and sizes == sorted(set(sizes)) and sizes[0] > 0, f"working sets {sizes}"
        assert min(rates) > 0 and math.isfinite(max(rates)), f"rates {rates}"


@dataclass(frozen=True, kw_only=True)
class DecoderCost:
    """What one token of a decoder costs in one weight format.

    `block_macs` and `head_macs`: multiply-accumulates of the matrices for one token. `attention_ops`:
    operations for each position that a token sees. `block_bytes` and `head_bytes`: weights as packed.
    `kv_bytes`: cached bytes of one position. `integer`: the matrices are multiplied in 8 bits.
    """

    block_macs: int
    head_macs: int
    attention_ops: int
    block_bytes: int
    head_bytes: int
    kv_bytes: int
    integer: bool


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations and bytes of a phase that makes or takes `num_tokens`.

    `working_set` is what one step reads, in bytes: it decides from which cache the bytes come.
    """

    num_tokens: int
    int8_ops: float
    float_ops: float
    bytes_read: float
    working_set: float


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The most tokens a second that a phase can reach, and what binds. Seconds are for the whole phase."""

    tokens_per_s: float
    limit: LimitName
    compute_s: float
    bandwidth_s: float


def bandwidth_at(reads: Sequence[ReadRate], working_set: float) -> float:
    """Bytes a second for a working set: linear in its logarithm between points, level outside them."""
    for low, high in itertools.pairwise(reads):
        if low.working_set <= working_set <= high.working_set:
            share = math.log(working_set / low.working_set) / math.log(high.working_set / low.working_set)
            return low.bytes_per_s + share * (high.bytes_per_s - low.bytes_per_s)
    nearest = reads[0] if working_set < reads[0].working_set else reads[-1]
    return nearest.bytes_per_s


def prefill_work(cost: DecoderCost, *, batch: int, prompt: int, rows_per_step: int) -> Work:
    """Computing `batch` prompts of `prompt` tokens each, in steps of at most `rows_per_step` rows.

    The head runs for the last row of each prompt, and is read in the steps in which a prompt ends.
    """
    num_tokens = batch * prompt
    num_steps = -(-num_tokens // rows_per_step)
    num_head_steps = len({-(-end * prompt // rows_per_step) for end in range(1, batch + 1)})
    # A position is seen by itself and by every later one of its prompt.
    num_seen = batch * prompt * (prompt + 1) // 2
    kv_bytes = num_tokens * cost.kv_bytes
    bytes_read = num_steps * cost.block_bytes + num_head_steps * cost.head_bytes + kv_bytes
    matrix_ops = 2.0 * (num_tokens * cost.block_macs + batch * cost.head_macs)
    return _work(cost, num_tokens, matrix_ops, num_seen, bytes_read, num_steps)


def decode_work(cost: DecoderCost, *, batch: int, prompt: int, output: int) -> Work:
    """Decoding after prompts of `prompt` tokens until each of `batch` sequences has `output` tokens.

    The first token of each belongs to prefill, so `output` must be at least 2. Step t of the other
    `output` - 1 sees `prompt` + t positions.
    """
    assert output >= 2, "the first token belongs to prefill"
    num_steps = output - 1
    num_seen = batch * (num_steps * prompt + num_steps * (num_steps + 1) // 2)
    weight_bytes = num_steps * (cost.block_bytes + cost.head_bytes)
    matrix_ops = 2.0 * num_steps * batch * (cost.block_macs + cost.head_macs)
    bytes_read = weight_bytes + num_seen * cost.kv_bytes
    return _work(cost, num_steps * batch, matrix_ops, num_seen, bytes_read, num_steps)


def ceiling(work: Work, rates: MachineRates) -> Ceiling:
    """The limit of a phase. Arithmetic and reads may overlap completely: the longer of the two counts."""
    compute_s = work.int8_ops / rates.int8_ops_per_s + work.float_ops / rates.float_ops_per_s
    bandwidth_s = work.bytes_read / bandwidth_at(rates.reads, work.working_set)
    return Ceiling(
        tokens_per_s=work.num_tokens / max(compute_s, bandwidth_s),
        limit="compute" if compute_s >= bandwidth_s else "bandwidth",
        compute_s=compute_s,
        bandwidth_s=bandwidth_s,
    )


def _work(
    cost: DecoderCost, num_tokens: int, matrix_ops: float, num_seen: int, bytes_read: float, num_steps: int
) -> Work:
    """Attention is computed in floating point whatever the format of the weights."""
    attention_ops = float(num_seen * cost.attention_ops)
    return Work(
        num_tokens=num_tokens,
        int8_ops=matrix_ops if cost.integer else 0.0,
        float_ops=attention_ops + (0.0 if cost.integer else matrix_ops),
        bytes_read=float(bytes_read),
        working_set=bytes_read / num_steps,
    )
