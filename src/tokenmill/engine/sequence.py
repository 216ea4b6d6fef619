"""The state of one request while the engine works on it.

A sequence is a list of tokens of which the first `num_computed` have keys and values in the cache. The
engine knows no phases: a step computes some of the missing tokens, and `num_computed` catches up with
`num_total`. Drafts are tokens after `num_total` that somebody guessed; they are computed with the rest and
forgotten with the step. Generating and scoring differ only in what happens to the logits. Nothing here
decides anything: the scheduler moves blocks and counts, the engine appends tokens.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenmill.core import (
    Completion,
    FinishReason,
    ModelFormatError,
    Request,
    Score,
    Tier,
    TokenLogprobs,
    TokenmillError,
    Usage,
)
from tokenmill.costs.metering import Charge
from tokenmill.engine.adapters import NO_ADAPTER
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.structured.grammar import GrammarState
from tokenmill.engine.taps.tap import Tap, cacheable_prefix
from tokenmill.kernels import KV_BLOCK
from tokenmill.kvcache import BlockTable, PrefixChain

__all__ = ["TIER_DELAY_S", "Delta", "GenerationState", "ScoringState", "SequenceState"]

TIER_DELAY_S: dict[Tier, float] = {"fast": 0.0, "standard": 10.0, "batch": 120.0}
"""Sequences are served in order of submission time plus this many seconds. So a request of a later tier
is passed by at most the requests that come within its delay: nobody starves."""

_NEVER = 1 << 60


class SequenceState(ABC):
    """Tokens, how many of them are computed, and the blocks that hold them.

    `max_computed` bounds `num_computed` over the whole life. `rank_s` and `arrival` (set at submission)
    order sequences. The scheduler owns `table`, `swap_slots`, `reserved`, `turn`, `num_published`, and
    the counts.
    """

    tier: Tier = "standard"
    rank_s: float = 0.0
    tenant: str = ""
    expires_s: float | None = None
    siblings: "tuple[GenerationState, ...]" = ()
    taps: tuple[Tap, ...] = ()
    num_prompt: int = _NEVER
    """Positions before this one are input; of a text that is only read, all."""
    wants_logits: bool = True
    """False if the rows from `first_logits` on are wanted as the final norm gives them, without logits."""

    def __init__(self, request_id: str, tokens: Iterable[int], max_computed: int) -> None:
        self.request_id = request_id
        self.tokens = array("i", tokens)
        self.drafts = array("i")
        self.max_computed = max_computed
        self.num_computed = 0
        self.num_preemptions = 0
        self.turn = -1
        self.num_cached = 0
        self.arrival = -1
        # By number of a read among the taps: the first position that it has not had.
        self.num_tapped: dict[int, int] = {}
        self.table = BlockTable(KV_BLOCK)
        self.swap_slots: list[int] = []
        self.reserved = False
        self.chain: PrefixChain | None = None
        self.num_published = 0
        self.adapter = NO_ADAPTER
        self.error = ""
        # What it was charged so far for input, cached input and output (`meter.py`).
        self.nanoseconds = [0, 0, 0]
        self.nanojoules = [0, 0, 0]

    @property
    def charge(self) -> Charge:
        """What the steps took that it had a part in, as far as that is settled: at its end all of it."""
        kinds = [(ns, nj, 0) for ns, nj in zip(self.nanoseconds, self.nanojoules, strict=True)]
        return Charge(input=kinds[0], cached=kinds[1], output=kinds[2])

    @property
    def place(self) -> tuple[float, int]:
        """Earlier is served first and preempted last."""
        return self.rank_s, self.arrival

    @property
    def num_total(self) -> int:
        """Tokens known so far: the prompt and what was sampled."""
        return len(self.tokens)

    @property
    def num_pending(self) -> int:
        """Known tokens that are not in the cache."""
        return len(self.tokens) - self.num_computed

    @property
    @abstractmethod
    def first_logits(self) -> int:
        """The first position whose logits are still wanted."""

    @property
    def first_sampled(self) -> int:
        """The first position whose logits choose a token, and so need a place in the step."""
        return _NEVER

    @property
    def num_skippable(self) -> int:
        """Leading tokens whose rows nobody needs to see: they may come from the prefix cache."""
        return cacheable_prefix(self.taps, self.first_logits)

    @property
    @abstractmethod
    def finished(self) -> bool:
        """True if the sequence needs no further step."""

    def rows(self, start: int, stop: int) -> "array[int]":
        """The tokens at positions [start, stop), drafts included."""
        total = len(self.tokens)
        return self.tokens[start:stop] + self.drafts[max(0, start - total) : max(0, stop - total)]

    def num_confirmed(self, stop: int) -> int:
        """Of rows computed up to `stop`, how many hold tokens that turned out to be the sequence's own."""
        return stop

    @abstractmethod
    def fail(self, error: str, *, now_s: float) -> None:
        """End because of an error in this sequence."""


class Delta(NamedTuple):
    """What a generation has made since it was last asked."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


class GenerationState(SequenceState):
    """A request whose continuation is sampled: completion `index` of the request's `n`.

    `max_total` is the number of tokens, prompt included, at which it ends with reason `length`. Times
    are seconds of the engine's clock. `siblings` are the other completions of the request, which begin
    where the prompt ends: until then only this one is computed.
    """

    def __init__(
        self,
        request: Request,
        *,
        index: int,
        seed: int,
        max_total: int,
        detokenizer: Detokenizer,
        end_token_ids: frozenset[int],
        bad_words: tuple[tuple[int, ...], ...] = (),
        grammar: GrammarState | None = None,
        submitted_s: float,
    ) -> None:
        assert 0 < len(request.prompt) < max_total, "a prompt is not empty and leaves room for one token"
        # The last token sampled is never computed: nothing follows it.
        super().__init__(request.request_id, request.prompt, max_total - 1)
        self.index = index
        self.params = request.params
        self.tenant = request.tenant
        self.tier = request.tier
        self.rank_s = submitted_s + TIER_DELAY_S[request.tier]
        self.expires_s = None if request.timeout_s is None else submitted_s + request.timeout_s
        self.num_prompt = len(request.prompt)
        self.seed = seed
        self.max_total = max_total
        self.bad_words = bad_words
        self.grammar = grammar
        self.finish_reason: FinishReason | None = None
        self.submitted_s = submitted_s
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self.num_drafted = 0
        self.num_accepted = 0
        self._detokenizer = detokenizer
        self._model_end_ids = end_token_ids
        self.end_token_ids = end_token_ids.union(request.params.stop_token_ids)
        # Text is made when it is asked for, if it cannot end the sequence.
        self._num_read = self.num_prompt
        self._pieces: list[str] = []
        self._stop = ""
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._num_pieces_taken = 0
        self._num_tokens_taken = 0

    @property
    def num_output(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def first_logits(self) -> int:
        """The last position, whose logits choose the next token; before that, prompt rows to be scored."""
        return len(self._prompt_logprobs) if self._scores_prompt else self.num_total - 1

    @property
    def first_sampled(self) -> int:
        """The last position."""
        return len(self.tokens) - 1

    @property
    def can_draft(self) -> bool:
        """False if nobody may see a row that holds a guess: a tap would."""
        return not self.taps

    @property
    def finished(self) -> bool:
        """True once there is a finish reason."""
        return self.finish_reason is not None

    def banned_at(self, position: int) -> tuple[int, ...]:
        """Tokens that would end the text before `min_tokens`, if chosen for this position."""
        if position - self.num_prompt >= self.params.min_tokens:
            return ()
        return (*self._model_end_ids, *self.params.stop_token_ids)

    @property
    def is_plain(self) -> bool:
        """True if all further tokens are chosen from the logits, the next one from one row, and always in the
        same way but for the position; of a grammar, that the most likely token is tried without a mask.
        """
        params = self.params
        return not (
            len(self.tokens) - self.num_computed != 1
            or len(self.tokens) - self.num_prompt < max(1, params.min_tokens)
            or self.siblings
            or self.taps
            or self.drafts
            or self.bad_words
            or (self.grammar is not None and not params.greedy)
            or params.logprobs is not None
            or params.penalises
            or self._scores_prompt
            or self.finished
        )

    @property
    def ends_by_text(self) -> bool:
        """True if a stop string or a grammar may end the sequence."""
        return self._detokenizer.may_stop or self.grammar is not None

    def num_confirmed(self, stop: int) -> int:
        """Rows up to the token before the last: what follows it was guessed wrongly."""
        return min(stop, self.num_total - 1) if self.drafts else stop

    def append(self, token_id: int, logprobs: TokenLogprobs | None, *, now_s: float) -> None:
        """Take a sampled token; it may end the sequence. The text of an end token is not shown."""
        assert not self.finished, f"{self.request_id} goes on after its end"
        self.tokens.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if self.first_token_s is None:
            self.first_token_s = now_s
        if token_id in self.end_token_ids:
            self._read(len(self.tokens) - 1)
            self._num_read = len(self.tokens)
            self.finish("completed" if token_id in self._model_end_ids else "stopped", now_s=now_s)
        elif self._detokenizer.may_stop and self._read_one(token_id):
            self.finish("stopped", now_s=now_s)
        elif self._follow_grammar(token_id, now_s):
            self.finish("completed", now_s=now_s)
        elif self.num_total == self.max_total and not self.finished:
            self.finish("length", now_s=now_s)

    def append_prompt(self, position: int, logprobs: TokenLogprobs) -> None:
        """Take the log-probabilities of the prompt token after this position; positions come in order."""
        assert position == len(self._prompt_logprobs), f"{self.request_id} scores {position} out of order"
        self._prompt_logprobs.append(logprobs)

    def finish(self, reason: FinishReason, *, now_s: float) -> None:
        """Write the one terminal state, and release text that waited for a possible stop string."""
        assert self.finish_reason is None, f"{self.request_id} ends twice"
        self._read(len(self.tokens))
        self._pieces.append(self._detokenizer.finish())
        self.finish_reason = reason
        self.finished_s = now_s

    def fail(self, error: str, *, now_s: float) -> None:
        """End as `failed`."""
        self.error = error
        self.finish("failed", now_s=now_s)

    def take(self) -> Delta:
        """Text, tokens and log-probabilities that were not taken before."""
        self._read(len(self.tokens))
        first, pieces = self._num_tokens_taken, self._pieces[self._num_pieces_taken :]
        self._num_tokens_taken, self._num_pieces_taken = self.num_output, len(self._pieces)
        return Delta(
            "".join(pieces), tuple(self.tokens[self.num_prompt + first :]), tuple(self._logprobs[first:])
        )

    def completion(self) -> Completion:
        """What the request ended with."""
        assert self.finish_reason is not None and self.finished_s is not None
        first_s = self.finished_s if self.first_token_s is None else self.first_token_s
        params = self.params
        return Completion(
            request_id=self.request_id,
            index=self.index,
            text="".join(self._pieces),
            token_ids=tuple(self.tokens[self.num_prompt :]),
            finish_reason=self.finish_reason,
            usage=Usage(
                num_prompt_tokens=self.num_prompt,
                num_cached_tokens=self.num_cached,
                num_output_tokens=self.num_output,
                num_draft_tokens=self.num_drafted,
                num_accepted_tokens=self.num_accepted,
            ),
            ttft_s=first_s - self.submitted_s,
            total_s=self.finished_s - self.submitted_s,
            logprobs=None if params.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=None if params.prompt_logprobs is None else tuple(self._prompt_logprobs),
            error=self.error,
            stop=self._stop,
        )

    def branch(self, siblings: Sequence["GenerationState"]) -> None:
        """Make these the other completions of the request. They share its prompt's log-probabilities."""
        self.siblings = tuple(siblings)
        for sibling in siblings:
            sibling._prompt_logprobs = self._prompt_logprobs

    def _read(self, stop: int) -> None:
        """Make the text of the tokens before `stop`, as far as it is not made yet."""
        if self._num_read < stop:
            self._pieces.append(self._detokenizer.push_all(self.tokens[self._num_read : stop]))
            self._num_read = stop

    def _read_one(self, token_id: int) -> bool:
        """Make the text of the last token; true if it ends the sequence."""
        self._num_read = len(self.tokens)
        piece = self._detokenizer.push(token_id)
        self._pieces.append(piece.text)
        self._stop = piece.stop
        return piece.stopped

    def _follow_grammar(self, token_id: int, now_s: float) -> bool:
        """Go on in the grammar; true if the text is complete. A limit that is reached fails the request."""
        if self.grammar is None:
            return False
        try:
            self.grammar.accept(token_id)
            return self.grammar.finished
        except TokenmillError as error:
            self.fail(str(error), now_s=now_s)
            return False

    @property
    def _scores_prompt(self) -> bool:
        wanted = 0 if self.params.prompt_logprobs is None else self.num_prompt - 1
        return len(self._prompt_logprobs) < wanted


class ScoringState(SequenceState):
    """A given text of which the tokens from `num_context` on are scored; `num_context` is at least 1.

    Texts that differ in their last token only are one computation: `add_ending` names the others' last ones.
    """

    def __init__(self, request_id: str, token_ids: Iterable[int], num_context: int) -> None:
        self._token_ids = tuple(token_ids)
        assert 0 < num_context < len(self._token_ids), "there is a first token and one to score"
        # The last token is only a target: nothing is computed from it.
        super().__init__(request_id, self._token_ids[:-1], len(self._token_ids) - 1)
        self.num_context = num_context
        self._endings = [self._token_ids[-1]]
        # For each position the targets' log-probabilities: one, but for the last.
        self._logprobs: list[Sequence[float]] = []

    @property
    def first_logits(self) -> int:
        """The position before the first token not scored yet; after a preemption no row is scored twice."""
        return self.num_context - 1 + len(self._logprobs)

    @property
    def finished(self) -> bool:
        """True once every token is scored."""
        return bool(self.error) or self.first_logits == self.num_total

    def add_ending(self, token_id: int) -> int:
        """Score this as the last token, too; gives the number of the ending. Only before it is submitted."""
        self._endings.append(token_id)
        return len(self._endings) - 1

    def targets(self, position: int) -> Sequence[int]:
        """The tokens that the logits at this position are to be scored on."""
        last = position == self.num_total - 1
        return self._endings if last else self._token_ids[position + 1 : position + 2]

    def append(self, position: int, logprobs: Sequence[float]) -> None:
        """Take the log-probabilities of the targets of this position; positions come in order."""
        assert position == self.first_logits, f"{self.request_id} scores position {position} out of order"
        self._logprobs.append(logprobs)

    def fail(self, error: str, *, now_s: float) -> None:
        """End without a score; `error` says why."""
        self.error = error

    def score(self, ending: int = 0) -> Score:
        """The scored tokens and their log-probabilities with one of the endings.

        What was computed once is counted once: with the first. Raises `ModelFormatError` if the sequence
        failed.
        """
        if self.error:
            raise ModelFormatError(f"{self.request_id} has no score: {self.error}")
        shared = self._token_ids[self.num_context : -1]
        return Score(
            token_ids=(*shared, self._endings[ending]),
            logprobs=(*(each[0] for each in self._logprobs[:-1]), self._logprobs[-1][ending]),
            num_input_tokens=1 if ending else len(self._token_ids),
            num_cached_tokens=0 if ending else self.num_cached,
        )
