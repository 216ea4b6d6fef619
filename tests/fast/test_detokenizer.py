"""Text of a stream: whole characters only, stop strings however the text was split."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.scorecard import s13
from tokenmill.engine.detokenizer import Detokenizer, StopMatcher


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def stream(tokens: Sequence[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The pieces of a stream, the final flush included, and whether a stop string ended it."""
    detokenizer = Detokenizer(lambda index: tokens[index], stop)
    pieces: list[str] = []
    for index in range(len(tokens)):
        piece = detokenizer.push(index)
        pieces.append(piece.text)
        if piece.stopped:
            return [*pieces, detokenizer.finish()], True
    return [*pieces, detokenizer.finish()], False


def whole_characters(data: bytes) -> str:
    """The text of all bytes, without an incomplete character at the end."""
    for size in range(4):
        head, tail = data[: len(data) - size], data[len(data) - size :]
        if size <= len(data) and _is_incomplete(tail):
            return head.decode(errors="replace")
    return data.decode(errors="replace")


def _is_incomplete(tail: bytes) -> bool:
    if not tail:
        return False
    return any(_completes(tail + bytes([second]) + rest) for second in range(0x80, 0xC0) for rest in _RESTS)


_RESTS = (b"", b"\x80", b"\x80\x80")


def _completes(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Character by character: the text before the stop string that is complete first, the longest of them."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@settings(max_examples=150, deadline=None)
@given(text=st.text("aé€😀\ufffd", max_size=12), cuts=st.lists(st.integers(0, 60), max_size=8))
def test_any_split_of_any_text_gives_it_back(text: str, cuts: list[int]) -> None:
    pieces, stopped = stream(split(text.encode(), cuts))
    assert "".join(pieces) == text and not stopped


@settings(max_examples=150, deadline=None)
@given(
    data=st.one_of(st.binary(max_size=12), st.text("aé€😀", max_size=6).map(lambda t: t.encode()[:-1])),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_bytes_that_are_no_text_are_replaced_and_a_half_character_is_dropped(
    data: bytes, cuts: list[int]
) -> None:
    pieces, _ = stream(split(data, cuts))
    assert "".join(pieces) == whole_characters(data)


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_every_split_of_a_character_waits_for_its_end(character: str) -> None:
    data = character.encode()
    for size in range(1, len(data)):
        pieces, _ = stream([b"a", data[:size], data[size:], b"b"])
        assert pieces == ["a", "", character, "b", ""]
        assert "".join(stream([b"a", data[:size]])[0]) == "a", "an incomplete tail is dropped"


def test_an_invalid_byte_is_shown_at_once_and_later_text_is_unharmed() -> None:
    assert stream([b"a", b"\xff", b"b"])[0] == ["a", "\ufffd", "b", ""]
    assert "".join(stream([b"\xe2\x82", b"b"])[0]) == "\ufffdb"


STOPS = st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@settings(max_examples=250, deadline=None)
@given(text=st.text("ab<é", max_size=16), stop=STOPS, cuts=st.lists(st.integers(0, 40), max_size=10))
def test_stop_strings_cut_where_the_whole_text_would_be_cut(
    text: str, stop: tuple[str, ...], cuts: list[int]
) -> None:
    pieces, stopped = stream(split(text.encode(), cuts), stop)
    assert "".join(pieces) == cut(text, stop)
    assert stopped == any(s in text for s in stop)


@settings(max_examples=150, deadline=None)
@given(text=st.text("ab<", max_size=12), stop=STOPS)
def test_only_a_possible_beginning_of_a_stop_string_is_withheld(text: str, stop: tuple[str, ...]) -> None:
    matcher = StopMatcher(stop)
    shown = ""
    for index, character in enumerate(text):
        piece = matcher.push(character)
        shown += piece.text
        if piece.stopped:
            return
        withheld = text[len(shown) : index + 1]
        assert not withheld or any(s.startswith(withheld) and s != withheld for s in stop)


def test_a_stop_string_over_token_borders_never_leaks() -> None:
    assert stream([b"yes", b"<", b"en", b"d>", b"no"], ("<end>",)) == (["yes", "", "", "", ""], True)
    assert stream([b"yes", b"<en"], ("<end>",)) == (["yes", "", "<en"], False)


def test_text_after_a_stop_is_an_assertion() -> None:
    matcher = StopMatcher(("x",))
    matcher.push("x")
    with pytest.raises(AssertionError, match="after a stop"):
        matcher.push("y")


@pytest.mark.parametrize("data", [b"\xed\xa0", b"\xed\xbf", b"\xed\xa0\x80"])
def test_half_a_surrogate_is_shown_at_once_and_not_dropped_at_the_end(data: bytes) -> None:
    shown = "\ufffd" * len(data)
    assert "".join(stream([b"a", data])[0]) == "a" + shown
    assert stream([data[:1], data[1:], b"b"])[0] == ["", shown, "b", ""]
    assert "".join(stream([bytes([byte]) for byte in data])[0]) == shown


def test_a_character_next_to_the_surrogates_waits_for_its_end() -> None:
    assert stream([b"\xed", b"\x9f", b"\xbf"])[0] == ["", "", "\ud7ff", ""]


def test_the_scorecard_finds_no_violation_with_the_guard_and_many_without() -> None:
    guarded = s13.run(cases=1200, seed=1, guard=True)
    assert (guarded.cases, guarded.violations) == (2400, 0)
    figures = s13.run(cases=1200, seed=1, guard=False).figures
    assert int(figures["utf8_violations"]) > 300 and int(figures["stop_violations"]) > 300


def test_the_reference_of_the_scorecard_decodes_as_python_does() -> None:
    for data in ("aé€😀\U0010ffff\ud7ff".encode(), b"\xff\xe0\x80\xf4\x90a", b"\xe2\x82a", b"\xed\xa0\x80"):
        assert "".join(text for text, _ in s13.characters(data)) == data.decode(errors="replace")
    assert list(s13.characters(b"a\xe2\x82")) == [("a", 1)]


def test_a_stop_string_among_the_first_tokens_is_text() -> None:
    def text_of(min_tokens: int, stop: tuple[str, ...]) -> str:
        pushed = "xabzab"
        detokenizer = Detokenizer(lambda index: pushed[index].encode(), stop, min_tokens)
        pieces = []
        for index in range(len(pushed)):
            pieces.append(detokenizer.push(index))
            if pieces[-1].stopped:
                break
        return "".join(piece.text for piece in pieces) + detokenizer.finish()

    assert [text_of(count, ("ab",)) for count in range(7)] == ["x"] * 3 + ["xabz"] * 3 + ["xabzab"]
    assert text_of(3, ("ab", "xabc")) == "xabz", "what was withheld for another stop string does not count"
    assert text_of(2, ("abz",)) == "x", "a stop string may begin among them"
