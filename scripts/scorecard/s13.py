"""S13: the text of a stream, however its bytes are cut into tokens.

Two properties, each tried on many generated streams that may end at any token:

- UTF-8: after every token exactly the characters are shown whose bytes are complete (or can never be);
  no character is lost, doubled or replaced because a token ends inside it.
- Stop strings: text ends before the stop string that is complete first (of two, the longer); until then
  exactly what cannot begin one is shown, so nothing of a stop string ever leaks.

The references decode byte by byte after table 3-7 of the Unicode standard and look for stop strings
character by character; they share no code with the engine. Without the guard, each token is decoded and
searched on its own, as a naive server does; that must fail. Event-stream framing and tool calls are
not covered here.
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from scripts.scorecard import Line
from tokenmill.engine.detokenizer import Detokenizer

__all__ = ["Stream", "characters", "expected_deltas", "guarded_deltas", "naive_deltas", "run"]

_REPLACEMENT = "\ufffd"
# The second bytes that are allowed after these first ones; after all others it is 80 to BF.
_SECOND = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}
_EDGES = "\x80\u07ff\u0800\ud7ff\ue000\ufffd\uffff\U00010000\U0010ffffé€😀"
_BROKEN = (b"\xc0\xaf", b"\xc1", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf0\x8f", b"\xf4\x90", b"\xf5", b"\xff")
_HALVES = (b"\x80", b"\xbf", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xf0", b"\xe2")
_WORDS = (
    "<think>",
    "</think>",
    "<tool_call>",
    '{"a":1}',
    "\n\n",
    "###",
    "User:",
    "é",
    "😀",
    "ab",
    "a",
    "<",
    " ",
)


class Stream(NamedTuple):
    """The bytes of each token of an answer, and the request's stop strings."""

    tokens: tuple[bytes, ...]
    stop: tuple[str, ...] = ()


class _Tally(NamedTuple):
    """What came of one property."""

    cases: int
    violations: int
    seconds: float


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """Try `cases` streams for each of the two properties."""
    deltas = guarded_deltas if guard else naive_deltas
    rng = random.Random(seed)
    text = _count(itertools.islice(_utf8_streams(rng), cases), deltas)
    stops = _count(itertools.islice(_stop_streams(rng), cases), deltas)
    return Line(
        name="S13",
        what="text of a stream: whole characters, stop strings cut and never leaked",
        cases=text.cases + stops.cases,
        violations=text.violations + stops.violations,
        seconds=text.seconds + stops.seconds,
        figures={
            "utf8_cases": text.cases,
            "utf8_violations": text.violations,
            "stop_cases": stops.cases,
            "stop_violations": stops.violations,
        },
    )


def guarded_deltas(stream: Stream) -> list[str]:
    """What the engine shows after each token, up to a stop, and at the end."""
    detokenizer = Detokenizer(stream.tokens.__getitem__, stream.stop)
    deltas = []
    for index in range(len(stream.tokens)):
        piece = detokenizer.push(index)
        deltas.append(piece.text)
        if piece.stopped:
            break
    return [*deltas, detokenizer.finish()]


def naive_deltas(stream: Stream) -> list[str]:
    """The same without the guard: each token is decoded and searched on its own."""
    deltas = []
    for token in stream.tokens:
        text = token.decode(errors="replace")
        found = [at for stop in stream.stop if (at := text.find(stop)) >= 0]
        deltas.append(text[: min(found)] if found else text)
        if found:
            break
    return [*deltas, ""]


def expected_deltas(stream: Stream) -> list[str]:
    """What must be shown after each token, up to a stop, and at the end."""
    settled = list(characters(b"".join(stream.tokens)))
    text = "".join(character for character, _ in settled)
    shown, stop_at = _shown_lengths(text, stream.stop)
    deltas, num_shown, num_bytes = [], 0, 0
    for token in stream.tokens:
        num_bytes += len(token)
        num_characters = sum(at <= num_bytes for _, at in settled)
        is_stopped = stop_at is not None and num_characters >= stop_at
        length = shown[stop_at if is_stopped and stop_at is not None else num_characters]
        deltas.append(text[num_shown:length])
        num_shown = length
        if is_stopped:
            return [*deltas, ""]
    return [*deltas, text[num_shown:]]


def characters(data: bytes) -> Iterator[tuple[str, int]]:
    """Each character, and the number of bytes after which it is certain; an incomplete tail is left out."""
    pending: list[int] = []
    for num_bytes, byte in enumerate(data, start=1):
        if pending and not _continues(pending, byte):
            yield _REPLACEMENT, num_bytes
            pending = []
        pending.append(byte)
        length = _sequence_length(pending[0])
        if length == 0:
            yield _REPLACEMENT, num_bytes
            pending = []
        elif len(pending) == length:
            yield _character(pending), num_bytes
            pending = []


def _sequence_length(first: int) -> int:
    """Bytes of a character that begins so; 0 if none does."""
    if first < 0x80:
        return 1
    return next(
        (n for low, high, n in ((0xC2, 0xDF, 2), (0xE0, 0xEF, 3), (0xF0, 0xF4, 4)) if low <= first <= high), 0
    )


def _continues(pending: Sequence[int], byte: int) -> bool:
    low, high = _SECOND.get(pending[0], (0x80, 0xBF)) if len(pending) == 1 else (0x80, 0xBF)
    return low <= byte <= high


def _character(sequence: Sequence[int]) -> str:
    first, *rest = sequence
    code = first if not rest else first & (0x3F >> len(rest))
    for byte in rest:
        code = code << 6 | byte & 0x3F
    return chr(code)


def _shown_lengths(text: str, stop: Sequence[str]) -> tuple[list[int], int | None]:
    """Characters to show for each number of characters known, and the number at which a stop is complete."""
    shown = [0]
    for end in range(1, len(text) + 1):
        found = [len(each) for each in stop if text.endswith(each, 0, end)]
        if found:
            return [*shown, end - max(found)], end
        held = (n for each in stop for n in range(1, len(each)) if text.endswith(each[:n], 0, end))
        shown.append(end - max(held, default=0))
    return shown, None


def _count(streams: Iterator[Stream], deltas: Callable[[Stream], list[str]]) -> _Tally:
    began, cases, violations = time.perf_counter(), 0, 0
    for stream in streams:
        cases += 1
        violations += deltas(stream) != expected_deltas(stream)
    return _Tally(cases, violations, time.perf_counter() - began)


def _utf8_streams(rng: random.Random) -> Iterator[Stream]:
    """Every split and early end of the edges of UTF-8 and of broken sequences; then random streams."""
    for data in (*(character.encode() for character in _EDGES), *_BROKEN, *_HALVES):
        for size in range(1, len(data) + 1):
            for cuts in itertools.product((False, True), repeat=size - 1):
                tokens = _cut_at(data[:size], [at for at, is_cut in enumerate(cuts, start=1) if is_cut])
                yield Stream(tokens)
                yield Stream((b"a", *tokens, b"b"))
    while True:
        data = b"".join(_some_bytes(rng) for _ in range(rng.randint(1, 6)))
        yield Stream(_early(rng, _random_cuts(rng, data)))


def _stop_streams(rng: random.Random) -> Iterator[Stream]:
    """Texts of few different pieces, with stop strings out of the same text, so that they overlap."""
    while True:
        words = rng.sample(_WORDS, 4)
        text = "".join(rng.choices(words, k=rng.randint(1, 6)))
        stop = tuple(_some_stop(rng, text, words) for _ in range(rng.randint(1, 4)))
        yield Stream(_early(rng, _random_cuts(rng, text.encode())), stop)


def _some_bytes(rng: random.Random) -> bytes:
    kind = rng.randrange(6)
    if kind < 2:
        return rng.choice(_EDGES).encode()
    if kind == 2:
        return rng.choice(_BROKEN)
    if kind == 3:
        return rng.choice(_HALVES)
    return rng.randbytes(rng.randint(1, 3)) if kind == 4 else b"xyz"[: rng.randint(1, 3)]


def _some_stop(rng: random.Random, text: str, words: Sequence[str]) -> str:
    source = text if rng.random() < 0.6 else "".join(rng.choices(words, k=2))
    start = rng.randrange(len(source))
    return source[start : start + rng.randint(1, 8)]


def _random_cuts(rng: random.Random, data: bytes) -> tuple[bytes, ...]:
    """Tokens of any length; a few are empty, as those of control tokens are."""
    return _cut_at(data, sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, len(data)))))


def _cut_at(data: bytes, cuts: Sequence[int]) -> tuple[bytes, ...]:
    return tuple(data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)]))


def _early(rng: random.Random, tokens: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """One stream in four ends before its last token."""
    return tokens[: rng.randint(0, len(tokens))] if rng.random() < 0.25 else tokens


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="streams for each property")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--no-guard", action="store_true", help="the control: each token on its own")
    arguments = parser.parse_args()
    print(run(cases=arguments.cases, seed=arguments.seed, guard=not arguments.no_guard))


if __name__ == "__main__":
    _main()
