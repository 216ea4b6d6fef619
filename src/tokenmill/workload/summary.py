"""What a workload is, before anything is spent: slices, lengths, duplicates, balance, terms, today's cost.

Tokens are those that the incumbent's API counted; where the log has none they are estimated from the texts,
and the summary says for how many rows.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from tokenmill.workload.config import Incumbent, WorkloadConfig
from tokenmill.workload.row import Log, Row, canonical_json, estimated_tokens
from tokenmill.workload.splits import Splits
from tokenmill.workload.terms import TermsCount, count_terms

__all__ = [
    "Balance",
    "Cost",
    "Duplicates",
    "Lengths",
    "SliceSummary",
    "Summary",
    "incumbent_cost",
    "summarise",
]

_DAY_S: Final = 86400.0
_MONTH_DAYS: Final = 30.0


class Lengths(NamedTuple):
    """Tokens of so many rows; `num_estimated` rows have no count of their own."""

    total: int
    least: int
    p50: int
    p95: int
    most: int
    num_estimated: int


class SliceSummary(NamedTuple):
    """A slice: its rows, and those that certify with the clusters that they are."""

    name: str
    num_rows: int
    num_certify: int
    num_certify_clusters: int


class Duplicates(NamedTuple):
    """Rows that ask what an earlier one asked, of them those with another answer, and rows that are nearly
    like another one or of its conversation.
    """

    num_same: int
    num_contradictions: int
    num_near: int


class Balance(NamedTuple):
    """Different answers, the most frequent one and its share, and the rows of the rarest label (of those in
    the workload's file, or of all answers); `num_unknown` rows answer with none of those labels.
    """

    num_answers: int
    most_frequent: str
    share: float
    rarest: int
    num_unknown: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the incumbent costs in USD at its dated price; `per_month` only where the rows' times say how
    often it is asked. `num_estimated` rows have tokens that are estimated.
    """

    total_usd: float
    input_usd: float
    output_usd: float
    per_1000_calls_usd: float
    per_month_usd: float | None
    price_date: str
    price_source: str
    num_estimated: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All of it; `cost` is None without a price."""

    num_rows: int
    num_faults: int
    format: str
    days: float | None
    slices: tuple[SliceSummary, ...]
    input: Lengths
    output: Lengths
    duplicates: Duplicates
    balance: Balance
    terms: tuple[TermsCount, ...]
    cost: Cost | None
    num_train: int
    num_select: int
    num_certify: int
    num_certify_clusters: int
    split_by: str
    split_digest: str


def summarise(config: WorkloadConfig, log: Log, splits: Splits) -> Summary:
    """Count everything once."""
    rows = log.rows
    tokens = [estimated_tokens(row) for row in rows]
    return Summary(
        num_rows=len(rows),
        num_faults=len(log.faults),
        format=log.format,
        days=_days(rows),
        slices=_slices(rows, splits),
        input=_lengths([each for each, _ in tokens], sum(row.num_input_tokens is None for row in rows)),
        output=_lengths([each for _, each in tokens], sum(row.num_output_tokens is None for row in rows)),
        duplicates=_duplicates(rows, splits),
        balance=_balance(rows, config.labels),
        terms=count_terms(rows, config.terms),
        cost=incumbent_cost(rows, config.incumbent),
        num_train=len(splits.train),
        num_select=len(splits.select),
        num_certify=len(splits.certify),
        num_certify_clusters=_num_clusters(splits.certify, splits),
        split_by=splits.by,
        split_digest=splits.digest,
    )


def incumbent_cost(rows: Sequence[Row], incumbent: Incumbent) -> Cost | None:
    """What these calls cost at the incumbent's price, None if nobody said. Cached input is charged as such
    where the log counts it and the price has it.
    """
    if incumbent.price_in is None or incumbent.price_out is None:
        return None
    cached_price = incumbent.price_in if incumbent.price_cached is None else incumbent.price_cached
    input_usd = output_usd = 0.0
    for row in rows:
        num_input, num_output = estimated_tokens(row)
        num_cached = min(row.num_cached_tokens or 0, num_input)
        input_usd += ((num_input - num_cached) * incumbent.price_in + num_cached * cached_price) / 1e6
        output_usd += num_output * incumbent.price_out / 1e6
    total, days = input_usd + output_usd, _days(rows)
    return Cost(
        total_usd=total,
        input_usd=input_usd,
        output_usd=output_usd,
        per_1000_calls_usd=1000 * total / len(rows) if rows else 0.0,
        per_month_usd=total / days * _MONTH_DAYS if days else None,
        price_date=incumbent.price_date,
        price_source=incumbent.price_source,
        num_estimated=sum(row.num_input_tokens is None or row.num_output_tokens is None for row in rows),
    )


def _days(rows: Sequence[Row]) -> float | None:
    """Days from the first row to the last, None if that is no day or not known."""
    times = [row.created for row in rows if row.created is not None]
    if len(times) < len(rows) or not times:
        return None
    days = (max(times) - min(times)) / _DAY_S
    return days if days >= 1 else None


def _lengths(values: Sequence[int], num_estimated: int) -> Lengths:
    ordered = sorted(values)
    p50, p95 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95))
    return Lengths(sum(ordered), ordered[0], p50, p95, ordered[-1], num_estimated)


def _slices(rows: Sequence[Row], splits: Splits) -> tuple[SliceSummary, ...]:
    counts = Counter(row.slice for row in rows)
    certify: dict[str, list[Row]] = defaultdict(list)
    for row in splits.certify:
        certify[row.slice].append(row)
    return tuple(
        SliceSummary(name, num, len(certify[name]), _num_clusters(certify[name], splits))
        for name, num in sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    )


def _num_clusters(rows: Sequence[Row], splits: Splits) -> int:
    return len({splits.clusters[row.id] for row in rows})


def _duplicates(rows: Sequence[Row], splits: Splits) -> Duplicates:
    answers: dict[str, set[str]] = {}
    num_same = num_contradictions = 0
    for row in rows:
        asked = canonical_json(row.request)
        if asked in answers:
            num_same += 1
            num_contradictions += row.target not in answers[asked]
        answers.setdefault(asked, set()).add(row.target)
    sizes = Counter(splits.clusters.values())
    return Duplicates(num_same, num_contradictions, sum(size for size in sizes.values() if size > 1))


def _balance(rows: Sequence[Row], labels: Sequence[str]) -> Balance:
    counts = Counter(row.target.strip() for row in rows)
    answer, num = counts.most_common(1)[0]
    known = set(labels)
    return Balance(
        num_answers=len(counts),
        most_frequent=answer,
        share=num / len(rows),
        rarest=min(counts[each] for each in labels) if labels else min(counts.values()),
        num_unknown=sum(count for each, count in counts.items() if each not in known) if labels else 0,
    )
