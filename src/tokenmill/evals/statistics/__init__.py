"""What the figures of many items say together: intervals, paired differences, verdicts, plans."""

from tokenmill.evals.statistics.bootstrap import MeanBootstrap, mean_interval
from tokenmill.evals.statistics.interval import Interval
from tokenmill.evals.statistics.noise import NoiseFloor, noise_floor
from tokenmill.evals.statistics.paired import Difference, PairedCounts, mcnemar, paired
from tokenmill.evals.statistics.proportions import exact_interval, quantile_interval, wilson_interval
from tokenmill.evals.statistics.ratios import chance_corrected, cost_per_pass, ratio_interval, retention
from tokenmill.evals.statistics.verdict import (
    Verdict,
    holm,
    items_needed,
    provable_margin,
    verdict,
    verdicts,
)

__all__ = [
    "Difference",
    "Interval",
    "MeanBootstrap",
    "NoiseFloor",
    "PairedCounts",
    "Verdict",
    "chance_corrected",
    "cost_per_pass",
    "exact_interval",
    "holm",
    "items_needed",
    "mcnemar",
    "mean_interval",
    "noise_floor",
    "paired",
    "provable_margin",
    "quantile_interval",
    "ratio_interval",
    "retention",
    "verdict",
    "verdicts",
    "wilson_interval",
]
