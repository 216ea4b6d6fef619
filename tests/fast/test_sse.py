"""Server-sent events: however the bytes are cut, the same events; and never more memory than the bound."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.core import EndpointError
from tokenmill.wire.sse import SseEvent, SseParser, encode_sse

LINES = st.sampled_from(
    [
        b"data: a",
        b"data:b",
        b"data",
        b"data:  c",
        b": note",
        b"event: e",
        b"id: 1",
        b"retry: 2",
        b"odd",
        b"",
        b"\xc3\xa9: x",
    ]
)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


def events(pieces: list[bytes]) -> list[SseEvent]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def plain(data: bytes) -> list[SseEvent]:
    """The twin: the whole text at once, line by line, as the standard says it."""
    found: list[SseEvent] = []
    lines: list[bytes] = []
    name = ""
    for line in (
        data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    ):
        field, _, value = line.partition(b":")
        if not line:
            found += [SseEvent(b"\n".join(lines), name)] if lines else []
            lines, name = [], ""
        elif field == b"data":
            lines.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ").decode()
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LINES, ENDS)), st.lists(st.integers(1, 9)), st.booleans())
def test_bytes_may_be_cut_anywhere(lines: list[tuple[bytes, bytes]], sizes: list[int], has_bom: bool) -> None:
    data = (
        (b"\xef\xbb\xbf" if has_bom else b"") + b"".join(line + end for line, end in lines) + b"data: z\n\n"
    )
    pieces, rest = [], data
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    assert events([*pieces, rest]) == plain(data) == events([data[at : at + 1] for at in range(len(data))])


@given(st.binary(max_size=40).filter(lambda data: b"\r" not in data), st.sampled_from(["", "ping"]))
def test_what_is_written_is_read(data: bytes, name: str) -> None:
    assert events([encode_sse(data, name)]) == [SseEvent(data, name)]


def test_an_event_that_is_not_ended_is_none() -> None:
    parser = SseParser()
    assert parser.feed(b"data: x\n") == [] and parser.is_inside
    assert parser.feed(b"\n") == [SseEvent(b"x")] and not parser.is_inside


@pytest.mark.parametrize("piece", [b"x" * 999, b"data: x\n", b"data:\n", b"data: " + b"x" * 999])
def test_memory_is_bounded(piece: bytes) -> None:
    parser = SseParser(max_bytes=1 << 13)
    tracemalloc.start()
    with pytest.raises(EndpointError, match="over 8192 bytes"):
        for _ in range(1 << 20):
            parser.feed(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_long_lines_in_small_pieces_take_linear_time() -> None:
    parser = SseParser()
    for _ in range(1 << 16):
        parser.feed(b"x" * 60)
    assert parser.is_inside
