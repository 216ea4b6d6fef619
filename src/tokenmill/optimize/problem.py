"""A workload made ready: its rows as cases in three parts, and every rule that decides, read off its file.

train     what candidates are made from; rows that the terms deny are left out here
select    what they are compared on while there are many
certify   what the verdict is of; each look is counted
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from tokenmill import __version__
from tokenmill.core import UsageError
from tokenmill.evals.load import Slo
from tokenmill.models.files import hash_file
from tokenmill.optimize.cases import Case, Prices, case_of, incumbent_cost
from tokenmill.optimize.measure import Rules
from tokenmill.optimize.quality import find_scorer, passes
from tokenmill.optimize.records import Range
from tokenmill.optimize.verdict import Bar
from tokenmill.runs import content_hash
from tokenmill.workload import Log, Row, Splits, WorkloadConfig, count_terms

__all__ = ["DEFAULT_USD_PER_HOUR", "Problem", "problem_of"]

DEFAULT_USD_PER_HOUR: Final = 0.0884
"""A public cloud's list price of 2 virtual processors with 8 GB, 2026-11; said beside every figure."""
_DEFAULT_SOURCE: Final = "assumed: a public cloud's list price of 2 vCPUs and 8 GB, 2026-11"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """All that a search needs to know. `denied` are the ids of all rows that the terms forbid to train on.

    `about` describes the workload for the report and the certificate; `digests` are what it is known by.
    """

    config: WorkloadConfig
    splits: Splits
    train: tuple[Case, ...]
    denied: frozenset[str]
    select: tuple[Case, ...]
    certify: tuple[Case, ...]
    rules: Rules
    bar: Bar
    incumbent_cost: Range | None
    usd_per_hour: float
    digests: Mapping[str, str]
    about: Mapping[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """The closed set of answers, if there is one."""
        return self.config.labels

    @property
    def slo(self) -> Slo | None:
        """The limits of latency."""
        return self.rules.slo


def problem_of(config: WorkloadConfig, log: Log, splits: Splits) -> Problem:
    """The problem of a workload. Raises UsageError where a part has no rows."""
    for name in ("train", "select", "certify"):
        if not getattr(splits, name):
            raise UsageError(f"no rows are left for {name}", hint="give a longer log, or other shares")
    quality = config.quality
    absolute = None if isinstance(quality.bar, str) else float(quality.bar)
    rules = Rules(
        score=find_scorer(quality.scorer, config.labels),
        passes=partial(passes, name=quality.scorer, margin=quality.margin, bar=absolute),
        slo=_slo(config),
        confidence=quality.confidence,
    )
    incumbent = config.incumbent
    prices = None
    if incumbent.price_in is not None and incumbent.price_out is not None:
        prices = Prices(
            input_usd=incumbent.price_in, output_usd=incumbent.price_out, cached_usd=incumbent.price_cached
        )
    to_case = partial(_case, rules=rules, prices=prices, heads=splits.clusters)
    denied = frozenset(row.id for row in log.rows if config.terms.ruling(row).action == "deny")
    certify = tuple(map(to_case, splits.certify))
    usd_per_hour = DEFAULT_USD_PER_HOUR if config.price_per_hour is None else config.price_per_hour
    return Problem(
        config=config,
        splits=splits,
        train=tuple(to_case(row) for row in splits.train if row.id not in denied),
        denied=denied,
        select=tuple(map(to_case, splits.select)),
        certify=certify,
        rules=rules,
        bar=Bar(margin=quality.margin, confidence=quality.confidence, absolute=absolute),
        incumbent_cost=incumbent_cost(certify, quality.confidence),
        usd_per_hour=usd_per_hour,
        digests=_digests(config, log, splits),
        about=_about(config, log, splits, len(denied), usd_per_hour),
    )


def _case(row: Row, *, rules: Rules, prices: Prices | None, heads: Mapping[str, str]) -> Case:
    return replace(case_of(row, rules.score, rules.passes, prices), cluster=heads[row.id])


def _slo(config: WorkloadConfig) -> Slo | None:
    given = config.slo
    if given.ttft_ms is None and given.tpot_ms is None and given.e2e_ms is None:
        return None
    return Slo(ttft_ms=given.ttft_ms, tpot_ms=given.tpot_ms, e2e_ms=given.e2e_ms, percentile=given.percentile)


def _digests(config: WorkloadConfig, log: Log, splits: Splits) -> dict[str, str]:
    """What decides the rows and the rules, by hash."""
    path = config.log
    rules = {
        "quality": [
            config.quality.scorer,
            config.quality.bar,
            config.quality.margin,
            config.quality.confidence,
        ],
        "labels": list(config.labels),
        "slice_by": config.slice_by,
        "slo": [config.slo.ttft_ms, config.slo.tpot_ms, config.slo.e2e_ms, config.slo.percentile],
        "prices": [config.incumbent.price_in, config.incumbent.price_cached, config.incumbent.price_out],
        "usd_per_hour": config.price_per_hour,
        "terms": [list(config.terms.answers), dict(config.terms.rules), config.terms.unknown],
    }
    return {
        "log": hash_file(path) if path.is_file() else content_hash([row.id for row in log.rows]),
        "splits": splits.digest,
        "certify": splits.certify_digest,
        "rules": content_hash(rules),
        "engine": content_hash({"tokenmill": __version__}),
    }


def _about(
    config: WorkloadConfig, log: Log, splits: Splits, num_denied: int, usd_per_hour: float
) -> dict[str, Any]:
    incumbent = config.incumbent
    slices = sorted({row.slice for row in log.rows})
    return {
        "log": str(config.log),
        "format": log.format,
        "num_rows": len(log.rows),
        "num_faults": len(log.faults),
        "faults": [str(each) for each in log.faults[:20]],
        "parts": {name: len(getattr(splits, name)) for name in ("train", "select", "certify")},
        "split_by": splits.by,
        "num_clusters": len(set(splits.clusters.values())),
        "num_denied": num_denied,
        "slices": slices[:200],
        "labels": len(config.labels),
        "incumbent": {
            "kind": incumbent.kind,
            "name": incumbent.name or "the incumbent",
            "price_in": incumbent.price_in,
            "price_cached": incumbent.price_cached,
            "price_out": incumbent.price_out,
            "price_date": incumbent.price_date,
            "price_source": incumbent.price_source,
            "has_references": sum(row.reference is not None for row in log.rows),
            "has_usage": sum(row.num_output_tokens is not None for row in log.rows),
        },
        "quality": {
            "scorer": config.quality.scorer,
            "bar": config.quality.bar,
            "margin": config.quality.margin,
            "confidence": config.quality.confidence,
        },
        "slo": {
            "ttft_ms": config.slo.ttft_ms,
            "tpot_ms": config.slo.tpot_ms,
            "e2e_ms": config.slo.e2e_ms,
            "percentile": config.slo.percentile,
        },
        "usd_per_hour": usd_per_hour,
        "usd_per_hour_source": config.price_per_hour_source
        or (_DEFAULT_SOURCE if config.price_per_hour is None else "the workload's file"),
        "terms": [each._asdict() for each in count_terms(log.rows, config.terms)],
    }
