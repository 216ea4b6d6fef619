"""Whether what an upstream streams is an answer: each choice with an end of its own, and nothing after it.

An end that the upstream did not send is never made up: a cut stream must not look like a short answer. A
piece of text that an upstream sends twice cannot be told from one that the model wrote twice.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from tokenmill.core import EndpointError, Usage
from tokenmill.costs import CHARS_PER_TOKEN
from tokenmill.wire import Begin, Finish, Piece, TextPiece, ToolPiece, Totals

__all__ = ["UpstreamAnswer", "estimated_tokens"]

_CUT: Final = "try again: the upstream ended its stream without saying how the answer ends"


class UpstreamAnswer:
    """Takes the pieces of one stream, and holds back its ends and counts until it is over.

    `num_choices` ends are expected. The pieces are counted, for streams that never tell their usage.
    """

    def __init__(self, num_choices: int, begin: Begin) -> None:
        self.has_token = False
        self.totals: Totals | None = None
        self._num_choices = num_choices
        self._begin = begin
        self._began: Begin | None = None
        self._finishes: dict[int, Finish] = {}
        self._num_pieces = self._num_bytes = 0

    @property
    def is_complete(self) -> bool:
        """Whether every choice has its end. What is missing then is at most the usage."""
        return len(self._finishes) == self._num_choices

    @property
    def num_output_tokens(self) -> int:
        """Tokens that have come, by the pieces: at least one each, and one for about four characters."""
        return max(self._num_pieces, estimated_tokens(self._num_bytes))

    def take(self, piece: Piece) -> Iterator[Piece]:
        """What of it can be passed on now. Raises EndpointError for what is no answer."""
        if isinstance(piece, Begin):
            yield from self._start(piece)
        elif isinstance(piece, Totals):
            self.totals = piece
        elif isinstance(piece, Finish):
            self._finish(piece)
        else:
            yield self._content(piece)

    def end(self) -> Iterator[Piece]:
        """The ends of all choices, and the usage if it was told. Raises EndpointError for a cut stream."""
        if not self.is_complete:
            missing = self._num_choices - len(self._finishes)
            what = "its answer has no end" if self._num_choices == 1 else f"{missing} answers have no end"
            raise EndpointError(f"{what}", hint=_CUT)
        ends = [self._finishes[index] for index in sorted(self._finishes)]
        for each in ends:
            if each.finish_reason not in ("completed", "stopped", "length"):
                raise EndpointError(each.error or f"its answer ended as {each.finish_reason}")
        yield from ends
        if self.totals is not None:
            yield self.totals

    def usage(self, num_prompt_tokens: int) -> tuple[Usage, bool]:
        """What was used, and whether the upstream said so; `num_prompt_tokens` where it did not."""
        if self.totals is not None and self.is_complete:
            return self.totals.usage, True
        counted = Usage(
            num_prompt_tokens=num_prompt_tokens, num_cached_tokens=0, num_output_tokens=self.num_output_tokens
        )
        if self.totals is None:
            return counted, False
        said = self.totals.usage
        most = max(said.num_output_tokens, counted.num_output_tokens)
        return replace(said, num_output_tokens=most), False

    def _start(self, piece: Begin) -> Iterator[Begin]:
        if self._began is None:
            self._began = piece
            yield Begin(self._begin.id, self._begin.model, piece.created or self._begin.created)
        elif piece.id != self._began.id:
            raise EndpointError("its stream begins a second answer")

    def _finish(self, piece: Finish) -> None:
        known = self._finishes.setdefault(piece.index, piece)
        if not 0 <= piece.index < self._num_choices:
            raise EndpointError(f"its answer has a choice {piece.index} of {self._num_choices}")
        if known.finish_reason != piece.finish_reason:
            raise EndpointError(f"its answer ends twice: {known.finish_reason} and {piece.finish_reason}")

    def _content(self, piece: TextPiece | ToolPiece) -> Piece:
        if not 0 <= piece.index < self._num_choices:
            raise EndpointError(f"its answer has a choice {piece.index} of {self._num_choices}")
        if piece.index in self._finishes:
            raise EndpointError("its stream has more of an answer after its end")
        text = piece.text if isinstance(piece, TextPiece) else piece.name + piece.arguments
        self.has_token = True
        self._num_pieces += 1
        self._num_bytes += len(text.encode("utf-8", "replace"))
        return piece


def estimated_tokens(num_bytes: int) -> int:
    """About how many tokens so much text has, where nobody says."""
    return math.ceil(num_bytes / CHARS_PER_TOKEN)
