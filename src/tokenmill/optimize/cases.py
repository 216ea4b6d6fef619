"""The rows of a workload as calls with what is known of each: what was wanted, what the incumbent's answer
was worth and cost.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from tokenmill.core import SamplingParams, UsageError
from tokenmill.evals.statistics import cost_per_pass
from tokenmill.optimize.quality import Scorer
from tokenmill.optimize.records import Range
from tokenmill.wire import Call, parse_openai_chat
from tokenmill.workload import Row, estimated_tokens

__all__ = ["Case", "PassRule", "Prices", "case_of", "cost_of_tokens", "incumbent_cost"]

_DEFAULTS: Final = SamplingParams(temperature=0.0, max_tokens=1 << 20)
"""As `tokenmill serve` has them, but greedy: a certificate is of one answer, not of a draw."""

PassRule: TypeAlias = Callable[[float, float], bool]
"""Whether an answer passes, by its score and the incumbent's."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Dollars for 10^6 tokens that the incumbent costs."""

    input_usd: float
    output_usd: float
    cached_usd: float | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row. `call` is None where the request is none that this server takes, with the reason in `refusal`.

    `wanted` is the reference, or the incumbent's `answer`. `usd` is what the incumbent's answer cost, None if
    there is no price; `usd_is_estimated` says that the log has no token counts and they were reckoned.
    """

    row: Row
    id: str
    number: int
    slice: str
    cluster: str
    call: Call | None
    refusal: str
    wanted: str
    answer: str
    score: float
    passed: bool
    usd: float | None
    usd_is_estimated: bool
    origin: str
    terms: tuple[str, ...]


def case_of(
    row: Row, score: Scorer, passes: PassRule, prices: Prices | None, *, model: str = "workload"
) -> Case:
    """The case of a row. `passes` decides of (score, the incumbent's score)."""
    own = 1.0 if row.reference is None else score(row.reference, row.answer)
    call, refusal = _call(row.request, model)
    num_input, num_output = estimated_tokens(row)
    usd = None
    if prices is not None:
        usd = cost_of_tokens(prices, num_input, num_output, row.num_cached_tokens or 0)
    return Case(
        row=row,
        id=row.id,
        number=row.number,
        slice=row.slice,
        cluster=row.conversation,
        call=call,
        refusal=refusal,
        wanted=row.target,
        answer=row.answer,
        score=own,
        passed=passes(own, own),
        usd=usd,
        usd_is_estimated=row.num_input_tokens is None or row.num_output_tokens is None,
        origin=row.origin,
        terms=tuple(row.terms),
    )


def cost_of_tokens(prices: Prices, num_input: int, num_output: int, num_cached: int = 0) -> float:
    """Dollars of one answer; cached tokens are part of the input's."""
    cached_usd = prices.input_usd if prices.cached_usd is None else prices.cached_usd
    total = (num_input - num_cached) * prices.input_usd + num_cached * cached_usd
    return (total + num_output * prices.output_usd) / 1e6


def incumbent_cost(cases: Sequence[Case], confidence: float) -> Range | None:
    """What a passing answer of the incumbent costs, with its interval; None without a price."""
    from_cases = [(case.usd, case.passed) for case in cases if case.usd is not None]
    if not from_cases:
        return None
    costs, passed = zip(*from_cases, strict=True)
    found = cost_per_pass(costs, [float(each) for each in passed], confidence=confidence)
    return Range.of(found)


def _call(request: Mapping[str, Any], model: str) -> tuple[Call | None, str]:
    body = {**request, "model": model}
    for name in ("stream", "stream_options", "n", "store"):
        body.pop(name, None)
    try:
        return parse_openai_chat(json.dumps(body).encode(), _DEFAULTS), ""
    except (UsageError, ValueError) as error:
        return None, str(error)
