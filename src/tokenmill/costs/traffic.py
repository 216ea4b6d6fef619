"""The requests of a workload, as far as cost goes: lengths, arrivals, shared prefixes.

Read are a trace of lengths (CSV with ContextTokens and GeneratedTokens, or input and output lengths; JSON
lines as Mooncake writes them) and a log of chats in the OpenAI shape, one JSON object a line. A chat log
without `usage` has no token counts: they are taken from its characters, and that is said.
"""

import csv
import datetime
import gzip
import io
import itertools
import json
import math
import statistics
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenmill.core import NotFoundError, UsageError

__all__ = ["CHARS_PER_TOKEN", "Call", "Lengths", "Traffic", "read_traffic"]

CHARS_PER_TOKEN: Final = 4.0
"""Characters that a token of English text has, about; used where a log has no counts."""

_MAX_BYTES: Final = 1 << 30
_WINDOW_S: Final = 60.0
_MAX_TOKENS: Final = 10_000_000
_INPUT_NAMES: Final = (
    "ContextTokens",
    "input_length",
    "num_prefill_tokens",
    "Request tokens",
    "input_tokens",
    "prompt_tokens",
)
_OUTPUT_NAMES: Final = (
    "GeneratedTokens",
    "output_length",
    "num_decode_tokens",
    "Response tokens",
    "output_tokens",
    "completion_tokens",
)
_TIME_NAMES: Final = ("TIMESTAMP", "timestamp", "arrived_at", "Timestamp", "created")


class Call(NamedTuple):
    """One request: tokens in and out, seconds since some start (None: not known), and its block hashes."""

    input: int
    output: int
    at: float | None
    blocks: tuple[int, ...]


class Lengths(NamedTuple):
    """Mean, median and 99th percentile (nearest rank) of token counts."""

    mean: float
    p50: int
    p99: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """All requests of a workload. `counted`: token counts were in the file and not guessed from text."""

    calls: tuple[Call, ...]
    counted: bool

    @cached_property
    def input(self) -> Lengths:
        """Tokens of the prompts."""
        return _lengths([call.input for call in self.calls])

    @cached_property
    def output(self) -> Lengths:
        """Tokens of the answers."""
        return _lengths([call.output for call in self.calls])

    @cached_property
    def times(self) -> tuple[float, ...]:
        """Arrivals in order; empty unless every request has one and they differ."""
        times = sorted(call.at for call in self.calls if call.at is not None)
        is_known = len(times) == len(self.calls) > 1 and times[-1] > times[0]
        return tuple(times) if is_known else ()

    @property
    def rate(self) -> float | None:
        """Requests a second over the whole time."""
        times = self.times
        return (len(times) - 1) / (times[-1] - times[0]) if times else None

    @cached_property
    def peak_rate(self) -> float | None:
        """Requests a second in the fullest minute; of less than a minute the mean."""
        times = self.times
        if not times or times[-1] - times[0] <= _WINDOW_S:
            return self.rate
        most, first = 0, 0
        for last, at in enumerate(times):
            while at - times[first] > _WINDOW_S:
                first += 1
            most = max(most, last - first + 1)
        return most / _WINDOW_S

    @cached_property
    def arrival_cv2(self) -> float | None:
        """The squared coefficient of variation of the gaps between arrivals; 1 for random ones."""
        if len(self.times) < 3:
            return None
        return _variation([after - before for before, after in itertools.pairwise(self.times)])

    @cached_property
    def output_cv2(self) -> float:
        """The same of the lengths of the answers."""
        return _variation([float(call.output) for call in self.calls])


def read_traffic(path: Path) -> Traffic:
    """Every request of a file. Raises UsageError with file and line; nothing is skipped."""
    text = _text(path)
    name = path.name.removesuffix(".gz")
    calls = list(_csv_calls(path, text) if name.endswith(".csv") else _json_calls(path, text))
    if not calls:
        raise UsageError(f"{path} has no requests", hint="give a log or a trace with at least one")
    return Traffic(calls=tuple(call for call, _ in calls), counted=all(counted for _, counted in calls))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise _too_large(path)
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(_MAX_BYTES + 1)
            if len(content) > _MAX_BYTES:
                raise _too_large(path)
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {path}", hint="give a log or a trace") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start})", hint="save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read ({error})", hint="give a log or a trace") from error


def _too_large(path: Path) -> UsageError:
    return UsageError(f"{path} is larger than 1 GB", hint="give a part of it")


def _csv_calls(path: Path, text: str) -> Iterator[tuple[Call, bool]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = reader.fieldnames or []
        if not set(header) & set(_INPUT_NAMES) or not set(header) & set(_OUTPUT_NAMES):
            raise UsageError(
                f"{path}:1: no columns with lengths",
                hint=f"use {_INPUT_NAMES[0]} and {_OUTPUT_NAMES[0]}, or input_length and output_length",
            )
        line = reader.line_num + 1
        for fields in reader:
            where, line = f"{path}:{reader.line_num}", reader.line_num + 1
            if None in fields or None in fields.values():
                raise UsageError(f"{where}: not as many fields as the header", hint="mend that line")
            yield _counted(where, fields), True
    except csv.Error as error:
        raise UsageError(f"{path}:{line}: no CSV ({error})", hint="mend that line") from error


def _json_calls(path: Path, text: str) -> Iterator[tuple[Call, bool]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: no JSON ({error})", hint="one JSON object a line") from error
        if not isinstance(record, dict):
            raise UsageError(f"{where}: no JSON object", hint="one JSON object a line")
        if set(record) & set(_INPUT_NAMES):
            yield _counted(where, record), True
        else:
            yield _chat(where, record)


def _counted(where: str, fields: Mapping[str, Any]) -> Call:
    """A request that has its counts."""
    return Call(
        input=_count(where, fields, _INPUT_NAMES),
        output=_count(where, fields, _OUTPUT_NAMES),
        at=_time(where, fields),
        blocks=_blocks(where, fields.get("hash_ids")),
    )


def _chat(where: str, record: Mapping[str, Any]) -> tuple[Call, bool]:
    """A chat: `messages` alone, as a fine-tuning line, or `request` and `response` as a log of calls."""
    request, response = _object(record, "request", "body"), _object(record, "response")
    response = _object(response, "body")
    messages = request.get("messages")
    if request is not record and messages is None and isinstance(request.get("prompt"), str):
        messages = [{"role": "user", "content": request["prompt"]}]
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: neither lengths nor messages", hint="use the OpenAI chat shape")
    usage, at = _object(response, "usage"), _time(where, {**response, **record})
    if usage is not response and set(usage) & set(_INPUT_NAMES):
        return _counted(where, usage)._replace(at=at), True
    choices = response.get("choices") if response is not record else None
    answers = [_object(choice, "message") for choice in choices or [] if isinstance(choice, dict)]
    if not answers and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages, answers = messages[:-1], messages[-1:]
    return Call(_guess(messages), _guess(answers), at, ()), False


def _object(value: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The object under the first of `names` that has one; `value` itself otherwise."""
    for name in names:
        if isinstance(value.get(name), dict):
            inner: Mapping[str, Any] = value[name]
            return inner
    return value


def _guess(messages: Sequence[Any]) -> int:
    chars = sum(len(_message_text(message)) for message in messages)
    return math.ceil(chars / CHARS_PER_TOKEN)


def _message_text(message: Any) -> str:
    content = message.get("content") if isinstance(message, dict) else None
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    text = content if isinstance(content, str) else json.dumps(content) if content else ""
    return text + (json.dumps(calls) if calls else "")


def _count(where: str, fields: Mapping[str, Any], names: Sequence[str]) -> int:
    name = next((name for name in names if name in fields), names[0])
    value = fields.get(name)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number <= _MAX_TOKENS or number != int(number):
        raise UsageError(
            f"{where}: {name} is {str(value)[:40]!r}, no number of tokens", hint="mend that line"
        )
    return int(number)


def _time(where: str, fields: Mapping[str, Any]) -> float | None:
    """Seconds. Mooncake counts milliseconds; other numbers are seconds; Azure writes dates."""
    value = next((fields[name] for name in _TIME_NAMES if name in fields), None)
    if value is None or value == "":
        return None
    parse: Callable[[Any], float] = float
    scale = 1e-3 if "hash_ids" in fields or "input_length" in fields else 1.0
    if isinstance(value, str) and not value.replace(".", "", 1).isdigit():
        parse, scale = _date_seconds, 1.0
    try:
        at = scale * parse(value)
    except (TypeError, ValueError, OverflowError):
        at = math.nan
    if not math.isfinite(at):
        raise UsageError(
            f"{where}: {str(value)[:40]!r} is no time", hint="use seconds, or 2023-11-16 18:15:46"
        )
    return at


def _date_seconds(text: str) -> float:
    """A date and time to the microsecond; Azure writes a digit more, which Python 3.11 cuts off."""
    moment = datetime.datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _blocks(where: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, int) for each in value):
        raise UsageError(f"{where}: hash_ids is no list of whole numbers", hint="mend that line")
    return tuple(value)


def _variation(values: Sequence[float]) -> float:
    mean = statistics.fmean(values)
    return statistics.fmean((value - mean) ** 2 for value in values) / mean**2 if mean else 0.0


def _lengths(counts: Sequence[int]) -> Lengths:
    ranked = sorted(counts)
    p50, p99 = (ranked[math.ceil(share * len(ranked)) - 1] for share in (0.5, 0.99))
    return Lengths(statistics.fmean(ranked), p50, p99)
