"""The rows of a workload as its file wants them: its log, with its slices."""

import dataclasses
import json

from tokenmill.core import UsageError
from tokenmill.workload.config import WorkloadConfig
from tokenmill.workload.log import read_log
from tokenmill.workload.row import Log, Row
from tokenmill.workload.splits import Splits, split

__all__ = ["json_field", "read_rows", "split_rows"]


def read_rows(config: WorkloadConfig) -> Log:
    """The log of a workload, its rows in slices. Errors as of `read_log`; UsageError if no answer has the
    field that slices are made by.
    """
    log = read_log(config.log, columns=config.columns)
    if config.slice_by == "log":
        return log
    rows = tuple(dataclasses.replace(row, slice=_slice(row, config.slice_by)) for row in log.rows)
    if config.slice_by.startswith("json:") and not any(row.slice for row in rows):
        raise UsageError(
            f"{config.log}: no answer is a JSON object with the field {config.slice_by[5:]!r}",
            hint="mend slice_by in the workload's file",
        )
    return dataclasses.replace(log, rows=rows)


def split_rows(config: WorkloadConfig, log: Log) -> Splits:
    """The rows split as the workload's file says. Errors as of `split`."""
    wanted = config.split
    return split(log.rows, wanted.seed, wanted.shares, by=wanted.by, near=wanted.near)


def _slice(row: Row, by: str) -> str:
    if by == "none":
        return ""
    return row.target.strip() if by == "answer" else json_field(row.target, by.removeprefix("json:"))


def json_field(text: str, name: str) -> str:
    """A short plain value of a JSON object, "" if the text has none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    inner = value.get(name) if isinstance(value, dict) else None
    return str(inner)[:80] if isinstance(inner, str | int) else ""
