"""What counts as an answer of an upstream, piece by piece."""

from collections.abc import Sequence
from typing import Any

import pytest

from tokenmill.core import EndpointError, Usage
from tokenmill.router.answer import UpstreamAnswer
from tokenmill.router.upstream import prompt_bytes
from tokenmill.wire import Begin, Call, Finish, Piece, TextPiece, ToolPiece, Totals

USAGE = Usage(num_prompt_tokens=9, num_cached_tokens=4, num_output_tokens=3)
BEGIN, TEXT, END, TOTALS = Begin("theirs", "m-1"), TextPiece("Hi"), Finish("completed"), Totals(USAGE)


def answer(pieces: Sequence[Piece], num_choices: int = 1) -> tuple[UpstreamAnswer, list[Piece]]:
    made = UpstreamAnswer(num_choices, Begin("ours", "m", 5))
    passed = [out for piece in pieces for out in made.take(piece)]
    return made, [*passed, *made.end()]


def test_ends_come_last_and_names_are_ours() -> None:
    made, passed = answer([BEGIN, TEXT, END, TOTALS])
    assert passed == [Begin("ours", "m", 5), TEXT, END, TOTALS]
    assert made.usage(100) == (USAGE, True)


@pytest.mark.parametrize(
    ("pieces", "num_choices", "words"),
    [
        ([], 1, "no end"),
        ([BEGIN, TEXT], 1, "no end"),
        ([BEGIN, TEXT, TOTALS], 1, "no end"),
        ([BEGIN, TEXT, END], 2, "1 answers have no end"),
        ([BEGIN, TEXT, END, TextPiece("more")], 1, "after its end"),
        ([BEGIN, TEXT, END, Finish("length")], 1, "ends twice"),
        ([BEGIN, TextPiece("x", 3)], 2, "a choice 3 of 2"),
        ([BEGIN, Finish("completed", 7)], 2, "a choice 7 of 2"),
        ([BEGIN, TEXT, Begin("other", "m")], 1, "a second answer"),
        ([BEGIN, TEXT, Finish("failed", error="withheld (content_filter)"), TOTALS], 1, "content_filter"),
    ],
)
def test_what_is_no_answer(pieces: list[Any], num_choices: int, words: str) -> None:
    with pytest.raises(EndpointError, match=words.replace("(", r"\(").replace(")", r"\)")):
        answer(pieces, num_choices)


def test_an_end_that_is_said_twice_is_one() -> None:
    assert answer([BEGIN, TEXT, END, BEGIN, END, TOTALS])[1].count(END) == 1


def test_choices_end_in_order() -> None:
    second: list[Piece] = [TextPiece("b", 1), Finish("length", 1)]
    _, passed = answer([BEGIN, *second, TEXT, END, TOTALS], 2)
    assert passed[-3:] == [END, Finish("length", 1), TOTALS]


def test_what_is_not_told_is_counted_by_the_pieces() -> None:
    made = UpstreamAnswer(1, BEGIN)
    for piece in (TextPiece("a"), TextPiece("b"), ToolPiece(0, "id", "name", "x" * 36)):
        list(made.take(piece))
    usage, is_exact = made.usage(50)
    assert (usage.num_prompt_tokens, usage.num_output_tokens, is_exact) == (50, 11, False)
    list(made.take(Totals(Usage(num_prompt_tokens=9, num_cached_tokens=0, num_output_tokens=2))))
    usage, is_exact = made.usage(50)
    assert (usage.num_prompt_tokens, usage.num_output_tokens, is_exact) == (9, 11, False)


def test_the_bytes_of_a_prompt() -> None:
    assert prompt_bytes(Call(model="m", prompts=("é", (1, 2, 3)))) == 2 + 12
