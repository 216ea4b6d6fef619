"""The formulas of a plan against the check values of their sources."""

import math
from dataclasses import replace

import pytest

from tokenmill.core import ResourceError
from tokenmill.costs.acceptance import (
    best_guesses,
    expected_tokens,
    prefix_hits,
    speculation_speedup,
)
from tokenmill.costs.catalogue import find_shape, load_shapes
from tokenmill.costs.energy import (
    effective_joules,
    measured_energy_model,
    step_joules,
    tdp_energy_model,
)
from tokenmill.costs.hierarchy import Level, Resident, memory_seconds, place, sram_devices, sram_token_seconds
from tokenmill.costs.interconnect import (
    Link,
    all_reduce_seconds,
    all_to_all_seconds,
    pipeline_seconds,
    transfer_seconds,
)
from tokenmill.costs.money import (
    ApiRates,
    HourlyCost,
    break_even,
    break_even_utilisation,
    cascade,
    max_payback_years,
    owned_hour_usd,
    tiers,
    usd_per_million,
)
from tokenmill.costs.queueing import in_flight, max_rate, waiting_p99, waiting_seconds
from tokenmill.costs.shape import (
    ModelShape,
    decode_attention_flops,
    distinct_experts,
    kv_bytes,
    prefill_attention_flops,
    skewed_experts,
    streamed_params,
    weight_bytes,
)
from tokenmill.costs.step import (
    Constants,
    MachinePeak,
    bound_seconds,
    critical_batch,
    decode_load,
    prefill_load,
    step_seconds,
)

SHAPES = load_shapes()
H100 = MachinePeak(flops=989e12, bytes_per_s=3.35e12)
HALF = Constants(weights=0.8, kv=0.5, compute=0.4, layer_s=1e-5, comm_s=1e-5, row_s=5e-6)


def shape(name: str) -> ModelShape:
    return find_shape(SHAPES, name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama-2-7B", 524_288),
        ("Llama-3-8B", 131_072),
        ("Llama-3-70B", 327_680),
        ("Qwen3-30B-A3B", 98_304),
        ("DeepSeek-V3.1", 70_272),
        ("SmolLM2-135M", 23_040),
    ],
)
def test_kv_bytes_of_one_token(name: str, expected: int) -> None:
    assert kv_bytes(shape(name), 1) == expected
    assert kv_bytes(shape(name), 7, 1.0) == 3.5 * expected


def test_windowed_layers_keep_their_window() -> None:
    oss = shape("gpt-oss-20b")
    assert kv_bytes(oss, 128) == 128 * 49_152
    assert kv_bytes(oss, 1128) == 128 * 49_152 + 1000 * 49_152 / 2


@pytest.mark.parametrize(
    ("experts", "row"),
    [
        ((8, 2), (2, 3.5, 5.5, 7.2, 7.9, 8, 8, 8)),
        ((32, 4), (4, 7.5, 13.2, 21.0, 28.2, 31.6, 32, 32)),
        ((128, 4), (4, 7.9, 15.3, 28.7, 51.0, 81.7, 111, 126)),
        ((128, 8), (8, 15.5, 29.1, 51.6, 82.4, 112, 126, 128)),
        ((256, 8), (8, 15.8, 30.5, 57.4, 102, 163, 222, 252)),
    ],
)
def test_distinct_experts(experts: tuple[int, int], row: tuple[float, ...]) -> None:
    for power, expected in enumerate(row):
        found = distinct_experts(*experts, 2**power)
        assert found == pytest.approx(expected, abs=0.06 if expected < 100 and expected % 1 else 0.6)


def test_skewed_routing_touches_fewer_experts() -> None:
    assert skewed_experts([0.25] * 8, 16) == pytest.approx(distinct_experts(8, 2, 16))
    assert skewed_experts([0.9, 0.9, *[0.2 / 6] * 6], 16) < distinct_experts(8, 2, 16)


def test_a_mixture_reads_what_its_tokens_touch() -> None:
    mixtral = shape("Mixtral-8x7B")
    assert mixtral.active_params == pytest.approx(12.88e9 - 0.131e9, rel=0.01)
    at_eight = streamed_params(mixtral, 8) / mixtral.params
    assert at_eight == pytest.approx(0.9, abs=0.01)
    load = decode_load(mixtral, bits=16, batch=8, context=100)
    assert load.least_weight_bytes == weight_bytes(mixtral.active_params, 16) < load.weight_bytes


def test_operations_of_attention() -> None:
    llama = shape("Llama-2-7B")
    assert decode_attention_flops(llama, 1000) == 4 * 32 * 4096 * 1000
    assert prefill_attention_flops(llama, 1000) == 2 * 32 * 4096 * 1000**2
    assert prefill_attention_flops(llama, 1000, 500) == 2 * 32 * 4096 * (1000**2 - 500**2)
    deep = shape("DeepSeek-V3.1")
    assert decode_attention_flops(deep, 10) == 2 * 61 * 128 * 10 * (2 * 512 + 64)
    oss = shape("gpt-oss-20b")
    assert prefill_attention_flops(oss, 128) == 2 * 24 * 4096 * 128**2
    assert prefill_attention_flops(oss, 10_000) < 2 * 24 * 4096 * 10_000**2


def test_the_sum_is_never_below_the_maximum_nor_that_below_the_bound() -> None:
    for batch in (1, 8, 64, 512):
        load = decode_load(shape("Llama-3.1-8B"), bits=16, batch=batch, context=2000)
        added, longer = (step_seconds(load, H100, HALF, form) for form in ("sum", "max"))
        assert added > longer > bound_seconds(load, H100)


def test_a_step_is_what_the_page_says() -> None:
    load = decode_load(shape("Llama-3.1-8B"), bits=16, batch=8, context=344)
    weights, kv = 2 * (8.03e9 - 0.525e9), 8 * 344 * 131_072
    flops = 8 * (2 * (8.03e9 - 0.525e9) + 4 * 32 * 4096 * 344)
    assert (load.weight_bytes, load.kv_bytes, load.flops) == pytest.approx((weights, kv, flops))
    expected = weights / 3.35e12 / 0.8 + kv / 3.35e12 / 0.5 + flops / 989e12 / 0.4 + 32 * 1e-5 + 8 * 5e-6
    assert step_seconds(load, H100, HALF) == pytest.approx(expected)


def test_devices_share_the_work_and_pay_for_the_exchange() -> None:
    one, four = (
        decode_load(shape("Llama-3-70B"), bits=16, batch=1, context=10, num_devices=n) for n in (1, 4)
    )
    assert bound_seconds(four, H100) == pytest.approx(bound_seconds(one, H100) / 4)
    assert step_seconds(four, H100, HALF) > step_seconds(one, H100, HALF) / 4 + 80 * 1e-5 * 0.99


def test_guesses_raise_the_tokens_of_a_step() -> None:
    plain, guessed = (
        decode_load(shape("Mixtral-8x7B"), bits=16, batch=1, context=10, guesses=g) for g in (0, 3)
    )
    assert guessed.kv_bytes == plain.kv_bytes and guessed.flops == pytest.approx(4 * plain.flops)
    assert guessed.weight_bytes > 2 * plain.weight_bytes


def test_the_critical_batch() -> None:
    assert critical_batch(shape("Llama-3-8B"), 16, H100) == pytest.approx(295, abs=1)
    assert critical_batch(shape("Mixtral-8x7B"), 16, H100) == pytest.approx(4 * 295, abs=3)


def test_only_the_last_token_of_a_prompt_needs_the_head() -> None:
    known = shape("Llama-3-8B")
    assert known.head_params == known.lookup_params > 5e8
    parts = {
        head: prefill_load(replace(known, head_params=head), bits=16, num_tokens=100, batch=3).flops
        for head in (0.0, known.head_params)
    }
    assert parts[0.0] - parts[known.head_params] == pytest.approx(2 * known.head_params * 3 * 99)


def test_cached_tokens_of_a_prompt_are_not_computed() -> None:
    whole = prefill_load(shape("Llama-3-8B"), bits=16, num_tokens=1000)
    rest = prefill_load(shape("Llama-3-8B"), bits=16, num_tokens=1000, cached=600)
    assert rest.flops < 0.42 * whole.flops + 1e12 and rest.flops < whole.flops
    assert rest.kv_bytes == whole.kv_bytes


def test_exchanges() -> None:
    link = Link(bytes_per_s=450e9, latency_s=10e-6)
    assert all_reduce_seconds(link, 1, 1e6) == all_to_all_seconds(link, 1, 1e6) == 0
    assert all_reduce_seconds(link, 8, 1e6) == pytest.approx(10e-6 + 1.75 * 1e6 / 450e9)
    assert all_to_all_seconds(link, 4, 1e6) == pytest.approx(10e-6 + 2.5e5 / 450e9)
    assert transfer_seconds(link, 450e9) == pytest.approx(1.00001)
    assert pipeline_seconds(link, 3, 1e3) == pytest.approx(2 * (10e-6 + 1e3 / 450e9))


def test_bytes_are_placed_whole_and_the_most_read_first() -> None:
    cache = Level(name="L3", capacity=100, bytes_per_s=10.0, is_cache=True)
    memory = Level(name="DRAM", capacity=1000, bytes_per_s=1.0)
    hot, cold = (
        Resident(name="attention", num_bytes=89, read_bytes=89),
        Resident(name="experts", num_bytes=300, read_bytes=30),
    )
    placed = place([cold, hot], [memory, cache])
    assert [(each.resident.name, each.level.name) for each in placed] == [
        ("attention", "L3"),
        ("experts", "DRAM"),
    ]
    assert memory_seconds(placed) == pytest.approx(8.9 + 30)
    assert memory_seconds(placed, parallel=True) == pytest.approx(30)
    too_much = place([Resident(name="all", num_bytes=110, read_bytes=110)], [memory, cache])
    assert too_much[0].level.name == "DRAM", "no share of it stays in a cache that it exceeds"
    with pytest.raises(ResourceError, match="huge"):
        place([Resident(name="huge", num_bytes=2000, read_bytes=1)], [memory, cache])


def test_machines_of_sram() -> None:
    assert sram_devices(140e9, 44e9) == 4
    assert 1 / sram_token_seconds(32, 41.7e-6, 0, 80e12) == pytest.approx(750, rel=0.01)
    assert 1 / sram_token_seconds(80, 41.7e-6, 0, 80e12) == pytest.approx(300, rel=0.01)


def test_acceptance_by_position_promises_less_than_one_rate() -> None:
    assert expected_tokens([0.79] * 4) == pytest.approx(3.29, abs=0.01)
    assert expected_tokens([0.83] * 4) == pytest.approx(3.57, abs=0.01)
    measured = [0.79, 0.48 / 0.79, 0.22 / 0.48, 0.05 / 0.22]
    assert [expected_tokens(measured[:n]) for n in (1, 2, 3, 4)] == pytest.approx([1.79, 2.27, 2.49, 2.54])
    assert speculation_speedup([0.8], draft_cost=0.1, verify_cost=1.1) == pytest.approx(1.8 / 1.2)


def test_guesses_stop_where_they_do_not_pay() -> None:
    measured = [0.79, 0.61, 0.46, 0.23]
    count, speedup = best_guesses(measured, draft_cost=0.1, verify_cost=lambda _: 1.0)
    assert count == 3 and speedup == pytest.approx(expected_tokens(measured[:3]) / 1.3)
    assert best_guesses(measured, draft_cost=0.1, verify_cost=lambda g: 1.0 + 1.5 * g) == (0, 1.0)


def test_hits_are_prefixes_of_what_is_held() -> None:
    requests = [(1, 2, 3), (1, 2, 4), (5, 2, 4)]
    assert prefix_hits(requests, 100) == pytest.approx(2 / 9)
    assert prefix_hits([(1,), (2,), (1,)], 1) == 0
    assert prefix_hits([], 10) == 0


def test_waiting() -> None:
    # M/M/1: the wait is rho / (1 - rho) services.
    assert waiting_seconds(0.5, 1.0) == pytest.approx(1.0)
    assert waiting_seconds(0.5, 1.0, service_cv2=0.0) == pytest.approx(0.5)
    assert waiting_seconds(0.8, 1.0, servers=4) < waiting_seconds(0.8, 1.0)
    assert waiting_p99(0.9, 1.0) == pytest.approx(math.log(90) / 0.1)
    assert waiting_p99(0.005, 1.0) == 0


def test_how_many_are_in_flight() -> None:
    def service(batch: float) -> float:
        return 1.0 + 0.1 * batch

    assert max_rate(service, 30) == (30 / 4.0, 30)
    found = in_flight(5.0, service, 64)
    assert found == pytest.approx(5.0 * service(found), rel=1e-4)
    with pytest.raises(ResourceError, match="more than one machine"):
        in_flight(50.0, service, 64)
    # Near the limit the fixed point is far: B = 9.99 (1 + 0.1 B).
    assert in_flight(9.99, service, 20_000) == pytest.approx(9990, rel=1e-4)


@pytest.mark.parametrize(
    ("usd", "speed", "expected"), [(2.95, 1069.6, 0.77), (2.95, 9009.6, 0.091), (1.30, 9009.6, 0.040)]
)
def test_dollars_of_a_million_tokens(usd: float, speed: float, expected: float) -> None:
    assert usd_per_million(HourlyCost(usd=usd), speed) == pytest.approx(expected, rel=0.01)
    assert usd_per_million(HourlyCost(usd=usd), speed, 0.5) == pytest.approx(2 * expected, rel=0.01)


def test_break_even_of_the_published_example() -> None:
    rates = ApiRates(input_usd=0.59, output_usd=0.79)
    hour = HourlyCost(usd=5.90)
    utilisation = break_even_utilisation(rates, hour, 4205, input_per_output=1.0)
    assert utilisation is not None and utilisation == pytest.approx(0.28, abs=0.005)
    found = break_even(rates, hour, 4205)
    assert found.num_systems == 1
    assert found.output_tokens == pytest.approx(utilisation * 4205 * 3600 * 730)
    assert break_even(rates, hour, 400).output_tokens is None
    fixed = break_even(rates, hour, 4205, fixed_usd=20_000)
    assert fixed.num_systems == 2 and fixed.output_tokens is not None
    assert fixed.output_tokens * 1.38 / 1e6 == pytest.approx(fixed.self_host_usd)


def test_electricity_is_paid_for_the_hours_at_work_only() -> None:
    rates = ApiRates(input_usd=0.0, output_usd=3.0)
    hour = HourlyCost(usd=1.0, power_w=1000, usd_per_kwh=1.0)
    speed = 1e6 / 3600  # 10^6 tokens an hour: worth $3, of which $1 is electricity
    assert break_even_utilisation(rates, hour, speed, input_per_output=0.0) == pytest.approx(0.5)
    for utilisation in (0.6, 1.0):
        found = break_even(rates, hour, speed, utilisation=utilisation, input_per_output=0.0)
        assert found.num_systems == 1 and found.output_tokens == pytest.approx(0.5 * 730 * 1e6)
        assert found.self_host_usd == pytest.approx(3.0 * 365)
    assert break_even(rates, hour, speed, utilisation=0.4, input_per_output=0.0).output_tokens is None
    free = ApiRates(input_usd=0.0, output_usd=0.0)
    assert break_even_utilisation(free, hour, speed, input_per_output=1.0) is None


def test_tiers_of_the_published_example() -> None:
    rows = tiers((8, 255), {8: 7.32e-3, 255: 26.13e-3}.__getitem__, 255)
    assert rows[0].user_tokens_per_s == pytest.approx(137, abs=1)
    assert rows[0].speed == pytest.approx(3.6, abs=0.05)
    assert rows[0].cost == pytest.approx(8.9, abs=0.1)
    assert (rows[1].speed, rows[1].cost) == (1, 1)


def test_other_money() -> None:
    assert owned_hour_usd(26_280, residual=0.0, years=3) == pytest.approx(1.0)
    assert max_payback_years(10) == pytest.approx(0.434, abs=0.001) and max_payback_years(1) == math.inf
    # A cascade stays cheaper while fewer than 1 - c_s / c_L are sent on.
    assert cascade(0.05, 1.0, 0.94, 0.9, 1.0).usd < 1.0 < cascade(0.05, 1.0, 0.96, 0.9, 1.0).usd


def test_energy_of_published_steps() -> None:
    h100 = measured_energy_model("H100-SXM-80GB")
    assert h100 is not None and measured_energy_model("RTX 4090") is None
    for batch, itl_ms, published in ((8, 7.32, 0.4548), (255.2, 26.13, 0.0766)):
        load = decode_load(shape("Llama-3.1-8B"), bits=16, batch=batch, context=350)
        found = step_joules(h100, itl_ms / 1e3, load.flops)
        assert found.joules / batch == pytest.approx(published, rel=0.15)
        assert found.low < found.joules < found.high
    assumed = step_joules(tdp_energy_model(350), 1.0, 1e12, num_devices=2)
    assert (assumed.low, assumed.joules, assumed.high) == pytest.approx((336, 560, 784))
    assert effective_joules(1.0, tokens_per_s=100, idle_w=50, utilisation=0.5, pue=1.2) == pytest.approx(1.8)


def test_an_impossible_shape_is_refused() -> None:
    with pytest.raises(AssertionError, match="experts"):
        ModelShape(
            name="x",
            params=1,
            num_layers=1,
            hidden_size=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=1,
            num_active=2,
        )


def test_links_carry_the_activations() -> None:
    free, linked = (
        decode_load(
            shape("Llama-3-70B"), bits=16, batch=512, context=10, num_devices=4, link_bytes_per_s=rate
        )
        for rate in (math.inf, 450e9)
    )
    expected = 2 * 80 * 1.5 * 512 * 8192 * 2 / 450e9
    assert step_seconds(linked, H100, HALF) - step_seconds(free, H100, HALF) == pytest.approx(expected)
    assert prefill_load(shape("Llama-3-70B"), bits=16, num_tokens=9).exchange_s == 0
