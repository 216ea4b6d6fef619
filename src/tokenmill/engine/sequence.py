"""The state of one request while the engine works on it.

A sequence is a list of tokens of which the first `num_computed` have keys and values in the cache. The
engine knows no phases: a step computes some of the missing tokens, and `num_computed` catches up with
`num_total`. Generating and scoring differ only in what happens to the logits. Nothing here decides
anything: the scheduler moves blocks and counts, the engine appends tokens.
"""

from array import array
from collections.abc import Iterable
from typing import ClassVar

from tokenmill.core import Completion, FinishReason, Request, Score, Usage
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.taps import Tap
from tokenmill.kernels import KV_BLOCK
from tokenmill.kvcache import BlockTable

__all__ = ["GenerationState", "ScoringState", "SequenceState"]


class SequenceState:
    """Tokens, how many of them are computed, and the blocks that hold them.

    `arrival` is set at submission and orders sequences: earlier is served first and preempted last.
    `max_computed` bounds `num_computed` over the whole life.
    """

    samples: ClassVar[bool]
    """True if the last row is sampled, and so needs a place among the step's `max_out_rows`."""

    wants_logits: ClassVar[bool] = True
    """False if the rows from `first_logits` on are wanted as the final norm gives them, without logits."""

    def __init__(self, request_id: str, tokens: Iterable[int], max_computed: int) -> None:
        self.request_id = request_id
        self.tokens = array("i", tokens)
        self.max_computed = max_computed
        self.num_computed = 0
        self.num_preemptions = 0
        self.arrival = -1
        self.taps: tuple[Tap, ...] = ()
        # Reads have had the positions before this one.
        self.num_tapped = 0
        self.table = BlockTable(KV_BLOCK)

    @property
    def num_total(self) -> int:
        """Tokens known so far: the prompt and what was sampled."""
        return len(self.tokens)

    @property
    def first_logits(self) -> int:
        """The first position whose logits are still wanted."""
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        """True if the sequence needs no further step."""
        raise NotImplementedError


class GenerationState(SequenceState):
    """A request whose continuation is sampled.

    `max_total` is the number of tokens, prompt included, at which it ends with reason `length`. Times
    are seconds of the engine's clock.
    """

    samples = True

    def __init__(
        self, request: Request, *, seed: int, max_total: int, detokenizer: Detokenizer, submitted_s: float
    ) -> None:
        assert 0 < len(request.prompt) < max_total, "a prompt is not empty and leaves room for one token"
        # The last token sampled is never computed: nothing follows it.
        super().__init__(request.request_id, request.prompt, max_total - 1)
        self.params = request.params
        self.num_prompt = len(request.prompt)
        self.seed = seed
        self.max_total = max_total
        self.detokenizer = detokenizer
        self.finish_reason: FinishReason | None = None
        self.submitted_s = submitted_s
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self._pieces: list[str] = []
        self._num_taken = 0

    @property
    def first_logits(self) -> int:
        """The last position: its logits choose the next token."""
        return self.num_total - 1

    @property
    def finished(self) -> bool:
        """True once there is a finish reason."""
        return self.finish_reason is not None

    def append(self, token_id: int, *, is_eos: bool, now_s: float) -> None:
        """Take a sampled token; it may end the sequence. The text of an end token is not shown."""
        assert not self.finished, f"{self.request_id} goes on after its end"
        self.tokens.append(token_id)
        if self.first_token_s is None:
            self.first_token_s = now_s
        if is_eos and not self.params.ignore_eos:
            self.finish("completed", now_s=now_s)
            return
        piece = self.detokenizer.push(token_id)
        self._pieces.append(piece.text)
        if piece.stopped:
            self.finish("stopped", now_s=now_s)
        elif self.num_total == self.max_total:
            self.finish("length", now_s=now_s)

    def finish(self, reason: FinishReason, *, now_s: float) -> None:
        """Write the one terminal state, and release text that waited for a possible stop string."""
        assert self.finish_reason is None, f"{self.request_id} ends twice"
        self._pieces.append(self.detokenizer.finish())
        self.finish_reason = reason
        self.finished_s = now_s

    def take_text(self) -> str:
        """Text that was not taken before."""
        text = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return text

    def completion(self) -> Completion:
        """What the request ended with."""
        assert self.finish_reason is not None and self.finished_s is not None
        first_s = self.finished_s if self.first_token_s is None else self.first_token_s
        sampled = tuple(self.tokens[self.num_prompt :])
        return Completion(
            request_id=self.request_id,
            text="".join(self._pieces),
            token_ids=sampled,
            finish_reason=self.finish_reason,
            usage=Usage(
                num_prompt_tokens=self.num_prompt, num_cached_tokens=0, num_output_tokens=len(sampled)
            ),
            ttft_s=first_s - self.submitted_s,
            total_s=self.finished_s - self.submitted_s,
        )


class ScoringState(SequenceState):
    """A given text of which the tokens from `num_context` on are scored; `num_context` is at least 1."""

    samples = False

    def __init__(self, request_id: str, token_ids: Iterable[int], num_context: int) -> None:
        self._token_ids = tuple(token_ids)
        assert 0 < num_context < len(self._token_ids), "there is a first token and one to score"
        # The last token is only a target: nothing is computed from it.
        super().__init__(request_id, self._token_ids[:-1], len(self._token_ids) - 1)
        self.num_context = num_context
        self._logprobs: list[float] = []

    @property
    def first_logits(self) -> int:
        """The position before the first token not scored yet; after a preemption no row is scored twice."""
        return self.num_context - 1 + len(self._logprobs)

    @property
    def finished(self) -> bool:
        """True once every token is scored."""
        return self.first_logits == self.num_total

    def target(self, position: int) -> int:
        """The token that the logits at this position are to be scored on."""
        return self._token_ids[position + 1]

    def append(self, position: int, logprob: float) -> None:
        """Take the log-probability of the token after this position; positions come in order."""
        assert position == self.first_logits, f"{self.request_id} scores position {position} out of order"
        self._logprobs.append(logprob)

    def score(self) -> Score:
        """The scored tokens and their log-probabilities."""
        return Score(token_ids=self._token_ids[self.num_context :], logprobs=tuple(self._logprobs))
