"""A backend with more told to it: messages in front of every conversation, and a grammar for its answers.

What was measured with examples in the prompt is served with them, and clients send what they always sent: the
answer is drawn as it was when it was measured, at the temperature named here, and no longer than that. A
grammar holds only where the call brings none and has no tools.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenmill.core import Grammar, Message, UsageError
from tokenmill.router.backend import Attempt, Backend, BackendState, Embedded, Job, Prepared
from tokenmill.wire import Call, FieldError, Prompt

__all__ = ["PromptedBackend", "PromptedConfig", "Turn"]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A message that stands in front: `role` is system, user or assistant."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ("system", "user", "assistant"):
            raise UsageError(f"role is {self.role[:40]!r}", hint="use system, user or assistant")


@dataclass(frozen=True, kw_only=True)
class PromptedConfig:
    """`name` is what clients ask for, `backend` the deployment that answers.

    `temperature` takes the place of every call's own; `max_tokens` bounds it.
    """

    name: str
    backend: str
    messages: tuple[Turn, ...] = ()
    grammar: Grammar | None = None
    temperature: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.backend or self.name == self.backend:
            raise UsageError("a prompted deployment needs a name of its own and a backend", hint="give both")


class PromptedBackend:
    """The inner backend under another name; it is not closed with this one."""

    def __init__(self, config: PromptedConfig, inner: Backend) -> None:
        self._config = config
        self._inner = inner
        self._messages = tuple(Message(role=each.role, content=each.content) for each in config.messages)

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self._config.name

    @property
    def model(self) -> str:
        """The model that answers."""
        return self._inner.model

    @property
    def is_local(self) -> bool:
        """As the inner one."""
        return self._inner.is_local

    @property
    def state(self) -> BackendState:
        """As the inner one."""
        return self._inner.state

    def told(self, call: Call) -> Call:
        """The call as the inner backend gets it. Raises FieldError for a prompt that is no conversation."""
        if not call.is_chat:
            raise FieldError("prompt", "is no conversation, and this deployment answers those", hint="chat")
        params = call.params
        if self._config.temperature is not None:
            params = replace(params, temperature=self._config.temperature)
        if self._config.max_tokens is not None:
            params = replace(params, max_tokens=min(params.max_tokens, self._config.max_tokens))
        if self._config.grammar is not None and params.grammar is None and not call.tools:
            params = replace(params, grammar=self._config.grammar)
        return replace(call, messages=_joined(self._messages, call.messages), params=params)

    async def prepare(self, call: Call) -> Prepared:
        """As the inner one, for the longer conversation."""
        return await self._inner.prepare(self.told(call))

    def start(self, prepared: Prepared, job: Job) -> Attempt:
        """As the inner one."""
        return self._inner.start(prepared, job)

    async def embed(self, texts: Sequence[Prompt], job: Job) -> Embedded:
        """As the inner one."""
        return await self._inner.embed(texts, job)

    async def drain(self, deadline_s: float) -> None:
        """Nothing is open here that the inner one does not know."""

    async def close(self) -> None:
        """As `drain`."""


def _joined(first: tuple[Message, ...], call: tuple[Message, ...]) -> tuple[Message, ...]:
    """Both, with the call's own system message in front of all: templates want it there."""
    if call and call[0].role == "system" and first:
        return (call[0], *(each for each in first if each.role != "system"), *call[1:])
    return (*first, *call)
