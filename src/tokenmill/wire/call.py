"""What a client asks for, in no API's shape: the value between a request's JSON and whoever answers it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from tokenmill.core import Message, SamplingParams, Tier, UsageError

__all__ = ["Api", "Call", "Prompt", "ToolChoice"]

Api: TypeAlias = Literal["openai", "anthropic"]
"""Whose shapes are spoken."""

Prompt: TypeAlias = str | tuple[int, ...]
"""A text to be continued: as text, or as tokens of the model."""


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """Whether the model may, must or must not call a function; `name` is the one that it must call.

    `parallel` is False where at most one call is wanted.
    """

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""
    parallel: bool = True

    def __post_init__(self) -> None:
        if (self.mode == "named") != bool(self.name):
            raise UsageError(f"tool_choice is {self.mode!r} with the name {self.name!r}", hint="name a tool")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request: a conversation to answer, or prompts to continue.

    `tools` are in the OpenAI shape. `include_usage` asks a stream for its token counts, `echo` for the prompt
    in front of its continuation (and its log-probabilities). `user` is the client's name for its own user,
    `variables` are for the chat template. Without a `tier` it is the one that the caller's key has first.
    """

    model: str
    messages: tuple[Message, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    params: SamplingParams = field(default_factory=SamplingParams)
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    tier: Tier | None = None
    user: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model:
            raise UsageError("model is empty", hint="name the model")
        if bool(self.messages) == bool(self.prompts):
            raise UsageError("a call has messages or prompts", hint="give one of the two")
        if self.prompts and self.tools:
            raise UsageError("tools are for conversations", hint="give messages instead of a prompt")
        if self.tool_choice.mode in ("required", "named") and not self.tools:
            raise UsageError(f"tool_choice is {self.tool_choice.mode} without tools", hint="give tools")

    @property
    def is_chat(self) -> bool:
        """Whether a conversation is to be answered."""
        return bool(self.messages)
