"""The figures of a run, all from its raw samples.

Latencies are of requests that succeeded; errors and cancellations are counted beside them, never among
them. Names that others use otherwise:

    TTFT  from the time a request was due to the first piece of text
    TPOT  (last piece - first piece) / (output tokens - 1), one figure a request; AIPerf and guidellm call it
          inter-token latency
    ITL   the gap between two pieces of text, one figure a gap; a piece may be several tokens
    E2E   from the time a request was due to the end of its answer

Goodput counts requests that kept every limit. A request that failed kept none.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenmill.core import UsageError
from tokenmill.evals.load.driver import ClientStats, LoadRun
from tokenmill.evals.load.quantiles import Distribution, grouped_distribution, simple_distribution
from tokenmill.evals.load.samples import Origin, Sample
from tokenmill.evals.statistics import wilson_interval

__all__ = ["Goodput", "Slo", "Summary", "duration", "goodput", "summarize"]


@dataclass(frozen=True, kw_only=True)
class Slo:
    """A service level: `percentile` % of all requests keep every limit given, in milliseconds."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    percentile: float = 99.0

    def __post_init__(self) -> None:
        limits = (self.ttft_ms, self.tpot_ms, self.e2e_ms)
        if all(limit is None for limit in limits):
            raise UsageError("a service level without a limit", hint="give one of ttft, tpot and e2e")
        for limit in limits:
            if limit is not None and not 0.0 < limit < math.inf:
                raise UsageError(f"a limit is {limit} ms", hint="use milliseconds above 0")
        if not 0.0 < self.percentile <= 100.0:
            raise UsageError(f"percentile is {self.percentile}", hint="use a value above 0, up to 100")

    def is_kept(self, sample: Sample) -> bool:
        """Whether a request kept every limit."""
        if sample.status != "ok":
            return False
        taken = (
            (self.ttft_ms, sample.ttft_s()),
            (self.tpot_ms, sample.tpot_s),
            (self.e2e_ms, sample.e2e_s()),
        )
        return all(limit is None or time is None or 1e3 * time <= limit for limit, time in taken)


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Requests that kept every limit, of those that ended by themselves; `low` to `high` is Wilson's
    interval.
    """

    num_good: int
    num_counted: int
    share: float
    low: float
    high: float
    requests_per_s: float
    is_met: bool


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One run. `duration_s` is from when the first measured request was due to the end of the last one.

    Throughputs are of requests that succeeded, in tokens or requests a second. `errors` counts each reason.
    `max_late_ms` is how long after its time a request was sent at most.
    """

    num_requests: int
    num_ok: int
    num_errors: int
    num_cancelled: int
    num_warmup: int
    errors: Mapping[str, int]
    duration_s: float
    num_input_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    counted_by: str
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    mean_concurrency: float
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None
    ttft_from_send_ms: Distribution | None
    max_late_ms: float
    goodput: Goodput | None
    client: ClientStats
    was_stopped: bool


def summarize(run: LoadRun, slo: Slo | None = None, *, origin: Origin = "due") -> Summary:
    """All figures of a run; with `origin` "sent" latencies are counted as most tools do."""
    measured = [sample for sample in run.samples if not sample.is_warmup]
    ok = [sample for sample in measured if sample.status == "ok"]
    errors = Counter(sample.error for sample in measured if sample.status == "error")
    duration_s = duration(measured)
    rate = 1.0 / duration_s if duration_s else 0.0
    num_input, num_output = (
        sum(sample.num_input_tokens for sample in ok),
        sum(sample.num_output_tokens for sample in ok),
    )
    return Summary(
        num_requests=len(measured),
        num_ok=len(ok),
        num_errors=errors.total(),
        num_cancelled=sum(sample.status == "cancelled" for sample in measured),
        num_warmup=len(run.samples) - len(measured),
        errors=dict(errors.most_common()),
        duration_s=duration_s,
        num_input_tokens=num_input,
        num_cached_tokens=sum(sample.num_cached_tokens for sample in ok),
        num_output_tokens=num_output,
        counted_by="system" if all(sample.counted_by == "system" for sample in ok) else "pieces",
        requests_per_s=len(ok) * rate,
        input_tokens_per_s=num_input * rate,
        output_tokens_per_s=num_output * rate,
        total_tokens_per_s=(num_input + num_output) * rate,
        mean_concurrency=sum(sample.end_s - sample.sent_s for sample in measured) * rate,
        ttft_ms=_milliseconds([sample.ttft_s(origin) for sample in ok]),
        tpot_ms=_milliseconds([sample.tpot_s for sample in ok]),
        itl_ms=grouped_distribution([[1e3 * gap for gap in sample.gaps_s] for sample in ok]),
        e2e_ms=_milliseconds([sample.e2e_s(origin) for sample in ok]),
        ttft_from_send_ms=_milliseconds([sample.ttft_s("sent") for sample in ok]),
        max_late_ms=1e3 * max((sample.late_s for sample in measured), default=0.0),
        goodput=None if slo is None else goodput(measured, slo),
        client=run.client,
        was_stopped=run.was_stopped,
    )


def goodput(samples: Sequence[Sample], slo: Slo) -> Goodput:
    """Of requests that ended by themselves, errors included; what we cancelled says nothing."""
    counted = [sample for sample in samples if sample.status != "cancelled"]
    num_good = sum(slo.is_kept(sample) for sample in counted)
    interval = wilson_interval(num_good, len(counted))
    duration_s = duration(samples)
    return Goodput(
        num_good=num_good,
        num_counted=len(counted),
        share=num_good / len(counted) if counted else 0.0,
        low=interval.low,
        high=interval.high,
        requests_per_s=num_good / duration_s if duration_s else 0.0,
        is_met=bool(counted) and 100.0 * num_good >= slo.percentile * len(counted),
    )


def duration(samples: Sequence[Sample]) -> float:
    """Seconds from when the first was due to the end of the last; 0 of none."""
    return max(s.end_s for s in samples) - min(s.due_s for s in samples) if samples else 0.0


def _milliseconds(times_s: Sequence[float | None]) -> Distribution | None:
    return simple_distribution([1e3 * time for time in times_s if time is not None])
