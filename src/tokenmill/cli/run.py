"""`tokenmill run`: one prompt, one answer, streamed as it is made."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from tokenmill.cli.arguments import (
    Subparsers,
    add_command,
    add_engine_flags,
    add_model_argument,
    add_sampling_flags,
    load_llm,
    open_model,
    sampling_params,
    text_argument,
)
from tokenmill.cli.inputs import STDIN, read_stdin, stdin_is_terminal
from tokenmill.cli.output import Output
from tokenmill.core import Completion, Message, SamplingParams, UsageError

if TYPE_CHECKING:
    from tokenmill.engine import LLM

__all__ = ["add_parser", "completion_fields", "stream_answer", "summary"]

_DESCRIPTION = """\
Answer one prompt. The model's chat template is applied if it has one; with --raw, and for a model without
a template, the text is continued as it is. A prompt that comes through a pipe loses one newline at its end.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `run`."""
    parser = add_command(subparsers, "run", _run, summary="answer a prompt", description=_DESCRIPTION)
    add_model_argument(parser)
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        type=text_argument,
        help="the prompt; `-`, or none with a pipe: standard input",
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without the chat template"
    )
    add_sampling_flags(parser)
    add_engine_flags(parser)


def stream_answer(llm: "LLM", prompt: str | list[int], params: SamplingParams, out: Output) -> Completion:
    """Write an answer for people piece by piece, with a newline at its end; returns the whole of it."""
    stream = llm.stream(prompt, params)
    ends_line = True
    try:
        for piece in stream:
            if isinstance(piece, Completion):
                return piece
            out.text(piece, end="")
            ends_line = piece.endswith("\n")
    finally:
        if not ends_line:
            out.text("")
    raise AssertionError("a stream ends with its completion")


def completion_fields(completion: Completion) -> dict[str, Any]:
    """A completion as JSON fields, without the engine's own request id."""
    fields = dataclasses.asdict(completion)
    del fields["request_id"]
    return fields


def summary(completion: Completion) -> str:
    """One line of figures about an answer."""
    usage = completion.usage
    parts = [f"{usage.num_prompt_tokens} tokens in, {usage.num_output_tokens} out"]
    decode_s = completion.total_s - completion.ttft_s
    if usage.num_output_tokens > 1 and decode_s > 0:
        parts.append(f"{(usage.num_output_tokens - 1) / decode_s:.0f} tokens/s")
    parts.append(f"first after {completion.ttft_s * 1000:.0f} ms")
    if completion.finish_reason == "length":
        parts.append("ended by --max-tokens or the model's context")
    return f"[{', '.join(parts)}]"


def _run(args: argparse.Namespace, out: Output) -> int:
    params = sampling_params(args)
    prompt = _prompt(args.prompt)
    model = open_model(args)
    llm = load_llm(model, args, out)
    is_raw = args.raw or model.chat_template() is None
    ids = prompt if is_raw else llm.encode_chat([Message(role="user", content=prompt)])
    completion = stream_answer(llm, ids, params, out)
    if out.stderr.isatty():
        out.note(summary(completion))
    out.document(
        {
            "model": model.name,
            "weights": llm.config.weights,
            "template": not is_raw,
            **completion_fields(completion),
        }
    )
    return 0


def _prompt(given: str | None) -> str:
    if given is not None and given != STDIN:
        prompt = given
    elif given is None and stdin_is_terminal():
        raise UsageError("no prompt", hint='give one: tokenmill run MODEL "prompt", or through a pipe')
    else:
        prompt = read_stdin().removesuffix("\n")
    if not prompt.strip():
        raise UsageError("the prompt is empty", hint="give at least one word")
    return prompt
