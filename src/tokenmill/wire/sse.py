"""Server-sent events: bytes to events and back, pure and incremental (WHATWG HTML, section 9.2).

Bytes may be cut anywhere, also inside a line end or a character. Lines and events have a bound, so that a
stream without line ends takes no memory. `id` and `retry` are read over: no endpoint here resumes a stream.
"""

from typing import Final, NamedTuple

from tokenmill.core import EndpointError

__all__ = ["MAX_EVENT_BYTES", "SseEvent", "SseParser", "encode_sse"]

MAX_EVENT_BYTES: Final = 4 << 20
"""Of one event with all its lines, unless a parser is told otherwise."""

_BOM: Final = b"\xef\xbb\xbf"


class SseEvent(NamedTuple):
    """One event: its lines of data joined by line feeds, and its name, empty if it has none."""

    data: bytes
    name: str = ""


class SseParser:
    """Turns what arrives into events; `feed` gives those that a piece completes."""

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._tail = bytearray()
        self._data: list[bytes] = []
        self._num_bytes = 0
        self._name = ""
        self._is_first = True

    @property
    def is_inside(self) -> bool:
        """Whether an event has begun that its stream has not ended yet."""
        return bool(self._tail or self._data)

    def feed(self, piece: bytes) -> list[SseEvent]:
        """The events that end in this piece. Raises EndpointError for one over the bound."""
        self._tail += piece
        if self._is_first:
            if len(self._tail) < len(_BOM) and _BOM.startswith(self._tail):
                return []
            self._tail, self._is_first = bytearray(self._tail.removeprefix(_BOM)), False
        elif b"\n" not in piece and b"\r" not in piece and not self._tail.endswith(b"\r", 0, -len(piece)):
            self._check(len(self._tail))
            return []
        text = bytes(self._tail)
        if b"\r" in text:
            text = self._plain_ends(text)
        *lines, tail = text.split(b"\n")
        self._tail = bytearray(tail)
        events: list[SseEvent] = []
        for line in lines:
            if line:
                self._field(line)
            elif self._data:
                events.append(SseEvent(b"\n".join(self._data), self._name))
                self._clear()
            else:
                self._clear()
        self._check(len(self._tail))
        return events

    def _plain_ends(self, text: bytes) -> bytes:
        """CRLF and CR as LF; a CR that ends the piece waits for what follows, which may be its LF."""
        held = text.endswith(b"\r")
        text = text[:-1] if held else text
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return text + b"\r" if held else text

    def _field(self, line: bytes) -> None:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._num_bytes += len(value) + 1
            self._check(0)
            self._data.append(value)
        elif field == b"event":
            self._check(len(value))
            self._name = value.decode("utf-8", "replace")

    def _clear(self) -> None:
        self._data, self._num_bytes, self._name = [], 0, ""

    def _check(self, more: int) -> None:
        if self._num_bytes + more > self._max_bytes:
            raise EndpointError(
                f"an event of the stream has over {self._max_bytes} bytes",
                hint="is this an endpoint of the API that was named?",
            )


def encode_sse(data: bytes, name: str = "") -> bytes:
    """An event as bytes; `data` may have lines, which end in LF."""
    head = b"event: %s\n" % name.encode() if name else b""
    return head + b"".join(b"data: %s\n" % line for line in data.split(b"\n")) + b"\n"
