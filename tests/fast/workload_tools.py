"""Logs of every format that hold the same calls, and rows to split."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenmill.workload import Row
from tokenmill.workload.row import row_id

SYSTEM = {"role": "system", "content": "Be brief."}


def asked(number: int) -> list[dict[str, Any]]:
    return [SYSTEM, {"role": "user", "content": f"What is {number} plus {number}?"}]


def request(number: int, **more: Any) -> dict[str, Any]:
    return {"model": "gpt-5-mini-2025-08-07", "messages": asked(number), "temperature": 0, **more}


def response(number: int, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": str(2 * number)}
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 1_790_000_000 + number,
        "model": "gpt-5-mini-2025-08-07",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 20,
            "completion_tokens": 3,
            "total_tokens": 23,
            "prompt_tokens_details": {"cached_tokens": 8},
        },
        **more,
    }


def write_lines(path: Path, values: Iterable[Mapping[str, Any] | str]) -> Path:
    lines = (each if isinstance(each, str) else json.dumps(each) for each in values)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def row(number: int, text: str = "", answer: str = "", **more: Any) -> Row:
    body = {"messages": [{"role": "user", "content": text or f"{number:05} {number**7 + 99991 * number}"}]}
    return Row(id=row_id(body, str(number)), number=number, request=body, answer=answer or "a", **more)
