"""Forms with files (multipart/form-data, RFC 7578), read as they arrive, every part of them bounded.

    reader = FormReader(boundary_of(content_type))
    for event in reader.feed(data): ...          # PartBegin, then bytes, for each part
    reader.finish()

Nothing is held but the piece in which a boundary could begin. Parts within parts and other transfer encodings
are not form data, and refused.
"""

import re
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple, TypeAlias

from tokenmill.wire import FieldError

__all__ = ["FormEvent", "FormReader", "PartBegin", "boundary_of"]

_MAX_PARTS: Final = 16
_MAX_HEADER_BYTES: Final = 8 << 10
_MAX_PREAMBLE_BYTES: Final = 1 << 10
_PARAMETER: Final = re.compile(r';\s*([A-Za-z*]{1,32})=(?:"((?:[^"\\]|\\.)*)"|([^;"\s]*))')
_BOUNDARY: Final = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{1,70}")
_PLAIN: Final = ("binary", "8bit", "7bit")
_HINT: Final = "send multipart/form-data, as `curl -F` does"


class PartBegin(NamedTuple):
    """A part: the field's name, and the file's name if it is a file."""

    name: str
    filename: str | None


FormEvent: TypeAlias = PartBegin | bytes
"""The begin of a part, or some of its content."""


def boundary_of(content_type: str) -> bytes:
    """The boundary in a Content-Type. Raises FieldError for another kind of body."""
    kind, _, rest = content_type.partition(";")
    found = _parameters(f";{rest}").get("boundary", "")
    if kind.strip().lower() != "multipart/form-data" or not _BOUNDARY.fullmatch(found) or found[-1] == " ":
        raise FieldError("", "the body is no form with a file", hint=_HINT)
    return found.encode()


class FormReader:
    """Reads one form. Raises FieldError for what is none."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._buffer = bytearray(b"\r\n")
        self._state: Literal["preamble", "after", "headers", "body", "done"] = "preamble"
        self._num_parts = 0

    def feed(self, data: bytes) -> Iterator[FormEvent]:
        """What can be said of the form with these bytes more."""
        self._buffer += data
        while True:
            if self._state == "preamble":
                goes_on = self._skip_preamble()
            elif self._state == "after":
                goes_on = self._after_delimiter()
            elif self._state == "headers":
                begin = self._headers()
                goes_on = begin is not None
                if begin is not None:
                    yield begin
            elif self._state == "body":
                content, goes_on = self._body()
                if content:
                    yield content
            else:
                self._buffer.clear()  # what follows the end means nothing
                return
            if not goes_on:
                return

    def finish(self) -> None:
        """The body is over: raise FieldError if the form is not."""
        if self._state != "done":
            raise FieldError("", "the form ends in the middle", hint=_HINT)

    def _skip_preamble(self) -> bool:
        at = self._buffer.find(self._delimiter)
        if at < 0:
            if len(self._buffer) > _MAX_PREAMBLE_BYTES:
                raise FieldError("", "the form does not begin with its boundary", hint=_HINT)
            return False
        del self._buffer[: at + len(self._delimiter)]
        self._state = "after"
        return True

    def _after_delimiter(self) -> bool:
        if len(self._buffer) < 2:
            return False
        mark = bytes(self._buffer[:2])
        if mark not in (b"--", b"\r\n"):
            raise FieldError("", "a boundary of the form is followed by something else", hint=_HINT)
        self._state = "done" if mark == b"--" else "headers"
        if self._state == "headers":
            self._num_parts += 1
            if self._num_parts > _MAX_PARTS:
                raise FieldError("", f"the form has over {_MAX_PARTS} parts", hint="send fewer")
        del self._buffer[:2]
        return True

    def _headers(self) -> PartBegin | None:
        at = self._buffer.find(b"\r\n\r\n")
        if at > _MAX_HEADER_BYTES or (at < 0 and len(self._buffer) > _MAX_HEADER_BYTES + 4):
            raise FieldError("", "the headers of a part of the form are too long", hint=_HINT)
        if at < 0:
            return None
        headers = bytes(self._buffer[:at]).decode("utf-8", "replace")
        del self._buffer[: at + 4]
        self._state = "body"
        return _begin_of(headers)

    def _body(self) -> tuple[bytes, bool]:
        at = self._buffer.find(self._delimiter)
        if at < 0:
            keep = len(self._delimiter) - 1
            content = bytes(self._buffer[:-keep]) if len(self._buffer) > keep else b""
            del self._buffer[: len(content)]
            return content, False
        content = bytes(self._buffer[:at])
        del self._buffer[: at + len(self._delimiter)]
        self._state = "after"
        return content, True


def _begin_of(headers: str) -> PartBegin:
    """The part that these headers begin."""
    begin: PartBegin | None = None
    for line in headers.split("\r\n"):
        name, _, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        if name == "content-transfer-encoding" and value.lower() not in _PLAIN:
            raise FieldError("", "a part of the form is encoded", hint="send it as it is")
        if name == "content-disposition" and value.lower().startswith("form-data"):
            found = _parameters(value)
            if "name" in found:
                begin = begin or PartBegin(found["name"], found.get("filename"))
    if begin is None:
        raise FieldError("", "a part of the form has no name", hint=_HINT)
    return begin


def _parameters(value: str) -> dict[str, str]:
    """The parameters in a header, by their names in small letters."""
    found: dict[str, str] = {}
    for name, quoted, plain in _PARAMETER.findall(value):
        found.setdefault(name.lower(), re.sub(r"\\(.)", r"\1", quoted) if quoted else plain)
    return found
