"""What requests are charged: all of the engine's time, each its own part, however steps are made."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any
from unittest.mock import patch

import pytest

from tokenmill.core import Request, SamplingParams
from tokenmill.costs.metering import Charge, RowShare, StepPrices, StepUse, add_charges, meter_step
from tokenmill.engine import LLMConfig
from tokenmill.engine.local import LocalEngine
from tokenmill.engine.meter import Meter, row_share
from tokenmill.engine.mock import MockClock, MockFault, MockModel, MockScript
from tokenmill.engine.schedule import Chunk
from tokenmill.engine.sequence import GenerationState, SequenceState
from tokenmill.engine.steady import SteadyRun
from tokenmill.engine.step_time import StepTimeModel
from tokenmill.kernels import KV_BLOCK
from tokenmill.kvcache import BlockPool

PRICES = StepPrices(base=7e-3, row=3.1e-4, out_row=5e-5, kv_token=2e-6)
FORMS: Sequence[dict[str, Any]] = (
    {"ignore_eos": True},
    {"temperature": 0.9, "seed": 5, "ignore_eos": True},
    {"n": 3, "temperature": 1.0, "seed": 2},
    {"logprobs": 1},
    {"stop": ("\x07",)},
)


class Twin:
    """Meters every step by itself, in the plain way."""

    def __init__(self) -> None:
        self.charges: Mapping[str, Charge] = {}
        self.num_steps = 0
        self._shares: list[RowShare] = []

    def begin(self, meter: Meter, chunks: Sequence[Chunk], own_s: Mapping[SequenceState, float]) -> None:
        self._shares = [
            row_share(chunk, meter._pool, own_s.get(chunk.sequence, 0.0))._replace(
                request=str(id(chunk.sequence))
            )
            for chunk in chunks
        ]

    def tick(self, nanoseconds: int) -> None:
        self.num_steps += 1
        step = meter_step(StepUse(nanoseconds=nanoseconds), PRICES, self._shares)
        self.charges = add_charges(self.charges, step)
        self._shares = [each._replace(fresh_kv_tokens=each.fresh_kv_tokens + 1) for each in self._shares]


class TwinnedMeter(Meter):
    """A meter with known prices, and its twin beside it."""

    twin: Twin

    @property
    def prices(self) -> StepPrices:
        return PRICES

    def begin(self, chunks: Sequence[Chunk], own_s: Mapping[SequenceState, float] | None = None) -> None:
        super().begin(chunks, own_s)
        self.twin.begin(self, chunks, own_s or {})

    def tick(self, now_s: float) -> None:
        before = self._amount_ns
        super().tick(now_s)
        if self._states and self._since_ns is not None:
            self.twin.tick(self._amount_ns - before)


def requests_of(seed: int, count: int) -> list[Request]:
    drawn = Random(seed)
    shared = tuple(drawn.randrange(256) for _ in range(600))
    return [
        Request(
            request_id=f"{index}",
            prompt=(*shared[: drawn.choice((0, 70, 600))], index, *([7] * drawn.randrange(60))),
            params=SamplingParams(max_tokens=drawn.choice((21, 33, 80)), **drawn.choice(FORMS)),
            tier=drawn.choice(("fast", "standard", "batch")),
        )
        for index in range(count)
    ]


def run(
    seed: int, *, fault: int = 0, **config: Any
) -> tuple[list[GenerationState], LocalEngine, Twin, MockClock]:
    """Serve requests that come and go at odd moments, to the end."""
    clock, twin, drawn = MockClock(), Twin(), Random(seed)
    faults = (MockFault(kind="raise", at_step=fault),) if fault else ()
    model = MockModel(MockScript(step_s=0.0101, row_s=0.00037, faults=faults), sleep=clock.sleep)
    kind = type("Here", (TwinnedMeter,), {"twin": twin})
    with patch("tokenmill.engine.core.Meter", kind):
        engine = LocalEngine(model, LLMConfig(**config), create=model.create, clock=clock)
    waiting, states = requests_of(seed, 14), list[GenerationState]()
    while waiting or engine.has_work:
        if waiting and drawn.random() < 0.1:
            states += engine.submit(waiting.pop())
        if states and drawn.random() < 0.01:
            engine.abort(drawn.choice(states))
        if engine.has_work:
            engine.step()
        clock.sleep(0.003 * drawn.random())
    return states, engine, twin, clock


def assert_exact(states: Sequence[GenerationState], engine: LocalEngine, clock: MockClock) -> None:
    meter, counts = engine.meter, engine.counts
    assert sum(state.charge.total()[0] for state in states) == meter.busy_ns > 0
    assert meter.busy_ns + meter.idle_ns(clock()) == round(clock() * 1e9)
    assert counts.num_output_tokens == sum(state.num_output for state in states) > 0
    assert counts.num_draft_tokens == sum(state.num_drafted for state in states)
    assert counts.num_accepted_tokens == sum(state.num_accepted for state in states)
    assert counts.num_preempted == sum(state.num_preemptions for state in states)
    assert counts.num_hit_tokens == sum(state.num_cached for state in states) > 0
    begun = sum(state.num_prompt for state in states if state.num_computed and state.index == 0)
    assert begun <= counts.num_prompt_tokens == counts.num_queried_tokens


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"kv_tokens": 30 * KV_BLOCK, "max_batch": 4, "max_rows": 24},
        {"kv_tokens": 30 * KV_BLOCK, "swap_tokens": 40 * KV_BLOCK, "max_batch": 6},
        {"speculation": "lookup"},
    ],
)
def test_all_of_the_time_is_charged_and_as_a_twin_does(seed: int, config: dict[str, Any]) -> None:
    states, engine, twin, clock = run(seed, **config)
    assert_exact(states, engine, clock)
    assert engine.idle_ns > 0
    for state in states:
        mine, plainly = state.charge, twin.charges.get(str(id(state)), Charge())
        assert abs(mine.input[0] - plainly.input[0]) <= twin.num_steps
        assert abs(mine.cached[0] - plainly.cached[0]) <= twin.num_steps
        assert abs(mine.output[0] - plainly.output[0]) <= twin.num_steps


@pytest.mark.parametrize("seed", range(3))
def test_without_steady_steps_it_is_the_twin_to_the_nanosecond(seed: int) -> None:
    with patch.object(SteadyRun, "begin", lambda scheduler, executor: None):
        states, engine, twin, clock = run(seed)
    assert_exact(states, engine, clock)
    assert {str(id(s)): s.charge for s in states if s.charge != Charge()} == {
        name: charge for name, charge in twin.charges.items() if charge != Charge()
    }


def test_steady_steps_are_shared_out_together() -> None:
    """Else the first of the two above would compare planned steps only."""
    settled: list[bool] = []
    settle = Meter.settle

    def counting(meter: Meter) -> None:
        settled.append(meter._amount_ns > 0)
        settle(meter)

    with patch.object(TwinnedMeter, "settle", counting):
        *_, twin, _ = run(1, fast_ratio=1.0)
    assert sum(settled) < 0.7 * twin.num_steps


def test_a_step_that_breaks_off_is_charged() -> None:
    states, engine, _, clock = run(2, fault=30)
    assert_exact(states, engine, clock)


def serve(engine: LocalEngine, requests: Sequence[Request]) -> list[GenerationState]:
    states = [state for request in requests for state in engine.submit(request)]
    while engine.has_work:
        engine.step()
    return states


def quick(**config: Any) -> tuple[LocalEngine, MockClock]:
    clock = MockClock()
    model = MockModel(MockScript(step_s=0.01, row_s=0.0001), sleep=clock.sleep)
    return LocalEngine(model, LLMConfig(**config), create=model.create, clock=clock), clock


def plain(name: str, prompt: Sequence[int], max_tokens: int = 20, **more: Any) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=name, prompt=tuple(prompt), params=params, **more)


def test_a_prompt_found_in_the_cache_costs_its_reading() -> None:
    engine, _ = quick()
    prompt = [3] * 300
    (first,) = serve(engine, [plain("a", prompt)])
    (again,) = serve(engine, [plain("b", prompt)])
    assert first.charge.cached[0] == 0 < again.charge.cached[0]
    assert again.charge.input[0] < first.charge.input[0] / 3


def test_batch_work_beside_others_is_charged_what_it_adds() -> None:
    def share(tier: str) -> float:
        engine, _ = quick()
        requests = [plain(f"{i}", [i, 1], 60, tier="standard" if i < 8 else tier) for i in range(12)]
        states = serve(engine, requests)
        ns = [state.charge.total()[0] for state in states]
        assert sum(ns) == engine.meter.busy_ns
        return sum(ns[8:]) / sum(ns)

    assert share("batch") < 0.6 * share("standard")
    assert share("standard") == pytest.approx(1 / 3, rel=0.1)


class Counters:
    """A package that draws 100 W of the mock's time."""

    def __init__(self, clock: MockClock) -> None:
        self.clock = clock
        self.fails = False

    def read(self) -> dict[str, int]:
        if self.fails:
            raise OSError("gone")
        return {"package-0": int(self.clock() * 100e6)}

    def ranges(self) -> dict[str, int]:
        return {"package-0": 0}


def test_energy_is_shared_like_time_and_that_of_idle_hours_is_nobodys() -> None:
    clock = MockClock()
    model = MockModel(MockScript(step_s=0.01, row_s=0.0001), sleep=clock.sleep)
    counters = Counters(clock)
    engine = LocalEngine(model, create=model.create, clock=clock, counters=counters)
    clock.sleep(3600.0)
    states = serve(engine, [plain("a", [1, 2]), plain("b", [3])])
    clock.sleep(3600.0)
    states += serve(engine, [plain("c", [4])])
    charges = [state.charge.total() for state in states]
    assert sum(nj for _, nj, _ in charges) == engine.meter.busy_nj > 0
    for ns, nj, _ in charges:
        assert nj == pytest.approx(100 * ns, rel=1e-3)
    counters.fails = True
    (last,) = serve(engine, [plain("d", [5])])
    assert last.charge.total()[0] > 0 == last.charge.total()[1]


def test_what_many_read_together_is_paid_in_parts() -> None:
    pool = BlockPool(64)
    blocks = pool.allocate(40)
    model = MockModel(MockScript())
    engine = LocalEngine(model, create=model.create)
    (state,) = engine.prepare(plain("a", [1] * 1200))
    state.table.extend(blocks)
    chunk = Chunk(state, 1199, 1200, 1)
    assert row_share(chunk, pool).fresh_kv_tokens == 1200
    for _ in range(3):
        pool.share(blocks[:20])
    state.num_cached = 600
    share = row_share(chunk, pool)
    assert (share.cached_kv_tokens, share.fresh_kv_tokens) == (512 / 4 + 88, 600)
    pool.share(blocks[20:32])
    share = row_share(chunk, pool)
    assert (share.cached_kv_tokens, share.fresh_kv_tokens) == (512 / 4 + 88 / 2, (512 - 88) / 2 + 176)
    pool.share(blocks[32:])
    assert row_share(chunk, pool) == share, "no whole span"


def test_nobody_is_charged_without_work() -> None:
    meter = Meter(StepTimeModel(), BlockPool(4), now_s=5.0)
    meter.tick(6.0)
    meter.wake(7.0)
    meter.begin([])
    meter.tick(8.0)
    meter.rest()
    assert (meter.busy_ns, meter.idle_ns(9.0)) == (0, 4_000_000_000)
