"""`tokenmill score`: how likely a text is to a model; perplexity in windows, as it is usually measured."""

import argparse
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.arguments import (
    Subparsers,
    add_command,
    add_engine_flags,
    add_model_argument,
    expert_cache_fields,
    open_model,
    opened_llm,
    positive,
    text_argument,
)
from tokenmill.cli.inputs import read_stdin, read_text_file, stdin_is_terminal
from tokenmill.cli.output import Output, ProgressBar
from tokenmill.core import Score, UsageError

if TYPE_CHECKING:
    from tokenmill.engine import Progress, ProgressCallback
    from tokenmill.engine.taps.routing import RoutingStats

__all__ = ["DEFAULT_WINDOW", "add_parser"]

DEFAULT_WINDOW: Final = 2048

_DESCRIPTION = """\
Log-probability and perplexity of a text. It is cut into windows that do not overlap, each read on its own;
nothing is put in front of a window, so its first token is not scored. With --context the text is scored in
one piece, as the continuation of that context.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `score`."""
    parser = add_command(
        subparsers, "score", _score, summary="perplexity of a text", description=_DESCRIPTION
    )
    add_model_argument(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--file", type=Path, metavar="F", help="a text file, may be .gz; `-`: standard input")
    source.add_argument("--text", type=text_argument, metavar="T", help="the text itself")
    parser.add_argument(
        "--context", type=text_argument, metavar="C", help="score the text as what follows this"
    )
    parser.add_argument(
        "--window",
        type=positive,
        metavar="N",
        help=f"tokens in a window (default: {DEFAULT_WINDOW}, or the model's context if that is less)",
    )
    parser.add_argument(
        "--windows", type=positive, metavar="N", help="score the first N windows (default: all)"
    )
    parser.add_argument(
        "--routing", action="store_true", help="also how the tokens are shared among a mixture's experts"
    )
    add_engine_flags(parser)


def _score(args: argparse.Namespace, out: Output) -> int:
    if args.context is not None and (args.window or args.windows or args.routing):
        raise UsageError("--context goes with no windows", hint="leave out --window, --windows and --routing")
    text = _text(args)
    model = open_model(args.model)
    with opened_llm(model, args, out) as llm:
        if args.context is not None:
            scores = llm.score([args.context], [text])
            num_tokens = len(scores[0].logprobs)
        else:
            window = args.window or min(DEFAULT_WINDOW, llm.context_length)
            tokens = llm.encode(text)
            tokens = tokens[: args.windows * window] if args.windows else tokens
            num_tokens = len(tokens)
            with out.progress("tok") as bar:
                scores = llm.score_tokens(tokens, window=window, on_progress=_drawer(bar, num_tokens))
        about = {"model": model.name, "weights": llm.config.weights, "num_tokens": num_tokens}
        about |= expert_cache_fields(llm, out)
        if args.routing:
            windows = [tokens[at : at + window] for at in range(0, len(tokens), window)]
            about["routing"] = _routing(out, llm.routing(windows))
    _report(out, about, scores)
    return 0


def _routing(out: Output, layers: "Mapping[int, RoutingStats]") -> dict[str, Any]:
    """Who is sent where, as a table of layers and for the document."""
    cells = [
        [
            str(layer),
            f"{stats.entropy:.3f}",
            f"{stats.load_X.max():.1%}",
            str(stats.num_idle),
            f"{stats.max_violation:.2f}",
        ]
        for layer, stats in layers.items()
    ]
    out.table(["layer", "entropy of load", "busiest expert", "idle experts", "MaxVio"], cells)
    return {str(layer): stats.to_json() for layer, stats in layers.items()}


def _text(args: argparse.Namespace) -> str:
    if args.text is not None:
        text = str(args.text)
    elif args.file is not None:
        text = read_text_file(args.file)
    elif stdin_is_terminal():
        raise UsageError("no text", hint="give --file F, --text T, or text through a pipe")
    else:
        text = read_stdin()
    if not text:
        raise UsageError("the text is empty", hint="give a text of at least two tokens")
    return text


def _drawer(bar: ProgressBar, num_tokens: int) -> "ProgressCallback":
    """What draws the steps of the engine as a bar over tokens."""
    num_done = 0

    def draw(progress: "Progress") -> None:
        nonlocal num_done
        num_done += progress.step.num_rows
        bar("score", min(num_done, num_tokens), num_tokens)

    return draw


def _report(out: Output, about: dict[str, Any], scores: Sequence[Score]) -> None:
    """Table and document. Raises UsageError if nothing was scored."""
    whole = Score(
        token_ids=tuple(chain.from_iterable(score.token_ids for score in scores)),
        logprobs=tuple(chain.from_iterable(score.logprobs for score in scores)),
    )
    fields = _fields(whole)
    windows = [_fields(score) for score in scores]
    if len(windows) > 1:
        cells = [
            [str(at), *(_cell(entry[name]) for name in ("num_scored", "logprob", "perplexity"))]
            for at, entry in enumerate(windows, start=1)
        ]
        out.table(["window", "scored", "log-prob", "perplexity"], cells)
    out.text(
        f"perplexity {fields['perplexity']:.4f}, log-probability {fields['logprob']:.2f}, "
        f"{about['num_tokens']} tokens, {fields['num_scored']} scored ({about['model']}, {about['weights']})"
    )
    out.document({**about, **fields, "windows": windows})


def _fields(score: Score) -> dict[str, Any]:
    return {"num_scored": len(score.logprobs), "logprob": score.total, "perplexity": score.perplexity}


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
