"""`/metrics` for Prometheus: the names that dashboards for vLLM know, and `tokenmill_*` for money and energy.

Counters and histograms are fed by what has ended; gauges are asked when somebody scrapes. Labels are names of
this server's configuration and words of fixed lists, never a client's: neither keys, users nor features. One
registry belongs to one server.

`vllm:` series have the labels that vLLM gives them, `tokenmill_` series the tier as well. Where vLLM times
every gap between tokens (`inter_token_latency`), this has the mean gap of each call. Times in queue and
prefill are not known here apart from each other: together they are the time to the first token.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from tokenmill.core import Usage
from tokenmill.engine.serving.async_engine import EngineStats
from tokenmill.server.fleet import Deployed, Fleet
from tokenmill.server.gateway import Settled
from tokenmill.server.slo import CallTimes, SloConfig, SloMeasure
from tokenmill.store import Entry

__all__ = ["Gauge", "Metrics"]

_NANO: Final = 1e-9
_TTFT_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_TPOT_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_E2E_S: Final = tuple(0.01 * 2.0**power for power in range(14))
_BY_MODEL: Final = ("model_name",)
_BY_TIER: Final = ("model", "tier")
_BY_DEPLOYMENT: Final = ("model", "deployment", "tier")


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """A value that is asked at each scrape: `read` gives (values of `labels`, value)."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    read: Callable[[], Iterable[tuple[tuple[str, ...], float]]]


class Metrics:
    """All series of one server. It belongs to one event loop, which also scrapes."""

    def __init__(self, slo: SloConfig | None = None) -> None:
        self._registry = CollectorRegistry()
        slo = slo or SloConfig()
        edges = {measure: _edges(slo, measure) for measure in _BUCKETS}
        self._known = _Known(self._registry, edges)
        self._ours = _Ours(self._registry, edges)

    def settled(self, settled: Settled, times: CallTimes | None) -> None:
        """Count a call that has ended; without `times` it was refused, and only its attempts count."""
        for entry in settled.entries:
            self._ours.add_entry(entry)
        if times is not None:
            if settled.records:
                self._known.add_usage(times.model, settled.records[-1].spent.usage)
            self._known.add_call(times)
            self._ours.add_call(times)

    def answered(self, route: str, status: int) -> None:
        """Count an HTTP answer."""
        self._ours.http.labels(route, str(status)).inc()

    def routed(self, kind: str, deployment: str) -> None:
        """Count what the router did: an attempt, a retry, a fallback, a breaker that changed."""
        self._ours.routed.labels(kind, deployment).inc()

    def watch_fleet(self, fleet: Fleet) -> None:
        """Report the engines from now on."""
        self._registry.register(_Engines(fleet))

    def watch(self, gauges: Sequence[Gauge]) -> None:
        """Report these, too."""
        self._registry.register(_Gauges(tuple(gauges)))

    def scrape(self, accept: str = "") -> tuple[bytes, str]:
        """The text of all series and its content type, in the format that `accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


_BUCKETS: Final[dict[SloMeasure, tuple[float, ...]]] = {"ttft": _TTFT_S, "tpot": _TPOT_S, "e2e": _E2E_S}


def _edges(slo: SloConfig, measure: SloMeasure) -> tuple[float, ...]:
    """The usual edges, and the objectives themselves: what a histogram says of those is exact then."""
    return tuple(sorted({*_BUCKETS[measure], *slo.edges_s(measure)}))


class _Known:
    """Series by vLLM's names."""

    def __init__(self, registry: CollectorRegistry, edges: dict[SloMeasure, tuple[float, ...]]) -> None:
        def counter(name: str, text: str, labels: tuple[str, ...] = _BY_MODEL) -> Counter:
            return Counter(f"vllm:{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, measure: SloMeasure) -> Histogram:
            return Histogram(f"vllm:{name}", text, _BY_MODEL, registry=registry, buckets=edges[measure])

        self._prompt = counter("prompt_tokens", "Prompt tokens, those found in the cache included")
        self._output = counter("generation_tokens", "Output tokens")
        self._drafts = counter("spec_decode_num_draft_tokens", "Tokens that speculation proposed")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Those of them that were right")
        self._ended = counter("request_success", "Calls that ended", ("model_name", "finished_reason"))
        self._ttft = histogram("time_to_first_token_seconds", "To the first token", "ttft")
        self._gap = histogram("inter_token_latency_seconds", "Mean gap between tokens of a call", "tpot")
        self._tpot = histogram("request_time_per_output_token_seconds", "Mean time of a token", "tpot")
        self._e2e = histogram("e2e_request_latency_seconds", "From admission to the last token", "e2e")
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last", "e2e")

    def add_usage(self, model: str, usage: Usage) -> None:
        self._prompt.labels(model).inc(usage.num_prompt_tokens)
        self._output.labels(model).inc(usage.num_output_tokens)
        self._drafts.labels(model).inc(usage.num_draft_tokens)
        self._accepted.labels(model).inc(usage.num_accepted_tokens)

    def add_call(self, times: CallTimes) -> None:
        model = times.model
        self._ended.labels(model, _VLLM_REASONS[times.finish]).inc()
        self._e2e.labels(model).observe(times.total_s)
        if times.ttft_s is not None:
            self._ttft.labels(model).observe(times.ttft_s)
            self._decode.labels(model).observe(max(0.0, times.total_s - times.ttft_s))
        if times.tpot_s is not None:
            self._gap.labels(model).observe(times.tpot_s)
            self._tpot.labels(model).observe(times.tpot_s)


_VLLM_REASONS: Final = {
    "completed": "stop",
    "stopped": "stop",
    "length": "length",
    "cancelled": "abort",
    "failed": "error",
    "expired": "error",
}


class _Ours:
    """Series that have no name elsewhere."""

    def __init__(self, registry: CollectorRegistry, edges: dict[SloMeasure, tuple[float, ...]]) -> None:
        def counter(name: str, text: str, labels: tuple[str, ...]) -> Counter:
            return Counter(f"tokenmill_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, measure: SloMeasure) -> Histogram:
            return Histogram(f"tokenmill_{name}", text, _BY_TIER, registry=registry, buckets=edges[measure])

        self._calls = counter("calls", "Calls that ended", (*_BY_TIER, "finish"))
        self._attempts = counter("attempts", "Lines of the ledger", (*_BY_DEPLOYMENT, "kind", "finish"))
        self._tokens = counter("tokens", "Tokens: fresh prompt, cached prompt, output", (*_BY_TIER, "part"))
        self._cost = counter("cost_usd", "What calls cost: measured, or billed upstream", _BY_DEPLOYMENT)
        self._price = counter("price_usd", "What calls were charged", _BY_DEPLOYMENT)
        self._energy = counter(
            "energy_joules", "Energy that calls took, where it is measured", _BY_DEPLOYMENT
        )
        self._busy = counter("busy_seconds", "Time that calls were charged for", _BY_DEPLOYMENT)
        self._ttft = histogram("ttft_seconds", "To the first token, by tier", "ttft")
        self._tpot = histogram("tpot_seconds", "Mean time of a token of a call, by tier", "tpot")
        self._e2e = histogram("e2e_seconds", "From admission to the last token, by tier", "e2e")
        self.http = counter("http_responses", "HTTP answers", ("route", "status"))
        self.routed = counter("router_events", "What the router did", ("kind", "deployment"))

    def add_entry(self, entry: Entry) -> None:
        where = (entry.model, entry.deployment, entry.tier)
        tier = (entry.model, entry.tier)
        self._attempts.labels(*where, entry.kind, entry.finish).inc()
        self._tokens.labels(*tier, "prompt").inc(entry.num_prompt_tokens - entry.num_cached_tokens)
        self._tokens.labels(*tier, "cached").inc(entry.num_cached_tokens)
        self._tokens.labels(*tier, "output").inc(entry.num_output_tokens)
        self._cost.labels(*where).inc(entry.cost_nano_usd * _NANO)
        self._price.labels(*where).inc(entry.price_nano_usd * _NANO)
        self._energy.labels(*where).inc(entry.nanojoules * _NANO)
        self._busy.labels(*where).inc(entry.nanoseconds * _NANO)

    def add_call(self, times: CallTimes) -> None:
        tier = (times.model, times.tier)
        self._calls.labels(*tier, times.finish).inc()
        self._e2e.labels(*tier).observe(times.total_s)
        if times.ttft_s is not None:
            self._ttft.labels(*tier).observe(times.ttft_s)
        if times.tpot_s is not None:
            self._tpot.labels(*tier).observe(times.tpot_s)


class _Gauges(Collector):
    """Values that are asked when somebody scrapes."""

    def __init__(self, gauges: tuple[Gauge, ...]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for gauge in self._gauges:
            family = GaugeMetricFamily(gauge.name, gauge.help, labels=gauge.labels)
            for labels, value in gauge.read():
                family.add_metric(labels, value)
            yield family

    def describe(self) -> Iterable[Metric]:
        return [GaugeMetricFamily(gauge.name, gauge.help, labels=gauge.labels) for gauge in self._gauges]


class _Engines(Collector):
    """What the engines say of themselves."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        found = [(each, each.stats()) for each in self._fleet.deployments if each.stats is not None]
        for name, text, of_model, of_engine in _ENGINE_GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=_BY_MODEL if of_model else _ENGINE_LABELS)
            for each, stats in found:
                gauge.add_metric([each.model] if of_model else [each.model, each.name], of_engine(stats))
            yield gauge
        for name, text, of_model, of_engine in _ENGINE_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=_BY_MODEL if of_model else _ENGINE_LABELS)
            for each, stats in found:
                counter.add_metric([each.model] if of_model else [each.model, each.name], of_engine(stats))
            yield counter
        yield from _by_tier(found)
        up = GaugeMetricFamily("tokenmill_deployment_up", "1 if it takes calls", labels=_ENGINE_LABELS)
        for each in self._fleet.deployments:
            up.add_metric([each.model, each.name], float(each.state() == "ready"))
        yield up
        breaker = GaugeMetricFamily(
            "tokenmill_breaker_open", "1 if calls are kept away", labels=_ENGINE_LABELS
        )
        for each in self._fleet.deployments:
            breaker.add_metric([each.model, each.name], float(each.breaker() != "closed"))
        yield breaker

    def describe(self) -> Iterable[Metric]:
        return []


def _by_tier(found: Sequence[tuple[Deployed, EngineStats]]) -> Iterable[Metric]:
    labels = (*_ENGINE_LABELS, "tier", "state")
    family = GaugeMetricFamily("tokenmill_engine_sequences", "In the batch, or waiting for it", labels=labels)
    for each, stats in found:
        for state, by_tier in (("running", stats.running_by_tier), ("waiting", stats.waiting_by_tier)):
            for tier, number in by_tier.items():
                family.add_metric([each.model, each.name, tier, state], number)
    yield family


def _kv_share(stats: EngineStats) -> float:
    return stats.num_blocks_in_use / stats.num_blocks if stats.num_blocks else 0.0


_ENGINE_LABELS: Final = ("model", "deployment")
_ENGINE_GAUGES: Final[tuple[tuple[str, str, bool, Callable[[EngineStats], float]], ...]] = (
    ("vllm:num_requests_running", "Sequences in the batch", True, lambda stats: stats.num_running),
    ("vllm:num_requests_waiting", "Sequences that wait for it", True, lambda stats: stats.num_waiting),
    ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 1 is full", True, _kv_share),
    ("tokenmill_kv_blocks", "Blocks of the KV cache", False, lambda stats: stats.num_blocks),
    ("tokenmill_kv_blocks_in_use", "Blocks that are held", False, lambda stats: stats.num_blocks_in_use),
    ("tokenmill_engine_requests", "Requests that have not ended", False, lambda stats: stats.num_in_flight),
)
_ENGINE_COUNTERS: Final[tuple[tuple[str, str, bool, Callable[[EngineStats], float]], ...]] = (
    (
        "vllm:prefix_cache_queries",
        "Prompt tokens that were looked for in the cache",
        True,
        lambda stats: stats.counts.num_queried_tokens,
    ),
    (
        "vllm:prefix_cache_hits",
        "Prompt tokens that were found in it",
        True,
        lambda stats: stats.counts.num_hit_tokens,
    ),
    (
        "vllm:num_preemptions",
        "Sequences that gave their blocks back",
        True,
        lambda stats: stats.counts.num_preempted,
    ),
    ("tokenmill_engine_restarts", "Engine processes started anew", False, lambda stats: stats.num_restarts),
    ("tokenmill_engine_steps", "Steps of the present process", False, lambda stats: stats.num_steps),
    (
        "tokenmill_engine_resubmitted",
        "Requests sent to a second process",
        False,
        lambda stats: stats.num_resubmitted,
    ),
    (
        "tokenmill_engine_busy_seconds",
        "Time that was charged to requests",
        False,
        lambda stats: stats.busy_ns * _NANO,
    ),
    ("tokenmill_engine_idle_seconds", "Time without work", False, lambda stats: stats.idle_ns * _NANO),
)
