"""The process in which a chat template runs: Jinja2, with nothing within reach and a budget for each answer.

A template is a program from a stranger, written for Jinja2, so Jinja2 renders it: the immutable sandbox, set
up as transformers does. The sandbox is the first wall. The second is this process, which a template that
gets through finds empty: no environment variables, no descriptor to be had (so no file, no socket, no
import), an end at any event that Python would report to an auditor, and limits of memory and of processor
time that the kernel keeps. What is not limited is waiting, so the other side must not wait for ever.

As a script this file reads requests from standard input until that closes, one JSON object a line, and
answers each with a line. It imports nothing of tokenmill, so that it starts quickly.
"""

import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import ext, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["TemplateEnvironment", "render", "serve"]

_MAX_OUTPUT_CHARS: Final = 16 << 20
_MAX_REASON_CHARS: Final = 300
_HARMLESS_EVENTS: Final = frozenset(
    {"builtins.id", "compile", "exec", "object.__getattr__", "resource.setrlimit"}
)
"""What Python reports of Jinja2 that compiles and runs a template, and of the loop below."""

_WARM_UP: Final = "{{ messages | tojson(indent=1) }}{{ strftime_now('%H') }}{{ 'a\\n' | pprint | wordwrap }}"
"""Uses what Python loads at its first use, which is too late once no file can be opened."""


class _Refusal(Exception):
    """The template called `raise_exception`: it does not take these messages."""


class _NoText(str):
    """Content that is not there. It is `none`; a template that takes text for granted finds it empty."""

    __slots__ = ()


class _NoTools(list[Any]):
    """Tools that are not there: `none`, and a list without elements."""

    __slots__ = ()


class _Arguments(dict[str, Any]):
    """Arguments of a tool call: a mapping, and JSON where a template prints or joins them as text."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


class _Generation(ext.Extension):
    """`{% generation %}` marks the model's own words for training; in a prompt it is its content."""

    tags = {"generation"}  # noqa: RUF012 - as the library declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja2 as transformers configures it. `mark` is a character that JSON must leave as it is."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
        self.mark = ""
        self.filters["tojson"] = self._to_json
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now
        self.tests["none"] = _is_none

    def handle_exception(self, source: str | None = None) -> NoReturn:
        """Leave the traceback as it is: making it pretty would run code."""
        raise

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON without HTML escapes, other scripts readable."""
        value = None if isinstance(value, _NoTools) else value
        text = json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return text.replace(json.dumps(self.mark)[1:-1], self.mark) if ensure_ascii and self.mark else text


def render(environment: TemplateEnvironment, source: str, context: Mapping[str, Any]) -> dict[str, str]:
    """Render `source`; the answer is `text`, or the reason why not as `refused`, `exhausted` or `broken`."""
    try:
        text = _compiled(environment, source).render(_dressed(context))
    except _Refusal as error:
        return {"refused": _first_line(str(error))}
    except (MemoryError, RecursionError, OverflowError) as error:
        return {"exhausted": _first_line(f"{type(error).__name__}: {error}")}
    except jinja2.TemplateSyntaxError as error:
        return {"broken": _first_line(f"line {error.lineno}: {error.message}")}
    except Exception as error:
        where = _template_line(environment, source, error.__traceback__)
        return {"broken": _first_line(f"{where}{type(error).__name__}: {error}")}
    if len(text) > _MAX_OUTPUT_CHARS:
        return {"exhausted": f"its output is longer than {_MAX_OUTPUT_CHARS} characters"}
    return {"text": text}


def serve() -> None:
    """Answer requests: `source`, `mark`, the budget as `seconds` and `memory_bytes`; and the context."""
    environment = TemplateEnvironment()
    render(environment, _WARM_UP, {"messages": [], "tools": None})
    size_file = os.open("/proc/self/statm", os.O_RDONLY)
    memory_limits = resource.getrlimit(resource.RLIMIT_AS)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
        resource.setrlimit(kind, (0, 0))
    sys.addaudithook(_end_at_event)
    for line in sys.stdin.buffer:
        request, context = json.loads(line)
        environment.mark = request["mark"]
        now = int(os.pread(size_file, 99, 0).split()[0]) * resource.getpagesize()
        lower = _lower(now + request["memory_bytes"], memory_limits[0])
        resource.setrlimit(resource.RLIMIT_AS, (lower, memory_limits[1]))
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # its signal ends the process
        answer = render(environment, request["source"], context)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, memory_limits)
        _write(answer)


def _lower(budget: int, limit: int) -> int:
    """The budget, or a limit that this process was given (`ulimit -v`) and that it may not pass."""
    return budget if limit == resource.RLIM_INFINITY else min(budget, limit)


@functools.lru_cache(maxsize=1)
def _compiled(environment: TemplateEnvironment, source: str) -> jinja2.Template:
    return environment.from_string(source)


def _dressed(context: Mapping[str, Any]) -> dict[str, Any]:
    """The context with values in it that suit templates of either habit."""
    messages = [
        {**each, "content": _NoText() if each["content"] is None else each["content"]}
        for each in context["messages"]
    ]
    for call in (call for each in messages for call in each.get("tool_calls", ())):
        call["function"]["arguments"] = _Arguments(call["function"]["arguments"])
    tools = _NoTools() if context["tools"] is None else context["tools"]
    return {**context, "messages": messages, "tools": tools}


def _is_none(value: object) -> bool:
    return value is None or isinstance(value, _NoText | _NoTools)


def _refuse(message: object = "") -> NoReturn:
    raise _Refusal(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _template_line(environment: TemplateEnvironment, source: str, traceback: TracebackType | None) -> str:
    """`line 7: ` if the error came while line 7 of the template ran."""
    line = 0
    while traceback is not None:
        if "debug_info" in traceback.tb_frame.f_globals:
            line = _compiled(environment, source).get_corresponding_lineno(traceback.tb_lineno)
        traceback = traceback.tb_next
    return f"line {line}: " if line else ""


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:_MAX_REASON_CHARS]


def _end_at_event(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook. It does not return to the template, which could carry on."""
    is_quote = event == "open" and arguments[0] == "<template>"  # by Python, for the text of a SyntaxError
    if event not in _HARMLESS_EVENTS and not is_quote:
        _write({"escaped": f"it reached for {event}, which no template may"})
        os._exit(1)


def _write(answer: Mapping[str, str]) -> None:
    sys.stdout.buffer.write(json.dumps(answer, ensure_ascii=False).encode(errors="replace") + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
