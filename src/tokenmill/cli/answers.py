"""What the commands that generate say about an answer: fields for programs, figures for people, failure."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.output import Output
from tokenmill.core import Completion, TokenLogprobs, TokenmillError

if TYPE_CHECKING:
    from tokenmill.models.text.tokenizer import Tokenizer

__all__ = ["check_answers", "completion_fields", "logprob_table", "summary"]

_HEADER: Final = ("token", "log-prob", "likeliest")


def completion_fields(completion: Completion, tokenizer: "Tokenizer | None" = None) -> dict[str, Any]:
    """A completion as JSON fields: those that are set, without the engine's own request id.

    Log-probabilities need the tokenizer, which says the text of each token.
    """
    fields = dataclasses.asdict(completion)
    del fields["request_id"]
    for name in ("logprobs", "prompt_logprobs"):
        tokens: tuple[TokenLogprobs, ...] | None = getattr(completion, name)
        if tokens is not None and tokenizer is not None:
            fields[name] = [_logprob_fields(each, tokenizer) for each in tokens]
    return {name: value for name, value in fields.items() if value is not None and value != ""}


def logprob_table(out: Output, completion: Completion, tokenizer: "Tokenizer") -> None:
    """The log-probability of each token, and the likeliest tokens at its place."""
    rows = []
    for each in completion.logprobs or ():
        likeliest = ", ".join(f"{_shown(token, tokenizer)} {value:.3f}" for token, value in each.top)
        rows.append((_shown(each.token_id, tokenizer), f"{each.logprob:.4f}", likeliest))
    out.table(_HEADER, rows)


def summary(*completions: Completion) -> str:
    """One line of figures about the answers to one prompt."""
    usage = [each.usage for each in completions]
    num_output, num_drafted = sum(u.num_output_tokens for u in usage), sum(u.num_draft_tokens for u in usage)
    cached = f" ({usage[0].num_cached_tokens} from the cache)" if usage[0].num_cached_tokens else ""
    parts = [f"{usage[0].num_prompt_tokens} tokens in{cached}, {num_output} out"]
    first_s = min(each.ttft_s for each in completions)
    decode_s = max(each.total_s for each in completions) - first_s
    if num_output > len(completions) and decode_s > 0:
        parts.append(f"{(num_output - len(completions)) / decode_s:.0f} tokens/s")
    parts.append(f"first after {first_s * 1000:.0f} ms")
    if num_drafted:
        parts.append(f"{sum(u.num_accepted_tokens for u in usage)} of {num_drafted} guesses right")
    if any(each.finish_reason == "length" for each in completions):
        parts.append("ended by --max-tokens or the model's context")
    return f"[{', '.join(parts)}]"


def check_answers(completions: Iterable[Completion]) -> None:
    """Raise TokenmillError with the error of the first completion that failed."""
    for each in completions:
        if each.finish_reason == "failed":
            raise TokenmillError(f"the answer failed: {each.error}")


def _logprob_fields(each: TokenLogprobs, tokenizer: "Tokenizer") -> dict[str, Any]:
    top = [_token_fields(token_id, logprob, tokenizer) for token_id, logprob in each.top]
    return {**_token_fields(each.token_id, each.logprob, tokenizer), "top": top}


def _token_fields(token_id: int, logprob: float, tokenizer: "Tokenizer") -> dict[str, Any]:
    return {"token_id": token_id, "logprob": logprob, "text": _text(token_id, tokenizer)}


def _shown(token_id: int, tokenizer: "Tokenizer") -> str:
    """A token in quotes, on one line."""
    return repr(_text(token_id, tokenizer))


def _text(token_id: int, tokenizer: "Tokenizer") -> str:
    """The text of one token, control tokens by name; half a character is a replacement character."""
    return tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
