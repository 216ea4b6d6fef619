"""/metrics: known names, exact sums, the objective as an edge, and labels that no client can fill."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families as families

from tests.fast.server_fakes import deployment
from tests.fast.settled_calls import CANARY, settled
from tokenmill.engine.counts import EngineCounts
from tokenmill.server.fleet import Fleet
from tokenmill.server.gateway import Settled
from tokenmill.server.metrics import Gauge, Metrics
from tokenmill.server.observer import Observer, ObserverConfig, route_label
from tokenmill.server.slo import CallTimes, SloConfig, SloObjective

VLLM_NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
}


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text, content_type = metrics.scrape()
    assert content_type.startswith("text/plain")
    found = {}
    for family in families(text.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


def fed(*calls: Settled, slo: SloConfig | None = None) -> Metrics:
    observer = Observer(ObserverConfig(slo=slo or SloConfig()))
    for call in calls:
        observer.settled(call)
    return observer.metrics


def test_the_names_that_dashboards_know_are_there() -> None:
    metrics = fed(settled())
    counts = EngineCounts(num_queried_tokens=50, num_hit_tokens=20)
    engine: dict[str, Any] = {
        "num_running": 3,
        "num_waiting": 2,
        "num_blocks_in_use": 25,
        "waiting_by_tier": {"batch": 2},
    }
    metrics.watch_fleet(Fleet([deployment(**engine, counts=counts, busy_ns=3 * 10**9)]))
    assert {name for name, _ in samples(metrics)} >= VLLM_NAMES
    assert value(metrics, "vllm:num_requests_running", model_name="mock") == 3
    assert value(metrics, "vllm:num_requests_waiting", model_name="mock") == 2
    assert value(metrics, "vllm:kv_cache_usage_perc", model_name="mock") == 0.25
    assert value(metrics, "vllm:prefix_cache_hits_total", model_name="mock") == 20
    where = {"model": "mock", "deployment": "mock"}
    assert value(metrics, "tokenmill_engine_busy_seconds_total", **where) == pytest.approx(3)
    assert value(metrics, "tokenmill_engine_sequences", tier="batch", state="waiting", **where) == 2


def test_sums_are_exact() -> None:
    metrics = fed(*[settled(request_id=f"req_{number}") for number in range(1000)])
    model = {"model_name": "mock"}
    where = {"model": "mock", "deployment": "deployment-0", "tier": "fast"}
    assert value(metrics, "vllm:prompt_tokens_total", **model) == 10_000
    assert value(metrics, "vllm:generation_tokens_total", **model) == 5000
    assert value(metrics, "vllm:request_success_total", finished_reason="stop", **model) == 1000
    assert value(metrics, "tokenmill_cost_usd_total", **where) == pytest.approx(7e-3)
    assert value(metrics, "tokenmill_price_usd_total", **where) == pytest.approx(9e-3)
    assert value(metrics, "tokenmill_energy_joules_total", **where) == pytest.approx(2000)
    tokens = [
        value(metrics, "tokenmill_tokens_total", model="mock", tier="fast", part=part)
        for part in ("prompt", "cached", "output")
    ]
    assert tokens == [6000, 4000, 5000]


def test_an_objective_is_an_edge_of_the_histograms() -> None:
    slo = SloConfig(objectives=(SloObjective(ttft_ms=333.0),))
    calls = [settled(ttft_s=0.333), settled(ttft_s=0.334)]
    name = "vllm:time_to_first_token_seconds_bucket"
    assert value(fed(*calls, slo=slo), name, model_name="mock", le="0.333") == 1
    assert (name, frozenset({("model_name", "mock"), ("le", "0.333")})) not in samples(fed(*calls))


def test_each_attempt_is_counted_and_the_call_once() -> None:
    metrics = fed(settled(finishes=("failed", "completed")))
    assert value(metrics, "tokenmill_calls_total", model="mock", tier="fast", finish="completed") == 1
    for number, finish in enumerate(("failed", "completed")):
        where = {"model": "mock", "deployment": f"deployment-{number}", "tier": "fast"}
        assert value(metrics, "tokenmill_attempts_total", kind="local", finish=finish, **where) == 1
    assert value(metrics, "vllm:prompt_tokens_total", model_name="mock") == 10


def test_a_call_that_its_key_may_not_have_is_no_failure() -> None:
    refused = samples(fed(settled(finishes=("failed",), error="BudgetError")))
    assert not [
        name for name, _ in refused if name in ("tokenmill_calls_total", "vllm:request_success_total")
    ]
    assert not samples(fed(replace(settled(finishes=()), is_refused=True)))
    nobody = fed(settled(finishes=()))  # no deployment took it
    assert value(nobody, "tokenmill_calls_total", model="mock", tier="fast", finish="failed") == 1
    failed = fed(settled(finishes=("failed",), error="EndpointError"))
    assert value(failed, "tokenmill_calls_total", model="mock", tier="fast", finish="failed") == 1


def test_no_label_has_words_of_a_client() -> None:
    metrics = fed(settled(), settled(finishes=("failed",)))
    for path in (f"/v1/{CANARY}", f"/{CANARY}", f"/v1/models/{CANARY}", "/v1/files/../x", "/v1/models"):
        metrics.answered(route_label(path), 404)
    text = metrics.scrape()[0].decode()
    assert CANARY not in text and "key_1" not in text
    assert {route_label(f"/v1/models/{number}") for number in range(100)} == {"/v1/models"}
    assert {route_label(f"/{number}") for number in range(100)} == {"other"}


def test_openmetrics_is_spoken_where_it_is_asked_for() -> None:
    text, content_type = fed(settled()).scrape("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    found = open_families(text.decode())  # type: ignore[no-untyped-call]
    assert "vllm:prompt_tokens" in {family.name for family in found}


def test_gauges_are_asked_at_each_scrape() -> None:
    metrics, seen = Metrics(), [1.0]

    def read() -> Iterable[tuple[tuple[str, ...], float]]:
        yield ("x",), seen[0]

    metrics.watch([Gauge(name="tokenmill_test", help="test", labels=("a",), read=read)])
    assert value(metrics, "tokenmill_test", a="x") == 1.0
    seen[0] = 2.0
    assert value(metrics, "tokenmill_test", a="x") == 2.0


def test_two_servers_in_a_process_share_nothing() -> None:
    first, second = fed(settled()), Metrics()
    times = CallTimes("other", "batch", "length", None, 1.0, 0)
    second.settled(settled(model="other", tier="batch"), times)
    assert ("vllm:prompt_tokens_total", frozenset({("model_name", "other")})) not in samples(first)
