"""Writing `workload.yaml`: every field with what it means and why it is so, for a person to mend."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tokenmill.core import StorageError, UsageError
from tokenmill.workload.config import WorkloadConfig
from tokenmill.workload.inference import Inference
from tokenmill.workload.row import Fault
from tokenmill.workload.terms import count_terms

__all__ = ["workload_text", "write_rejected", "write_workload"]

_LABELS_A_LINE: Final = 100


def write_workload(inference: Inference, path: Path) -> None:
    """Write the file. Raises UsageError if there is one already, StorageError."""
    text = workload_text(inference, path.parent)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        hint = "give another name with --out, or move it away"
        raise UsageError(f"{path} is there already", hint=hint) from None
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror})", hint="check the folder") from None


def workload_text(inference: Inference, folder: Path) -> str:
    """The file as text; the log is named as seen from `folder`."""
    return "\n".join(_lines(inference, folder)) + "\n"


def _lines(inference: Inference, folder: Path) -> Iterator[str]:
    config, log, reasons = inference.config, inference.log, inference.reasons
    yield f"# {len(log.rows)} calls, read as {log.format}. Made by `tokenmill init`: mend what it got wrong."
    if log.faults:
        yield f"# {len(log.faults)} lines are no call; `tokenmill workload check` lists them."
    yield f"log: {_text(_relative(config.log, folder))}"
    if config.columns:
        yield "columns:                        # which column has what"
        yield from (f"  {what}: {_text(name)}" for what, name in config.columns.items())
    yield ""
    yield f"# Verdicts are given for each slice, too. {_sentence(reasons['slice_by'])}"
    yield "# log: what the log says; answer; json:FIELD, a field of the answer; none."
    yield f"slice_by: {_text(config.slice_by)}"
    yield ""
    yield from _incumbent_lines(config, reasons["incumbent"])
    yield ""
    yield from _quality_lines(config, reasons["scorer"])
    if config.labels:
        yield ""
        yield "# The closed set of answers."
        yield from _label_lines(config.labels)
    yield ""
    yield from _slo_lines(config)
    yield ""
    yield from _terms_lines(inference)
    yield ""
    yield from _split_lines(config)


def _incumbent_lines(config: WorkloadConfig, reason: str) -> Iterator[str]:
    incumbent = config.incumbent
    yield f"# Who answers today. {_sentence(reason)}"
    yield "incumbent:"
    yield "  kind: recorded                # its answers are in the log; endpoint (and url:), model"
    yield f"  name: {_text(incumbent.name)}"
    if incumbent.price_in is None or incumbent.price_out is None:
        yield "  # What it costs, USD for 1,000,000 tokens: without a price nothing can be said to be saved."
        yield "  # price_in: 0.25"
        yield "  # price_out: 2.0"
        yield "  # price_date: 2026-08-05"
        yield "  # price_source: the provider's price list"
        return
    yield f"  price_in: {incumbent.price_in:<19g} # USD for 1,000,000 tokens"
    if incumbent.price_cached is not None:
        yield f"  price_cached: {incumbent.price_cached:g}"
    yield f"  price_out: {incumbent.price_out:g}"
    yield f"  price_date: {_text(incumbent.price_date)}"
    yield f"  price_source: {_text(incumbent.price_source)}"


def _quality_lines(config: WorkloadConfig, reason: str) -> Iterator[str]:
    quality = config.quality
    yield f"# What must hold. {_sentence(reason)}"
    yield "quality:"
    yield f"  scorer: {quality.scorer:21}  # exact, json, label, contains, rouge, sql"
    yield "  bar: incumbent                # not worse than today's answers; or a mean score such as 0.9"
    yield f"  margin: {quality.margin:<21g} # what a cheaper one may lose"
    yield f"  confidence: {quality.confidence:g}"


def _label_lines(labels: Sequence[str]) -> Iterator[str]:
    yield "labels:"
    yield from (f"  - {_text(each)}" for each in labels)


def _slo_lines(config: WorkloadConfig) -> Iterator[str]:
    yield "# How quick it must be, in milliseconds at a percentile. Nobody can see that in a log."
    yield "slo:"
    yield f"  percentile: {config.slo.percentile:g}"
    yield "  # ttft_ms: 300                # to the first token"
    yield "  # tpot_ms: 50                 # between tokens"
    yield "  # e2e_ms: 2000                # to the end"
    yield ""
    yield "# What an hour of the machine costs in USD, and who says so (`tokenmill prices --hardware`)."
    yield "# price_per_hour: 0.0884"
    yield "# price_per_hour_source: a cloud's price list, 2026-11-01"
    yield ""
    yield f"budget_s: {config.budget_s:<21g} # seconds that the search may take"


def _terms_lines(inference: Inference) -> Iterator[str]:
    yield "# May these answers train a model? allow, warn or deny; denied rows train nothing. Some licences"
    yield "# are known, but not what you agreed to with a provider. Found in the log:"
    for each in count_terms(inference.log.rows, inference.config.terms):
        term = _text(each.term) if each.term else "that name no terms"
        yield f"#   {each.num_rows} rows {term}: {each.action}"
    yield "terms:"
    yield "  answers: []                   # terms of rows that name none, such as [own] or [Apache-2.0]"
    yield '  rules: {}                     # such as {"Apache-2.0": allow, "origin:gpt-*": deny}'
    yield "  unknown: warn                 # what holds where no rule fits"


def _split_lines(config: WorkloadConfig) -> Iterator[str]:
    split = config.split
    yield "# Rows that train, rows that choose, and rows that prove the one that was chosen."
    yield "split:"
    yield f"  train: {split.train:g}"
    yield f"  select: {split.select:g}"
    yield f"  certify: {split.certify:g}"
    yield f"  by: {split.by:25}  # time (the newest certify), cluster (chance), auto"
    yield f"  seed: {split.seed}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _text(value: str) -> str:
    """A text as YAML reads it: a JSON string is one."""
    return json.dumps(value, ensure_ascii=True)


def _relative(path: Path, folder: Path) -> str:
    try:
        return os.path.relpath(path.resolve(), folder.resolve())
    except ValueError:
        return str(path.resolve())


def write_rejected(path: Path, faults: Sequence[Fault]) -> None:
    """Write the lines that are no row, each with its number and the reason. Raises StorageError."""
    lines = (
        json.dumps({"file": each.file, "line": each.number, "reason": each.reason, "text": each.line})
        for each in faults
    )
    try:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror})", hint="check the folder") from None
