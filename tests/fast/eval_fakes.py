"""Small models for tests of evaluation: what they answer is written down."""

from collections.abc import Callable, Sequence

from tokenmill.core import Completion, Message, SamplingParams, Score, Usage, UsageError

__all__ = ["FakeModel", "completion"]


def completion(text: str, *, error: str = "", num_prompt: int = 10, num_cached: int = 0) -> Completion:
    """An answer."""
    return Completion(
        request_id="r",
        text=text,
        token_ids=tuple(range(len(text))),
        finish_reason="failed" if error else "completed",
        usage=Usage(num_prompt_tokens=num_prompt, num_cached_tokens=num_cached, num_output_tokens=len(text)),
        ttft_s=0.0,
        total_s=0.0,
        error=error,
    )


class FakeModel:
    """Writes what `say` says, scores a continuation with `weigh`, a token a character.

    A text that holds `refuses` is refused; calls are counted in `num_calls`. After `dies_after` calls a call
    ends as if somebody pressed Ctrl-C.
    """

    def __init__(
        self,
        say: Callable[[str], str] = lambda prompt: "",
        weigh: Callable[[str, str], float] = lambda context, continuation: -1.0,
        *,
        refuses: str = "",
        dies_after: int | None = None,
    ) -> None:
        self._say = say
        self._weigh = weigh
        self._refuses = refuses
        self._dies_after = dies_after
        self.num_calls = 0
        self.params: list[SamplingParams] = []

    def generate(
        self, prompts: Sequence[str], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        self._count(prompts)
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        self.params += each
        return [completion(self._say(p)) for p, one in zip(prompts, each, strict=True) for _ in range(one.n)]

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[Completion]:
        return self.generate([str(turns[-1].content) for turns in conversations], params)

    def score(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[Score]:
        self._count([a + b for a, b in zip(contexts, continuations, strict=True)])
        return [
            Score(token_ids=(1,), logprobs=(self._weigh(a, b),), num_input_tokens=len(a), num_cached_tokens=1)
            for a, b in zip(contexts, continuations, strict=True)
        ]

    def score_text(self, text: str, *, window: int) -> list[Score]:
        self._count([text])
        windows = [text[at : at + window] for at in range(0, len(text), window)]
        return [
            Score(token_ids=(1,) * (len(each) - 1), logprobs=(self._weigh("", each),) * (len(each) - 1))
            for each in windows
        ]

    def _count(self, texts: Sequence[str]) -> None:
        self.num_calls += 1
        if self._dies_after is not None and self.num_calls > self._dies_after:
            raise KeyboardInterrupt
        if self._refuses and any(self._refuses in text for text in texts):
            raise UsageError("a text is refused", hint="leave it out")
