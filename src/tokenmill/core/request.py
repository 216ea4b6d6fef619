"""The nouns of a generation: message, request, usage, completion, score.

Plain frozen values. They know their own bounds and nothing about models, so that an engine, a remote
endpoint and a mock all take and return the same objects.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from tokenmill.core.errors import UsageError
from tokenmill.core.sampling import SamplingParams

__all__ = [
    "Completion",
    "FinishReason",
    "Message",
    "Request",
    "Score",
    "Tier",
    "TokenLogprobs",
    "ToolCall",
    "Usage",
]

FinishReason = Literal["completed", "stopped", "length", "cancelled", "failed", "expired"]
"""The six terminal states: an end token, a stop string or stop token, the token limit, a cancellation,
an error of this request (`Completion.error`), its deadline. A request reaches exactly one, once."""

Tier = Literal["fast", "standard", "batch"]
"""How urgent a request is. Earlier tiers go first; later ones age, so that nobody waits for ever."""

_MAX_NAME_CHARS: Final = 256
_MAX_TOOL_CALLS: Final = 128
_MAX_ARGUMENTS_CHARS: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A function that the model asked for: `arguments` is the text of a JSON object, `id` may be empty.

    Raises UsageError for a name or id that is too long, and for arguments that are no JSON object.
    """

    name: str
    arguments: str
    id: str = ""

    def __post_init__(self) -> None:
        _check_name("the name of a tool call", self.name)
        _check_name("the id of a tool call", self.id)
        if not self.name:
            raise UsageError("a tool call has no name", hint="name the function that was called")
        hint = 'give the text of a JSON object, like \'{"city": "Rome"}\''
        if not _is_text(self.arguments):
            kind = type(self.arguments).__name__
            raise UsageError(f"the arguments of the tool call {self.name!r} are {kind}, no text", hint=hint)
        if len(self.arguments) > _MAX_ARGUMENTS_CHARS:
            hint = f"at most {_MAX_ARGUMENTS_CHARS} characters"
            raise UsageError(f"the arguments of the tool call {self.name!r} are too long", hint=hint)
        try:
            is_object = isinstance(json.loads(self.arguments, parse_constant=_no_number), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise UsageError(f"the arguments of the tool call {self.name!r} are no JSON object", hint=hint)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation, in the OpenAI shape.

    `content` is text; None only where `tool_calls` stand in its place. A tool's result has the role
    `tool`, the `tool_call_id` of the call that it answers, and may `name` the function. Raises UsageError
    for anything else; images, audio and files are not supported.
    """

    role: str
    content: str | None = None
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""

    def __post_init__(self) -> None:
        _check_name("the role of a message", self.role)
        _check_name("the name of a message", self.name)
        _check_name("the tool_call_id of a message", self.tool_call_id)
        calls, content = self.tool_calls, self.content
        if not _are_tool_calls(calls):
            raise UsageError("tool_calls is no tuple of ToolCall", hint="give tuple[ToolCall, ...]")
        if len(calls) > _MAX_TOOL_CALLS:
            raise UsageError(f"a message has {len(calls)} tool calls", hint=f"at most {_MAX_TOOL_CALLS}")
        if calls and self.role != "assistant":
            raise UsageError(f"a message of the role {self.role!r} has tool calls", hint="only assistants do")
        if not (_is_text(content) or (content is None and calls)):
            raise UsageError(
                f"the content of a message is {type(content).__name__}, no text",
                hint="give one string: join text parts; images, audio and files are not supported",
            )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, as token ids, with its sampling parameters. `request_id` is unique in an engine.

    `tenant` separates prefix caches. `adapter` names a loaded adapter; empty is the plain model.
    `timeout_s` is the time from submission after which the request ends as `expired`, in seconds.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    tier: Tier = "standard"
    tenant: str = ""
    adapter: str = ""
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if self.tier not in get_args(Tier):
            raise UsageError(f"tier is {self.tier!r}", hint=f"use one of {', '.join(get_args(Tier))}")
        if self.timeout_s is not None and not 0.0 < self.timeout_s < math.inf:
            raise UsageError(f"timeout_s is {self.timeout_s}", hint="use seconds above 0, or none")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Exact token counts of one completion. Cached tokens are the part of the prompt found in the prefix
    cache; draft tokens were proposed by speculation, and those accepted are among the output.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def num_total_tokens(self) -> int:
        """Tokens in and out."""
        return self.num_prompt_tokens + self.num_output_tokens


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Natural log-probability of a token, and the most likely (token, log-probability) at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a request ended with: text, token ids, the reason, and the seconds it took.

    `index` counts the completions of one request (`n`). `ttft_s` is the time from submission to the first
    token, `total_s` to the last, in seconds. `logprobs` has one entry an output token, and
    `prompt_logprobs` one a prompt token but the first; both only if asked for. `error` says why a request
    `failed`. `tool_calls` are those that an endpoint read out of the answer; of local models they are text.
    `stop` is the stop string that ended it, if one did and it is known.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    ttft_s: float
    total_s: float
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    error: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    stop: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probabilities (natural logarithm) of a given text, one a scored token.

    `token_ids[i]` was scored as the continuation of everything before it; the first token of a text
    without a prefix has no log-probability and is not in the list. `num_input_tokens` were given to the model
    for it, of which `num_cached_tokens` were found in the prefix cache; what several scores of a call share
    is counted with one of them. Where nobody counts they are 0; they are no part of what is compared.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    num_input_tokens: int = field(default=0, compare=False)
    num_cached_tokens: int = field(default=0, compare=False)

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        if not self.logprobs:
            raise UsageError("nothing was scored", hint="give a text of at least two tokens")
        return math.exp(-self.total / len(self.logprobs))


def _check_name(what: str, value: object) -> None:
    if not isinstance(value, str) or len(value) > _MAX_NAME_CHARS:
        raise UsageError(
            f"{what} is {str(value)[:40]!r}", hint=f"use text of up to {_MAX_NAME_CHARS} characters"
        )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_tool_calls(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(each, ToolCall) for each in value)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
