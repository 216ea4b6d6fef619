"""`tokenmill workload check`: what a workload is and what it can prove, before anything is spent."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.arguments import Parser, Subparsers, add_command, add_shared_flags
from tokenmill.cli.init import add_column_flag, columns_of, show_faults
from tokenmill.cli.output import Output, format_count
from tokenmill.core import UsageError

if TYPE_CHECKING:
    from tokenmill.workload import Log, Quality, Summary, WorkloadConfig

__all__ = ["DISAGREEMENTS", "add_parser"]

DISAGREEMENTS: Final = (0.05, 0.10, 0.20)
"""Shares of rows on which exactly one of two systems may be right; nobody knows it before."""

_SHOWN: Final = 20
_DESCRIPTION = "Workloads: logs of calls with their answers."
_CHECK = """\
Read a workload and say what it is: slices, lengths, duplicates, balance, terms, what the incumbent costs
today, and how small a loss the rows that certify can prove. Nothing is run and nothing is written.

WORKLOAD is a workload.yaml, or a log, of which everything is guessed.

  tokenmill workload check workload.yaml
  tokenmill workload check calls.jsonl --rejected calls.rejected.jsonl
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `workload` and its actions."""
    workload = add_command(
        subparsers, "workload", _no_action, summary="what a log of calls can prove", description=_DESCRIPTION
    )
    actions = workload.add_subparsers(
        title="actions", metavar="ACTION", dest="action", parser_class=Parser, help="what to do"
    )
    check = add_command(actions, "check", _check, summary="look at a workload", description=_CHECK)
    check.add_argument("workload", type=Path, metavar="WORKLOAD", help="a workload.yaml, or a log")
    check.add_argument(
        "--rejected", type=Path, metavar="FILE", help="write the lines that are no call to this file"
    )
    add_column_flag(check)
    add_shared_flags(check)


def _no_action(args: argparse.Namespace, out: Output) -> int:
    raise UsageError("no action", hint="see `tokenmill workload --help`")


def _check(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.workload import split_rows, summarise, write_rejected

    with out.busy(f"reading {args.workload}"):
        config, log = _workload(args)
        summary = summarise(config, log, split_rows(config, log))
    if args.rejected is not None:
        write_rejected(args.rejected, log.faults)
    proofs = _proofs(config.quality, summary)
    _show(config, summary, proofs, out)
    show_faults([str(each) for each in log.faults], out)
    named = {each: [part._asdict() for part in getattr(summary, each)] for each in ("slices", "terms")}
    parts = {each: getattr(summary, each)._asdict() for each in ("input", "output", "duplicates", "balance")}
    faults = [{"file": each.file, "line": each.number, "reason": each.reason} for each in log.faults]
    out.document({**asdict(summary), **named, **parts, "proofs": proofs, "faults": faults})
    return 0


def _workload(args: argparse.Namespace) -> "tuple[WorkloadConfig, Log]":
    """The configuration and the rows, in the file's slices or guessed ones."""
    from tokenmill.workload import infer_workload, read_rows, read_workload

    columns = columns_of(args)
    if args.workload.suffix in (".yaml", ".yml"):
        if columns:
            raise UsageError("--column is for a log", hint="name the columns in the workload's file")
        config = read_workload(args.workload)
    else:
        config = infer_workload(args.workload, columns=columns)
    return config, read_rows(config)


def _proofs(quality: "Quality", summary: "Summary") -> list[dict[str, Any]]:
    """The smallest loss that the certifying rows of all and of each slice can rule out, by disagreement; None
    where they prove nothing.
    """
    wholes = [("all", summary.num_certify_clusters)]
    slices = [(each.name, each.num_certify_clusters) for each in summary.slices]
    return [
        {
            "slice": name,
            "num_items": num,
            "margins": {f"{each:g}": _margin(num, each, quality.confidence) for each in DISAGREEMENTS},
        }
        for name, num in wholes + (slices if len(slices) > 1 else [])
    ]


def _margin(num_items: int, disagreement: float, confidence: float) -> float | None:
    from tokenmill.evals.statistics import provable_margin

    try:
        return provable_margin(num_items, disagreement=disagreement, confidence=confidence)
    except UsageError:
        return None


def _show(
    config: "WorkloadConfig", summary: "Summary", proofs: Sequence[dict[str, Any]], out: Output
) -> None:
    days = "" if summary.days is None else f" of {summary.days:.1f} days"
    out.text(f"{summary.num_rows} calls{days}, read as {summary.format}; {summary.num_faults} lines are none")
    out.text(
        f"split by {summary.split_by}: {summary.num_train} train, {summary.num_select} select, "
        f"{summary.num_certify} certify ({summary.split_digest[:12]})"
    )
    _show_lengths(summary, out)
    _show_duplicates(config, summary, out)
    for each in summary.terms:
        of = f"under {each.term}" if each.term else "that name no terms"
        out.text(f"terms: {each.num_rows} answers {of}: {_ACTIONS[each.action]}")
    _show_cost(summary, out)
    _show_proofs(config.quality, summary, proofs, out)


_ACTIONS: Final = {
    "allow": "may train a model",
    "warn": "whether they may train a model, nobody said",
    "deny": "must not train a model",
}


def _show_lengths(summary: "Summary", out: Output) -> None:
    rows = []
    for name, each in (("input", summary.input), ("output", summary.output)):
        source = "counted by the API"
        if each.num_estimated:
            source = f"estimated from the texts of {each.num_estimated} rows"
        rows.append([name, *map(str, (each.p50, each.p95, each.most)), format_count(each.total), source])
    out.text("")
    out.table(("tokens", "median", "p95", "most", "all", ""), rows)


def _show_duplicates(config: "WorkloadConfig", summary: "Summary", out: Output) -> None:
    found, balance = summary.duplicates, summary.balance
    out.text("")
    out.text(
        f"duplicates: {found.num_same} calls ask what another asked, {found.num_contradictions} of them with "
        f"another answer; {found.num_near} are nearly like another, and stay in one part with it"
    )
    said = f"answers: {balance.num_answers} different"
    if balance.share >= 0.01:
        said += f"; always {balance.most_frequent[:40]!r} would be right in {balance.share:.1%}"
    if config.labels:
        said += f"; the rarest label has {balance.rarest} calls"
    out.text(said)
    if balance.num_unknown:
        out.warn(f"{balance.num_unknown} answers are none of the labels of the workload's file")


def _show_cost(summary: "Summary", out: Output) -> None:
    cost = summary.cost
    if cost is None:
        out.text("cost today: not known; give incumbent.price_in and price_out in the workload's file")
        return
    month = "" if cost.per_month_usd is None else f", ${cost.per_month_usd:,.2f} in 30 days at this rate"
    estimated = f", tokens of {cost.num_estimated} rows estimated" if cost.num_estimated else ""
    out.text(
        f"cost today: ${cost.per_1000_calls_usd:.4f} for 1,000 calls (${cost.total_usd:,.2f} for this log, "
        f"{cost.input_usd / cost.total_usd if cost.total_usd else 0:.0%} of it input){month}; "
        f"price of {cost.price_date}{estimated}"
    )
    if cost.price_source:
        out.text(f"  {cost.price_source}")


def _show_proofs(
    quality: "Quality", summary: "Summary", proofs: Sequence[dict[str, Any]], out: Output
) -> None:
    out.text("")
    out.text(
        "The smallest loss that can be ruled out, if a candidate is as good as the incumbent and the two"
    )
    out.text("disagree on so many of the answers:")
    header = ("slice", "calls", "certify", "distinct", *(f"{each:.0%}" for each in DISAGREEMENTS))
    counts = {each.name: (each.num_rows, each.num_certify) for each in summary.slices}
    totals = (summary.num_rows, summary.num_certify)
    rows = []
    for at, each in enumerate(proofs[: _SHOWN + 1]):
        sizes = totals if at == 0 else counts[each["slice"]]
        margins = ["none" if margin is None else f"{margin:.1%}" for margin in each["margins"].values()]
        rows.append([each["slice"] or "-", *map(str, sizes), str(each["num_items"]), *margins])
    out.table(header, rows)
    if len(proofs) > _SHOWN + 1:
        out.text(f"and {len(proofs) - _SHOWN - 1} more slices; --json lists all")
    _show_reach(quality, summary, out)


def _show_reach(quality: "Quality", summary: "Summary", out: Output) -> None:
    """Whether what the file asks for is in reach."""
    from tokenmill.evals.statistics import items_needed, wilson_interval

    num = summary.num_certify_clusters
    if not isinstance(quality.bar, str):
        known = wilson_interval(round(quality.bar * num), num, confidence=quality.confidence)
        out.text(
            f"The bar is a score of {quality.bar:g}: one of about that is known to lie between "
            f"{known.low:.3f} and {known.high:.3f}"
        )
        return
    needed = [
        items_needed(quality.margin, disagreement=each, confidence=quality.confidence)
        for each in DISAGREEMENTS
    ]
    wanted = ", ".join(f"{count} at {each:.0%}" for count, each in zip(needed, DISAGREEMENTS, strict=True))
    out.text(f"A margin of {quality.margin:g} needs certifying calls: {wanted}; there are {num}")
    if num < needed[0]:
        out.warn(
            f"the log is too small to prove a margin of {quality.margin:g}: every verdict may be undecided"
        )
