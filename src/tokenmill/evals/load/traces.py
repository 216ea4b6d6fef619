"""Recorded traffic: when calls came, how long they were, and which began alike.

Read are the Azure trace of 2023 (CSV: TIMESTAMP, ContextTokens, GeneratedTokens), Mooncake's JSON lines
(timestamp in ms, input_length, output_length, hash_ids), tables of lengths without times as Vidur has them
(num_prefill_tokens, num_decode_tokens), and a folder of ServeGen's statistics (`servegen`). Each may be
.gz. What a file is, is seen from its first line. No trace has the text of its prompts: `prompts` makes one.
"""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from tokenmill.core import UsageError
from tokenmill.evals.data import Place, read_lines

__all__ = ["MOONCAKE_BLOCK", "Call", "fit_context", "read_trace", "replayed", "scaled_lengths"]

MOONCAKE_BLOCK = 512
"""Tokens that one of Mooncake's hashes stands for."""

_MAX_TOKENS = 1 << 22
_HINT = "see docs/load.md for traces"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One recorded call: `at_s` seconds after the first one, None in a table of lengths.

    `blocks` names the prompt's blocks of `block_tokens` tokens in order, the last one perhaps cut; calls
    whose first blocks are the same begin with the same text.
    """

    at_s: float | None
    num_input_tokens: int
    num_output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = MOONCAKE_BLOCK


def read_trace(path: Path) -> tuple[Call, ...]:
    """The calls of a file, times counted from the first one.

    Raises NotFoundError or StorageError for a file that cannot be read, and UsageError, with file and line,
    for one that is no trace.
    """
    lines = list(read_lines(path))
    read_row = _row_reader(*lines[0])
    calls: list[Call] = []
    for place, line in lines if read_row is _mooncake_row else lines[1:]:
        if not line.strip():
            continue
        try:
            calls.append(_checked(read_row(line)))
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError, csv.Error) as error:
            place.refuse(_reason(error), _HINT)
        if len(calls) > 1 and _time(calls[-1]) < _time(calls[-2]):
            place.refuse("earlier than the line before", "sort it by time")
    if not calls:
        raise UsageError(f"{path} has no calls", hint=_HINT)
    origin_s = _time(calls[0])
    return tuple(call if call.at_s is None else replace(call, at_s=call.at_s - origin_s) for call in calls)


def replayed(calls: Sequence[Call], speed: float = 1.0) -> tuple[float, ...]:
    """The recorded times, `speed` times as fast. Raises UsageError for a table without times."""
    if not 0.0 < speed < math.inf:
        raise UsageError(f"speed is {speed}", hint="use a factor above 0")
    if any(call.at_s is None for call in calls):
        raise UsageError("this trace has lengths, but no times", hint="give --rate or --concurrency")
    return tuple(_time(call) / speed for call in calls)


def scaled_lengths(calls: Sequence[Call], factor: float) -> tuple[Call, ...]:
    """The same traffic with all lengths multiplied, blocks too, so that equal beginnings stay equal."""
    if not 0.0 < factor < math.inf:
        raise UsageError(f"the scale of lengths is {factor}", hint="use a factor above 0")
    return tuple(
        replace(
            call,
            num_input_tokens=max(1, round(call.num_input_tokens * factor)),
            num_output_tokens=max(1, round(call.num_output_tokens * factor)),
            block_tokens=max(1, round(call.block_tokens * factor)),
        )
        for call in calls
    )


def fit_context(calls: Sequence[Call], context_length: int) -> tuple[Call, ...]:
    """Those that fit into a context, prompt and answer together. Who calls this says how many did not."""
    return tuple(c for c in calls if c.num_input_tokens + c.num_output_tokens <= context_length)


def _row_reader(place: Place, first: str) -> Callable[[str], Call]:
    columns = [name.strip() for name in first.removeprefix("\ufeff").split(",")]
    if columns == ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
        return _azure_row
    if columns[:2] == ["num_prefill_tokens", "num_decode_tokens"]:
        return _lengths_row
    if first.lstrip().startswith("{"):
        return _mooncake_row
    place.refuse("this is no trace that is known", _HINT)


def _azure_row(line: str) -> Call:
    when, num_input, num_output = next(csv.reader([line]))
    at = datetime.fromisoformat(when)
    at_s = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    return Call(at_s=at_s, num_input_tokens=int(num_input), num_output_tokens=int(num_output))


def _lengths_row(line: str) -> Call:
    num_input, num_output = next(csv.reader([line]))[:2]
    return Call(
        at_s=None, num_input_tokens=round(float(num_input)), num_output_tokens=round(float(num_output))
    )


def _mooncake_row(line: str) -> Call:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    blocks = tuple(row["hash_ids"])
    if not all(isinstance(block, int) and block >= 0 for block in blocks):
        raise ValueError("hash_ids are no whole numbers from 0")
    num_input = int(row["input_length"])
    if len(blocks) != -(-num_input // MOONCAKE_BLOCK):
        raise ValueError(f"{len(blocks)} hash_ids for {num_input} tokens, in blocks of {MOONCAKE_BLOCK}")
    return Call(
        at_s=float(row["timestamp"]) / 1e3,
        num_input_tokens=num_input,
        num_output_tokens=int(row["output_length"]),
        blocks=blocks,
    )


def _checked(call: Call) -> Call:
    if call.at_s is not None and not math.isfinite(call.at_s):
        raise ValueError("the time is no finite number")
    if not 0 < call.num_input_tokens <= _MAX_TOKENS or not 0 <= call.num_output_tokens <= _MAX_TOKENS:
        raise ValueError(f"{call.num_input_tokens} tokens in and {call.num_output_tokens} out cannot be sent")
    return call if call.num_output_tokens else replace(call, num_output_tokens=1)


def _time(call: Call) -> float:
    return 0.0 if call.at_s is None else call.at_s


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
