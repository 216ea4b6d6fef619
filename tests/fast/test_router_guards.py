"""The circuit breaker, the retry budget and prices, each by itself."""

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.core import Usage, UsageError
from tokenmill.router import (
    BreakerConfig,
    BudgetConfig,
    Price,
    RouteConfig,
    ShadowConfig,
    TargetConfig,
    UpstreamConfig,
)
from tokenmill.router.breaker import Breaker, Permit
from tokenmill.router.budget import RetryBudget


class Bench:
    """A breaker with a clock that is set by hand."""

    def __init__(self, **config: Any) -> None:
        self.now_s = 100.0
        self.changes: list[str] = []
        config = {"failures": 3, "open_s": 10.0, **config}
        self.breaker = Breaker(BreakerConfig(**config), lambda: self.now_s, self.changes.append)

    def enter(self) -> Permit:
        permit = self.breaker.enter()
        assert permit is not None
        return permit

    @property
    def state(self) -> str:
        return self.breaker.state

    def open(self) -> None:
        for _ in range(3):
            self.enter().fail()


def test_it_opens_after_failures_in_a_row() -> None:
    bench = Bench()
    for _ in range(5):
        bench.enter().fail()
        bench.enter().fail()
        bench.enter().succeed()
    bench.open()
    assert bench.breaker.enter() is None and bench.breaker.wait_s == 10.0
    assert bench.changes == ["open"]


def test_it_opens_when_half_of_the_last_calls_fail() -> None:
    bench = Bench(window=10)
    for at in range(20):
        permit = bench.breaker.enter()
        if permit is None:
            break
        permit.fail() if at % 2 else permit.succeed()
    assert at == 10 and bench.changes == ["open"]


def test_one_call_at_a_time_tries_it() -> None:
    bench = Bench()
    bench.open()
    bench.now_s += 9.9
    assert bench.breaker.enter() is None
    bench.now_s += 0.2
    probe = bench.enter()
    assert probe.is_probe and bench.state == "half-open"
    bench.now_s += 1000.0
    assert bench.breaker.enter() is None, "the first try has not ended"
    probe.fail()
    assert bench.breaker.enter() is None and bench.breaker.wait_s == 10.0
    bench.now_s += 10.0
    probe = bench.enter()
    probe.first_token()
    assert bench.state == "closed" and bench.breaker.enter() is not None
    probe.fail()
    bench.enter().fail()
    assert bench.state == "closed"
    bench.enter().fail()
    assert bench.changes == ["open", "half-open", "open", "half-open", "closed", "open"]


def test_a_try_that_was_given_up_says_nothing_and_the_next_is_an_interval_later() -> None:
    bench = Bench()
    bench.open()
    bench.now_s += 10.0
    probe = bench.enter()
    bench.now_s += 4.0
    probe.leave()
    assert bench.breaker.enter() is None and bench.breaker.wait_s == 6.0
    bench.now_s += 6.0
    bench.enter().succeed()
    assert bench.state == "closed"


def test_results_of_calls_from_before_are_not_counted() -> None:
    bench = Bench()
    old = [bench.enter() for _ in range(10)]
    bench.open()
    for permit in old[:5]:
        permit.succeed()
    assert bench.state == "open"
    bench.now_s += 10.0
    bench.enter().succeed()
    for permit in old[5:]:
        permit.fail()
    assert bench.state == "closed"


def test_a_permit_counts_once() -> None:
    bench = Bench()
    permit = bench.enter()
    for _ in range(5):
        permit.fail()
    permit.succeed()
    permit.leave()
    assert bench.state == "closed"


def test_it_waits_as_long_as_the_endpoint_asks() -> None:
    bench = Bench(max_open_s=60.0)
    bench.enter().fail(wait_s=30.0)
    assert bench.breaker.enter() is None and bench.breaker.wait_s == 30.0
    bench.now_s += 30.0
    bench.enter().fail(wait_s=1e9)
    assert bench.breaker.wait_s == 60.0
    bench.now_s += 60.0
    late = bench.enter()
    late.first_token()
    other = bench.enter()
    late.fail(wait_s=20.0)
    other.fail(wait_s=5.0)
    assert bench.breaker.wait_s == 20.0, "the longer one stands"


@given(st.lists(st.tuples(st.sampled_from(["enter", "fail", "succeed", "leave", "first", "wait"]))))
def test_never_two_tries_and_never_closer_than_an_interval(steps: list[tuple[str]]) -> None:
    bench = Bench()
    bench.open()
    held: list[Permit] = []
    probes: list[float] = []
    for (step,) in steps:
        if step == "wait":
            bench.now_s += 3.0
        elif step == "enter":
            permit = bench.breaker.enter()
            if permit is not None and permit.is_probe:
                assert not any(each.is_probe for each in held)
                assert not probes or bench.now_s - probes[-1] >= 10.0
                probes.append(bench.now_s)
            held += [permit] if permit is not None else []
        elif held:
            permit = held[0] if step == "first" else held.pop(0)
            {"first": permit.first_token}.get(step, getattr(permit, step, permit.leave))()


def test_the_budget_is_a_share_of_calls_and_of_live_calls() -> None:
    budget = RetryBudget(BudgetConfig(share=0.2, spare=2), Random(1))
    assert [budget.take() for _ in range(4)] == [True, True, False, False]
    budget.give_back()
    budget.give_back()
    assert not budget.take(), "what was spent stays spent"
    for _ in range(100):
        budget.enter()
    taken = sum(budget.take() for _ in range(100))
    assert taken == 20 and budget.num_again == 20
    for _ in range(100):
        budget.leave()
    assert budget.num_live == 0 and not budget.take()


def test_waits_are_random_and_grow_up_to_a_bound() -> None:
    budget = RetryBudget(BudgetConfig(base_s=1.0, cap_s=4.0), Random(1))
    for number, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (50, 4.0)):
        waits = [budget.wait_s(number) for _ in range(500)]
        assert 0.0 <= min(waits) < 0.1 * longest and 0.9 * longest < max(waits) <= longest


def usage(prompt: int, cached: int, output: int) -> Usage:
    return Usage(num_prompt_tokens=prompt, num_cached_tokens=cached, num_output_tokens=output)


def test_a_price_is_exact_and_rounded_up_once() -> None:
    price = Price(input_usd=0.15, output_usd=0.6, cached_usd=0.075)
    assert price.cost_nano_usd(usage(1000, 400, 100)) == 600 * 150 + 400 * 75 + 100 * 600
    assert Price(input_usd=0.000000001).cost_nano_usd(usage(1, 0, 0)) == 1
    assert Price(input_usd=0.000000001).cost_nano_usd(usage(10**6, 0, 0)) == 1
    assert Price(input_usd=0.000000001).cost_nano_usd(usage(10**6 + 1, 0, 0)) == 2
    assert Price().cost_nano_usd(usage(10**9, 0, 10**9)) == 0
    assert Price(input_usd=2.5).cost_nano_usd(usage(10, 4, 0)) == 25_000


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_price_is_that_of_exact_arithmetic(
    prompt: int, output: int, input_nano: int, out_nano: int
) -> None:
    price = Price(input_usd=input_nano / 10**9, output_usd=out_nano / 10**9)
    assert price.cost_nano_usd(usage(prompt, 0, output)) == -(
        -(prompt * input_nano + output * out_nano) // 10**6
    )


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e9, "1", True, 0.0000000001, None])
def test_prices_that_cannot_be(value: Any) -> None:
    with pytest.raises(UsageError, match="input_usd"):
        Price(input_usd=value)


def test_configuration_knows_its_bounds() -> None:
    good = UpstreamConfig(name="gpt", url="https://api.openai.com/v1", model="gpt-x")
    assert good.price == Price() and good.api is None
    target = TargetConfig(backend="gpt")
    for build, what in (
        (lambda: UpstreamConfig(name="a b", url="http://x", model="m"), "the name of an upstream"),
        (lambda: UpstreamConfig(name="a", url="http://x", model=""), "has no model"),
        (lambda: UpstreamConfig(name="a", url="http://x", model="m", api="grpc"), "api is 'grpc'"),  # type: ignore[arg-type]
        (lambda: UpstreamConfig(name="a", url="http://x", model="m", between_s=0), "between_s is 0"),
        (lambda: UpstreamConfig(name="a", url="http://x", model="m", max_open=0), "max_open is 0"),
        (lambda: RouteConfig(name="r", targets=()), "no target with a weight"),
        (lambda: RouteConfig(name="r", targets=(target, target)), "have gpt twice"),
        (lambda: RouteConfig(name="r", targets=(target,), max_attempts=0), "max_attempts is 0"),
        (lambda: RouteConfig(name="", targets=(target,)), "the name of a route"),
        (lambda: TargetConfig(backend="gpt", weight=-1), "weight is -1"),
        (lambda: ShadowConfig(backend="gpt", share=1.5), "share is 1.5"),
        (lambda: BreakerConfig(failures=1.5), "failures is 1.5"),  # type: ignore[arg-type]
        (lambda: BreakerConfig(open_s=20, max_open_s=10), "max_open_s is 10"),
        (lambda: BudgetConfig(share=2), "share is 2"),
    ):
        with pytest.raises(UsageError) as caught:
            build()
        assert what in caught.value.message and caught.value.hint
