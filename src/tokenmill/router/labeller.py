"""What backends that answer with one label have in common: which calls they take, and what those cost."""

from collections.abc import Sequence

from tokenmill.core import Message, ResourceError, UsageError
from tokenmill.router.backend import BackendState, Embedded, Job, Prepared, cost_of_time
from tokenmill.wire import Call, FieldError, Prompt

__all__ = ["Labeller", "classified_text"]


def classified_text(messages: Sequence[Message]) -> str:
    """What is classified: the last message of the user. Raises UsageError without one."""
    text = next((each.content for each in reversed(messages) if each.role == "user" and each.content), None)
    if text is None:
        raise UsageError("there is no message of the user", hint="a classifier labels the last one")
    return text


class Labeller:
    """What the backends that answer with one label have in common; a label is their only token."""

    def __init__(self, name: str, *, usd_per_hour: float = 0.0) -> None:
        self._name = name
        self._usd_per_hour = usd_per_hour
        self._is_drained = False

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self._name

    @property
    def model(self) -> str:
        """The same."""
        return self._name

    @property
    def is_local(self) -> bool:
        """True."""
        return True

    @property
    def state(self) -> BackendState:
        """It takes calls until it is drained."""
        return "drained" if self._is_drained else "ready"

    async def prepare(self, call: Call) -> Prepared:
        """Check a call. Raises UsageError for one that a label is no answer to."""
        if call.tools:
            raise FieldError("tools", "are nothing that a label can call", hint="leave them out")
        if call.params.n != 1 or len(call.prompts) > 1:
            raise FieldError("n", "is more than one, and a text has one label", hint="ask once")
        if call.params.grammar is not None:
            raise FieldError("response_format", "is not kept by a label", hint="leave it out")
        self.text_of(call)
        return Prepared(call=call, num_prompt_tokens=0, max_output_tokens=1)

    def text_of(self, call: Call) -> str:
        """What is to be labelled. Raises UsageError if there is no such text."""
        if call.is_chat:
            return classified_text(call.messages)
        prompt = call.prompts[0]
        if not isinstance(prompt, str):
            raise FieldError("prompt", "is tokens, and a label is of a text", hint="give text")
        return prompt

    async def embed(self, texts: Sequence[Prompt], job: Job) -> Embedded:
        """Raises UsageError: it has no vectors."""
        raise UsageError(f"{self._name} has no embeddings", hint="ask a model that has")

    def cost_of(self, nanoseconds: int) -> int:
        """Nanodollars of so much time of this machine, rounded up."""
        return cost_of_time(nanoseconds, self._usd_per_hour)

    def check_open(self) -> None:
        """Raises ResourceError once drained."""
        if self._is_drained:
            raise ResourceError(f"{self._name} takes no more calls", hint="ask another deployment")
