"""The roofline against figures worked out by hand, and against the published limits of one machine."""

import math
from dataclasses import replace

import pytest

from tokenmill.costs import (
    DecoderCost,
    MachineRates,
    ReadRate,
    Work,
    bandwidth_at,
    ceiling,
    decode_work,
    prefill_work,
)

# SmolLM2-135M: 106.2 M multiply-accumulates in the blocks, 28.3 M in the head, 8 bits a weight.
W8A8 = DecoderCost(
    block_macs=106_168_320,
    head_macs=28_311_552,
    attention_ops=4 * 30 * 576,
    block_bytes=106_168_320,
    head_bytes=28_311_552,
    kv_bytes=23_040,
    integer=True,
)
# The middle of what was measured on two quiet AMX cores (docs/log.md has each machine's own).
AMX = MachineRates(
    int8_ops_per_s=12.2e12,
    float_ops_per_s=6.1e12,
    reads=tuple(
        ReadRate(working_set=mb * 1e6, bytes_per_s=gb * 1e9)
        for mb, gb in ((2, 215.0), (8, 56.5), (32, 56.5), (100, 42.5), (135, 33.5), (270, 28.0))
    ),
)
TINY = DecoderCost(
    block_macs=100,
    head_macs=10,
    attention_ops=8,
    block_bytes=1000,
    head_bytes=100,
    kv_bytes=4,
    integer=True,
)


def test_prefill_is_bound_by_arithmetic_near_57000_tokens_a_second() -> None:
    alone = Work(num_tokens=1, int8_ops=2.0 * W8A8.block_macs, float_ops=0, bytes_read=0, working_set=1)
    assert ceiling(alone, AMX).tokens_per_s == pytest.approx(57_500, rel=0.01)
    whole = ceiling(prefill_work(W8A8, batch=1, prompt=512, rows_per_step=512), AMX)
    assert whole.limit == "compute"
    assert 45_000 < whole.tokens_per_s < 57_000, "attention comes on top of the matrices"


def test_a_short_prompt_is_bound_by_reading_the_weights() -> None:
    assert ceiling(prefill_work(W8A8, batch=1, prompt=16, rows_per_step=512), AMX).limit == "bandwidth"


def test_one_stream_at_8_bits_decodes_at_most_230_to_300_tokens_a_second() -> None:
    weights_only = replace(W8A8, kv_bytes=0)
    found = []
    for gb_s in (31.0, 40.0):
        flat = replace(AMX, reads=(ReadRate(working_set=1.0, bytes_per_s=gb_s * 1e9),))
        found.append(ceiling(decode_work(weights_only, batch=1, prompt=128, output=64), flat).tokens_per_s)
    assert found == pytest.approx([230, 300], rel=0.02)
    measured = ceiling(decode_work(W8A8, batch=1, prompt=128, output=64), AMX)
    assert measured.limit == "bandwidth" and 225 < measured.tokens_per_s < 260


def test_at_batch_64_the_cache_is_the_traffic() -> None:
    work = decode_work(W8A8, batch=64, prompt=128, output=64)
    per_step = work.bytes_read / 63
    assert per_step == work.working_set
    assert per_step - W8A8.block_bytes - W8A8.head_bytes == pytest.approx(236e6, rel=0.01)
    flat = replace(AMX, reads=(ReadRate(working_set=1.0, bytes_per_s=40e9),))
    assert ceiling(work, flat).tokens_per_s == pytest.approx(6_900, rel=0.01)


def test_prefill_by_hand() -> None:
    work = prefill_work(TINY, batch=2, prompt=3, rows_per_step=4)
    # Rows 0-3 and 4-5: two steps; the first prompt ends in the first, the second in the second.
    assert work.bytes_read == 2 * 1000 + 2 * 100 + 6 * 4
    assert work.int8_ops == 2 * (6 * 100 + 2 * 10)
    assert work.float_ops == 8 * 2 * (1 + 2 + 3)
    assert (work.num_tokens, work.working_set) == (6, work.bytes_read / 2)


def test_a_long_prompt_reads_the_head_once() -> None:
    work = prefill_work(replace(TINY, kv_bytes=0), batch=1, prompt=10, rows_per_step=4)
    assert work.bytes_read == 3 * 1000 + 100


def test_decode_by_hand() -> None:
    work = decode_work(TINY, batch=2, prompt=3, output=3)
    # Two steps, of four and five positions in each of two sequences.
    assert work.num_tokens == 4
    assert work.int8_ops == 2 * 4 * 110
    assert work.float_ops == 8 * 2 * (4 + 5)
    assert work.bytes_read == 2 * 1100 + 2 * (4 + 5) * 4


def test_floating_point_weights_are_held_against_the_float_rate() -> None:
    integer = decode_work(TINY, batch=1, prompt=3, output=3)
    floating = decode_work(replace(TINY, integer=False), batch=1, prompt=3, output=3)
    assert floating.int8_ops == 0
    assert floating.float_ops == integer.int8_ops + integer.float_ops


def test_the_longer_of_the_two_times_binds() -> None:
    rates = MachineRates(
        int8_ops_per_s=10.0, float_ops_per_s=5.0, reads=(ReadRate(working_set=1.0, bytes_per_s=100.0),)
    )
    work = Work(num_tokens=8, int8_ops=10.0, float_ops=5.0, bytes_read=100.0, working_set=1.0)
    assert (ceiling(work, rates).limit, ceiling(work, rates).tokens_per_s) == ("compute", 4.0)
    more = replace(work, bytes_read=400.0)
    assert (ceiling(more, rates).limit, ceiling(more, rates).tokens_per_s) == ("bandwidth", 2.0)
    assert (ceiling(more, rates).compute_s, ceiling(more, rates).bandwidth_s) == (2.0, 4.0)


def test_bandwidth_between_and_outside_the_points() -> None:
    reads = (ReadRate(working_set=1e6, bytes_per_s=200.0), ReadRate(working_set=1e8, bytes_per_s=40.0))
    assert [bandwidth_at(reads, size) for size in (1e3, 1e6, 1e8, 1e12)] == [200, 200, 40, 40]
    assert bandwidth_at(reads, 1e7) == pytest.approx(120), "halfway in the logarithm"


@pytest.mark.parametrize(
    ("int8", "sizes"), [(0.0, (1.0,)), (math.nan, (1.0,)), (1.0, ()), (1.0, (2.0, 1.0)), (1.0, (1.0, 1.0))]
)
def test_impossible_machines_are_refused(int8: float, sizes: tuple[float, ...]) -> None:
    reads = tuple(ReadRate(working_set=size, bytes_per_s=1.0) for size in sizes)
    with pytest.raises(AssertionError):
        MachineRates(int8_ops_per_s=int8, float_ops_per_s=1.0, reads=reads)


def test_decoding_needs_a_second_token() -> None:
    with pytest.raises(AssertionError, match="prefill"):
        decode_work(TINY, batch=1, prompt=3, output=1)
