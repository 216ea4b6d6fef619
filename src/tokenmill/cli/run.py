"""`tokenmill run`: one prompt, one answer, streamed as it is made; or several answers."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenmill.cli.answers import check_answers, completion_fields, logprob_table, summary
from tokenmill.cli.arguments import (
    Subparsers,
    adapter_name,
    add_command,
    add_generator_flags,
    add_model_argument,
    expert_cache_fields,
    open_model,
    opened_llm,
    text_argument,
)
from tokenmill.cli.inputs import STDIN, read_stdin, stdin_is_terminal
from tokenmill.cli.output import Output
from tokenmill.cli.sampling import (
    add_grammar_flags,
    add_sampling_flags,
    grammar,
    reads_stdin,
    sampling_params,
)
from tokenmill.cli.tools import add_tools_flag, tools
from tokenmill.core import Completion, Message, SamplingParams, UsageError

if TYPE_CHECKING:
    from tokenmill.engine import LLM

__all__ = ["add_parser"]

_DESCRIPTION = """\
Answer one prompt. The model's chat template is applied if it has one; with --raw, and for a model without
a template, the text is continued as it is. A prompt that comes through a pipe loses one newline at its end.
With --n above 1 the answers are shown when all are done, and are `completions` in the JSON document.
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
    add_tools_flag(parser)
    default = SamplingParams()
    sampling = add_sampling_flags(parser)
    sampling.add_argument(
        "--n", type=int, default=default.n, metavar="N", help="answers to make (default: %(default)s)"
    )
    sampling.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="show the log-probability of each token, and the N likeliest",
    )
    add_grammar_flags(parser)
    add_generator_flags(parser)


def _run(args: argparse.Namespace, out: Output) -> int:
    if reads_stdin(args) and args.prompt in (None, STDIN):
        raise UsageError("standard input is the grammar", hint="give the prompt as an argument")
    params = sampling_params(args, grammar=grammar(args))
    prompt = _prompt(args.prompt)
    model = open_model(args.model)
    template = None if args.raw else model.chat_template()
    given_tools = tools(args, model)
    if template is not None:
        template.chosen(given_tools).start()  # it starts while the weights are loaded
    with opened_llm(model, args, out) as llm:
        asked = [Message(role="user", content=prompt)]
        ids = llm.encode(prompt) if template is None else llm.encode_chat(asked, given_tools)
        completions = _answers(llm, ids, params, adapter_name(args), out)
        weights, experts = llm.config.weights, expert_cache_fields(llm, out)
    tokenizer = None if params.logprobs is None else model.tokenizer()
    for completion in completions:
        if params.n > 1:
            out.text(f"--- {completion.index + 1} of {params.n}\n{completion.text}")
        if tokenizer is not None:
            logprob_table(out, completion, tokenizer)
    if out.stderr.isatty():
        out.note(summary(*completions))
    each = [completion_fields(completion, tokenizer) for completion in completions]
    what: dict[str, Any] = each[0] if params.n == 1 else {"completions": each}
    out.document(
        {"model": model.name, "weights": weights, "template": template is not None, **experts, **what}
    )
    check_answers(completions)
    return 0


def _answers(
    llm: "LLM", ids: Sequence[int], params: SamplingParams, adapter: str, out: Output
) -> list[Completion]:
    """One answer is written for people piece by piece, with a newline at its end; several are not."""
    if params.n > 1:
        return llm.generate_tokens([ids], params, adapter=adapter)
    ends_line = True
    try:
        for piece in llm.stream(ids, params, adapter=adapter):
            if isinstance(piece, Completion):
                return [piece]
            out.text(piece, end="")
            ends_line = piece.endswith("\n")
    finally:
        if not ends_line:
            out.text("")
    raise AssertionError("a stream ends with its completion")


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
