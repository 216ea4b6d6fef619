"""Rendering of a chat template, in this process or in a child whose memory is limited.

A template is a program from a stranger. minijinja gives it no way to Python objects, files or imports,
and its fuel bounds the steps it can take; but a few doublings of a string need hardly any fuel, so memory
has no bound in-process. This file is therefore also a script: started as a child it limits its own address
space, then answers requests from standard input until that closes. It imports nothing of tokenmill, so
that the child starts quickly.

A request and an answer are each four bytes of length (little-endian) and that much JSON.
"""

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

import minijinja

__all__ = ["FUEL", "MAX_OUTPUT_CHARS", "read_packet", "render", "serve", "write_packet"]

FUEL: Final = 500_000
"""Steps of one rendering. A ChatML template takes about 27 a message, so 18,000 messages fit."""

MAX_OUTPUT_CHARS: Final = 16 << 20


class _Refusal(Exception):
    """The template called `raise_exception`: it does not take these messages."""


def render(source: str, context: Mapping[str, Any]) -> dict[str, str]:
    """Render `source`; the answer is `text`, or the reason why not as `refused`, `exhausted` or `broken`."""
    environment = minijinja.Environment(
        globals={"raise_exception": _refuse},
        filters={"tojson": _to_json},
        fuel=FUEL,
        debug=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        text = environment.render_str(source, "chat_template", **context)
    except _Refusal as error:
        return {"refused": str(error)[:500]}
    except (minijinja.TemplateError, ValueError, TypeError, RecursionError) as error:
        is_fuel = getattr(error, "kind", "") == "OutOfFuel"
        first_line = str(error).partition("\n")[0]
        return {"exhausted" if is_fuel else "broken": first_line[:500]}
    if len(text) > MAX_OUTPUT_CHARS:
        return {"exhausted": f"its output is longer than {MAX_OUTPUT_CHARS} characters"}
    return {"text": text}


def write_packet(stream: IO[bytes], value: Mapping[str, Any]) -> None:
    """Send one JSON value."""
    data = json.dumps(value).encode()
    stream.write(len(data).to_bytes(4, "little") + data)
    stream.flush()


def read_packet(stream: IO[bytes]) -> dict[str, Any] | None:
    """Receive one JSON value; None at the end of the stream."""
    head = stream.read(4)
    data = stream.read(int.from_bytes(head, "little")) if len(head) == 4 else b""
    return dict(json.loads(data)) if data else None


def serve(memory_bytes: int) -> None:
    """Answer requests on standard input, using at most `memory_bytes` more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while request := read_packet(sys.stdin.buffer):
        write_packet(sys.stdout.buffer, render(request["source"], request["context"]))


def _refuse(message: object = "") -> None:
    raise _Refusal(str(message))


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as chat templates expect it: without HTML escapes, other scripts readable."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
