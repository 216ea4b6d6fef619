"""Function calls in the text of an answer, read as it comes: text stays text, calls become `ToolPiece`.

A call is a JSON object with a name and arguments, after the model's own mark (`<tool_call>`, `[TOOL_CALLS]`,
`<|python_tag|>`), or at the beginning of a line if its name is that of a tool: control tokens are not part of
the text, so a mark may be missing. Each character is looked at once. Arguments are passed on as they come and
are never judged; what turns out to be no call is text, as the model wrote it. Nothing here raises.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection
from typing import Final, Literal, TypeAlias

from tokenmill.wire import TextPiece, ToolPiece

__all__ = ["ToolReader", "new_call_id"]

_BARE_AT_START: Final = re.compile(r"[ \t\r\n]*(?=[{\[])")
_BARE: Final = re.compile(r"\n[ \t\r]*(?=[{\[])")
_SPACE: Final = " \t\r\n"
_SEPARATORS: Final = _SPACE + ",;"
_ARGUMENT_KEYS: Final = ("arguments", "parameters")
_CALL_KEYS: Final = ("name", "type", "id", *_ARGUMENT_KEYS)
"""What an object without a mark may have: others are an answer in JSON."""

_CHUNK: Final = 4096
_MAX_HELD: Final = 1 << 16
_MAX_SPACE: Final = 256
_MAX_CALLS: Final = 128

_Place: TypeAlias = Literal["key", "in key", "colon", "value", "in value", "comma"]
_Step: TypeAlias = Literal["", "argument", "end", "broken"]


def new_call_id() -> str:
    """An id that no other call has: `call_` and 96 random bits."""
    return f"call_{secrets.token_hex(12)}"


class _Object:
    """A call's object, character by character after its opening brace; any name will do without `names`."""

    def __init__(self, names: Collection[str] | None) -> None:
        self._names = names
        self._place: _Place = "key"
        self._key = ""
        self._word: list[str] = []
        self._depth = 0
        self._in_string = self._escaped = False
        self._fields: dict[str, str] = {}
        self.name = ""
        self.is_streaming = False

    def step(self, char: str) -> _Step:
        """Take a character: is it one of the arguments that are passed on, the end, or wrong?"""
        place = self._place
        if place == "in value":
            return self._in_value(char)
        if place == "in key":
            return self._in_key(char)
        if char in _SPACE:
            return ""
        if place == "value":
            return self._begin_value(char)
        if place == "key" and char == '"':
            self._place, self._word, self._in_string = "in key", [char], True
        elif place == "colon" and char == ":":
            self._place = "value"
        elif place == "comma" and char == ",":
            self._place = "key"
        elif char == "}" and (place == "comma" or (place == "key" and not self._fields)):
            return "end"
        else:
            return "broken"
        return ""

    def arguments(self) -> str | None:
        """The arguments of an object that ended before any were passed on; None if it has none."""
        for key in _ARGUMENT_KEYS:
            if (value := self._fields.get(key)) is not None:
                return (_text(value) or value) if value.startswith('"') else value
        return None

    def _in_key(self, char: str) -> _Step:
        self._word.append(char)
        self._scan(char)
        if not self._in_string:
            key = _text("".join(self._word))
            if key is None or (self._names is not None and key not in _CALL_KEYS):
                return "broken"
            self._key, self._place = key, "colon"
        return ""

    def _begin_value(self, char: str) -> _Step:
        if char in ",:}]":
            return "broken"
        self._place, self._word, self._depth = "in value", [], 0
        self.is_streaming = char == "{" and bool(self.name) and self._key in _ARGUMENT_KEYS
        return self._in_value(char)

    def _in_value(self, char: str) -> _Step:
        is_scalar = not self._in_string and self._depth == 0
        if is_scalar and self._word and char in ",}" + _SPACE:
            return self._end_value() or self.step(char)
        self._scan(char)
        if not self.is_streaming:
            self._word.append(char)
        is_done = not self._in_string and self._depth == 0 and char in '"}]'
        if self.is_streaming:
            if is_done:
                self._fields[self._key], self._place = "", "comma"
            return "argument"
        return self._end_value() if is_done else ""

    def _end_value(self) -> _Step:
        value = "".join(self._word)
        self._fields[self._key], self._place, self._word = value, "comma", []
        if self._key == "name":
            self.name = _text(value) or ""
            if not self.name or (self._names is not None and self.name not in self._names):
                return "broken"
        return ""

    def _scan(self, char: str) -> None:
        """Keep count of strings and brackets."""
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = char == "\\"
            self._in_string = char != '"'
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1


def _text(value: str) -> str | None:
    """A JSON string's text, None for anything else."""
    try:
        text = json.loads(value, strict=False)
    except (ValueError, RecursionError):
        return None
    return text if isinstance(text, str) else None


class ToolReader:
    """Reads one completion: `feed` it text, then `end`. `marks` are what the model writes around a call.

    `names` are those of the tools. Unless `parallel`, what follows the first call is dropped.
    """

    def __init__(
        self,
        marks: tuple[str, str],
        names: Collection[str],
        *,
        index: int = 0,
        parallel: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._mark, self._end_mark = marks
        self._names = names
        self._index = index
        self._parallel = parallel
        self._new_id = new_id
        self._pending = ""
        self._read: Callable[[], bool] = self._in_text
        self._object = _Object(None)
        self._held: list[str] = []
        self._is_marked = self._is_list = self._is_after = False
        self._at_start = True
        self._has_header = False
        self._is_muted = False
        self._out: list[TextPiece | ToolPiece] = []
        self.num_calls = 0

    def feed(self, text: str) -> list[TextPiece | ToolPiece]:
        """What this text adds."""
        for start in range(0, len(text), _CHUNK):
            self._pending += text[start : start + _CHUNK]
            while self._pending and not self._is_muted and self._read():
                pass
        if self._is_muted:
            self._pending = ""
        return self._taken()

    def end(self) -> list[TextPiece | ToolPiece]:
        """What was held back: text, unless it was a call, of which as much as there is has been told."""
        marks = [mark for mark in (self._mark, self._end_mark) if mark.startswith(self._pending)]
        rest = "" if marks and self._is_after else self._pending
        held = "".join(self._held) + rest
        self._pending, self._held = "", []
        if not self._has_header and (held.strip(_SEPARATORS) or not self._is_after):
            self._say(held)
        return self._taken()

    def _taken(self) -> list[TextPiece | ToolPiece]:
        out, self._out = self._out, []
        return out

    def _say(self, text: str) -> None:
        if not text:
            return
        self._at_start = self._is_after = False
        last = self._out[-1] if self._out else None
        if isinstance(last, TextPiece):
            self._out[-1] = TextPiece(last.text + text, self._index)
        else:
            self._out.append(TextPiece(text, self._index))

    def _in_text(self) -> bool:
        """Say what is no call; hold back white space, which a call would make pointless, and half a mark."""
        text = self._pending
        start = self._start_of_call(text)
        if start >= 0:
            said = text[:start].rstrip(_SPACE)
            self._say(said)
            self._held, self._pending = [text[len(said) : start]], text[start:]
            self._is_marked = self._is_list = False
            self._read = self._between
            return True
        size = len(text[: len(text) - _overlap(text, self._mark)].rstrip(_SPACE))
        self._say(text[:size])
        self._pending = text[size:]
        return False

    def _start_of_call(self, text: str) -> int:
        bare = (_BARE_AT_START.match(text) if self._at_start else None) or _BARE.search(text)
        found = [bare.end()] if bare else []
        if self._mark and (at := text.find(self._mark)) >= 0:
            found.append(at)
        return min(found, default=-1)

    def _between(self) -> bool:
        """Before an object, or after one: marks, brackets, separators, the next object, or text."""
        text = self._pending
        for mark in filter(None, (self._mark, self._end_mark)):
            if text.startswith(mark):
                self._is_marked = mark == self._mark
                self._held = [] if self._is_after else [*self._held, mark]
                self._pending = text[len(mark) :]
                return True
            if mark.startswith(text):
                return False
        char = text[0]
        if char == "{":
            self._begin_object()
        elif char == "[" and not self._is_list:
            self._is_list = True
            self._keep(char)
        elif char == "]" and self._is_list and self._is_after:
            self._is_list, self._held, self._pending = False, [], text[1:]
        elif char in (_SEPARATORS if self._is_after else _SPACE) and len(self._held) < _MAX_SPACE:
            self._keep(char)
        else:
            self._give_up()
        return True

    def _keep(self, char: str) -> None:
        self._held.append(char)
        self._pending = self._pending[1:]

    def _begin_object(self) -> None:
        self._object = _Object(None if self._is_marked else self._names)
        self._has_header = False
        self._keep("{")
        self._read = self._in_object

    def _give_up(self) -> None:
        """What is held back is no call."""
        held = "".join(self._held)
        text = held.strip(_SPACE) if self._is_after and not held.strip(_SPACE) else held
        self._held, self._read = [], self._in_text
        self._say(text)
        self._at_start = False

    def _in_object(self) -> bool:
        text, arguments = self._pending, []
        for at, char in enumerate(text):
            step = self._object.step(char)
            if step == "argument":
                if not self._has_header:
                    self._begin_call()
                arguments.append(char)
                continue
            if not self._has_header:
                self._held.append(char)
            if step == "" and len(self._held) < _MAX_HELD:
                continue
            self._add("".join(arguments))
            self._pending = text[at + 1 :]
            self._finish_object(is_broken=step != "end")
            return True
        self._add("".join(arguments))
        self._pending = ""
        return False

    def _begin_call(self) -> None:
        self._has_header, self._held = True, []
        self._out.append(ToolPiece(self.num_calls, self._new_id(), self._object.name, "", self._index))

    def _add(self, arguments: str) -> None:
        if arguments:
            self._out.append(ToolPiece(self.num_calls, arguments=arguments, index=self._index))

    def _finish_object(self, *, is_broken: bool) -> None:
        """An object has ended, or is no JSON: a call if its name was told, or all of it is there."""
        given = self._object.arguments()
        if not self._has_header:
            if is_broken or not self._object.name or (given is None and not self._is_marked):
                self._give_up()
                return
            self._begin_call()
            self._add(given or "{}")
        self.num_calls += 1
        self._has_header, self._held, self._is_after = False, [], True
        self._is_muted = not self._parallel or self.num_calls >= _MAX_CALLS
        self._read = self._between


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text begin the mark."""
    return next(
        (size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0
    )
