"""Logs as lines of JSON that hold no content: what happened, to which request, how long, how much; no text.

A line has the fields of `FIELDS` and nothing else, so that a prompt, an answer, a secret or a client's own
words cannot slip in with an `extra`. Exceptions are written as their class and the places of the code that
they passed, without their message, for messages quote what they complain of; of loggers of other packages
only the first line of the constant part is kept. Everything outside printable ASCII is escaped.
"""

import json
import logging
import sys
import time
import traceback
from types import TracebackType
from typing import Any, Final, TextIO

from tokenmill.core import UsageError
from tokenmill.server.gateway import Settled
from tokenmill.store import Entry

__all__ = ["FIELDS", "LEVELS", "JsonFormatter", "log_http", "log_settled", "set_up_logs"]

LEVELS: Final = ("debug", "info", "warning", "error")
"""What `--log-level` may be."""

FIELDS: Final = frozenset(
    {
        "api",
        "attempt",
        "cost_nano_usd",
        "deployment",
        "finish",
        "key_id",
        "kind",
        "method",
        "model",
        "num_cached_tokens",
        "num_output_tokens",
        "num_prompt_tokens",
        "price_nano_usd",
        "reason",
        "request_id",
        "route",
        "state",
        "status",
        "tier",
        "total_ms",
        "ttft_ms",
    }
)
"""What a line may say beside its time, level, logger and event."""

_OURS: Final = "tokenmill"
_MAX_CHARS: Final = 300
_MAX_FRAMES: Final = 12
_CALLS: Final = logging.getLogger("tokenmill.server.calls")
_HTTP: Final = logging.getLogger("tokenmill.server.http")


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        milliseconds = int(record.msecs)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{stamp}.{milliseconds:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _event(record),
        }
        line.update({name: _plain(getattr(record, name)) for name in sorted(FIELDS) if hasattr(record, name)})
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            line["at"] = _places(record.exc_info[2])
        return json.dumps(line, ensure_ascii=True, separators=(",", ":")).replace("\x7f", "\\u007f")


def set_up_logs(level: str = "info", stream: TextIO | None = None) -> logging.Handler:
    """Send all logs of this process to `stream` (standard error) as JSON lines.

    It takes the place of what it set up before. Raises UsageError for a level that is none of `LEVELS`.
    """
    if level not in LEVELS:
        raise UsageError(f"the log level is {level[:40]!r}", hint=f"use one of {', '.join(LEVELS)}")
    root = logging.getLogger()
    for old in [each for each in root.handlers if isinstance(each.formatter, JsonFormatter)]:
        root.removeHandler(old)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its start and end are told by ours
    return handler


def log_settled(settled: Settled) -> None:
    """A call that has ended, a line for each attempt: who, what, how much, how long."""
    for entry in settled.entries:
        level = logging.WARNING if entry.finish in ("failed", "expired") else logging.INFO
        if _CALLS.isEnabledFor(level):
            _CALLS.log(level, "settled", extra=_call_fields(settled, entry))


def _call_fields(settled: Settled, entry: Entry) -> dict[str, object]:
    is_last = entry is settled.entries[-1]
    ttft_s = settled.ttft_s if is_last else None
    return {
        "request_id": entry.request_id,
        "attempt": entry.attempt,
        "kind": entry.kind,
        "key_id": entry.key_id,
        "api": settled.caller.api,
        "model": entry.model,
        "deployment": entry.deployment,
        "tier": entry.tier,
        "finish": entry.finish,
        "num_prompt_tokens": entry.num_prompt_tokens,
        "num_cached_tokens": entry.num_cached_tokens,
        "num_output_tokens": entry.num_output_tokens,
        "cost_nano_usd": entry.cost_nano_usd,
        "price_nano_usd": entry.price_nano_usd,
        "ttft_ms": None if ttft_s is None else round(ttft_s * 1e3, 3),
        "total_ms": round(settled.total_s * 1e3, 3) if is_last else None,
    }


def log_http(*, method: str, route: str, status: int, request_id: str, key_id: str, total_s: float) -> None:
    """An HTTP answer that is no settled call: what was refused, and at `debug` everything else."""
    level = logging.ERROR if status >= 500 else logging.INFO if status >= 400 else logging.DEBUG
    if not _HTTP.isEnabledFor(level):
        return
    fields = {
        "method": method,
        "route": route,
        "status": status,
        "request_id": request_id,
        "key_id": key_id,
        "total_ms": round(total_s * 1e3, 3),
    }
    _HTTP.log(level, "answered", extra=fields)


def _event(record: logging.LogRecord) -> str:
    """The message of our own loggers; of others the first line of what is constant in it."""
    if record.name == _OURS or record.name.startswith(f"{_OURS}."):
        text = record.getMessage()
    else:
        text = str(record.msg).partition("\n")[0]
    return text[:_MAX_CHARS]


def _plain(value: Any) -> object:
    """A number, a truth value, or text that is not long."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value)[:_MAX_CHARS]


def _places(trace: TracebackType | None) -> list[str]:
    """`file:line function` of the innermost calls, the innermost last."""
    frames = traceback.extract_tb(trace)[-_MAX_FRAMES:]
    return [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
