"""`tokenmill compare`: two runs of `tokenmill eval` on the same items, in pairs, with a verdict if asked."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.arguments import Subparsers, add_command, positive
from tokenmill.cli.output import Output

if TYPE_CHECKING:
    from tokenmill.evals.comparison import Comparison, Figures
    from tokenmill.evals.statistics import Interval, NoiseFloor, Verdict

__all__ = ["FAIL", "PASS", "UNDECIDED", "add_parser"]

PASS: Final = 0
FAIL: Final = 1
UNDECIDED: Final = 10
"""No error has this code, so that a folder that is not there (3) is not taken for an open question."""

_ANSWER_CHARS: Final = 100
_DESCRIPTION = """\
Compare two runs on the same items: each figure of both, their difference with its interval, the items that
only one of them has right, and how likely such a difference is by chance. A is the incumbent, B the
candidate, a difference is B less A.

With --margin there is a verdict: is B as good as A, but for what the margin allows? The exit code is 0 for
pass, 1 for fail, 10 for undecided; the last says how many more items are needed.

  tokenmill eval --model smollm2-135m --task mmlu --out a
  tokenmill eval --model smollm2-135m --weights w4a8 --task mmlu --out b
  tokenmill compare a/mmlu b/mmlu --margin 0.02
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `compare`."""
    parser = add_command(
        subparsers, "compare", _compare, summary="two results on the same items", description=_DESCRIPTION
    )
    parser.add_argument("first", type=Path, metavar="A", help="the incumbent: a folder of `eval --out`")
    parser.add_argument("second", type=Path, metavar="B", help="the candidate: another one")
    parser.add_argument("--metric", default="", metavar="NAME", help="the headline (default: the task's own)")
    parser.add_argument(
        "--margin", type=float, metavar="X", help="what B may lose, such as 0.02; asks for a verdict"
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, metavar="P", help="of intervals and verdict (default: 0.95)"
    )
    parser.add_argument(
        "--candidates",
        type=positive,
        default=1,
        metavar="N",
        help="B is the one of N that were tried on these items (default: 1)",
    )
    parser.add_argument("--noise", type=Path, metavar="A2", help="a second run of A, to see how it repeats")
    parser.add_argument(
        "--examples",
        type=positive,
        default=3,
        metavar="N",
        help="items to show of each direction (default: 3)",
    )


def _compare(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.evals.comparison import compare, judge, noise_between, read_run

    first, second = read_run(args.first), read_run(args.second)
    found = compare(first, second, metric=args.metric, confidence=args.confidence)
    noise = None if args.noise is None else noise_between(found, read_run(args.noise))
    judged = None
    if args.margin is not None:
        judged = judge(found, margin=args.margin, num_candidates=args.candidates)
    _show(found, args.examples, out)
    if noise is not None:
        _show_noise(found, noise, out)
    if judged is not None:
        out.text(f"\n{judged.words}")
    document = found.to_json(args.examples)
    if noise is not None:
        document["noise"] = {"flips": noise.flips.to_json(), "size": noise.size.to_json()}
    out.document(document | ({} if judged is None else {"verdict": judged.to_json()}))
    return _code(judged)


def _code(judged: "Verdict | None") -> int:
    if judged is None or judged.outcome == "pass":
        return PASS
    return FAIL if judged.outcome == "fail" else UNDECIDED


def _show(found: "Comparison", num_examples: int, out: Output) -> None:
    first, second = found.first, found.second
    task = first.result
    out.text(f"{task['task']} {task['version']}, {len(first.items)} items")
    out.text(f"A: {_about(task)}\nB: {_about(second.result)}\n")
    level = f"{found.confidence:.4g}"
    header = ["metric", "A", "B", f"B - A ({level})", "B better", "A better", "p"]
    out.table(header, [[each.metric, *_cells(each), f"{each.p:.2g}"] for each in found.figures])
    if found.slices:
        rows = [
            [each.slice or "-", *_cells(each), f"{p:.2g}"]
            for each, p in zip(found.slices, found.slice_p, strict=True)
        ]
        out.text(f"\n{found.metric} by slice; p is corrected for {len(rows)} slices")
        out.table(["slice", *header[1:]], rows)
    for title, ids in (("B is better", found.won), ("A is better", found.lost)):
        if ids:
            out.text(f"\n{title} in {len(ids)} items, the first {min(num_examples, len(ids))}:")
            out.text("\n".join(_examples(found, ids[:num_examples])))
    if found.unanswered:
        out.warn(f"{len(found.unanswered)} items were not answered by both and are in no figure")


def _about(result: Any) -> str:
    """The model in one line: its name and what else is known about it."""
    model = dict(result.get("model") or {})
    name = model.pop("name", "?")
    digest = str(model.pop("digest", ""))[:12]
    rest = [f"{key} {value}" for key, value in model.items()] + ([digest] if digest else [])
    return ", ".join([str(name), *rest])


def _cells(each: "Figures") -> list[str]:
    difference = (
        f"{each.difference.estimate:+.4f} [{_end(each.difference.low)}, {_end(each.difference.high)}]"
    )
    return [_plain(each.first), _plain(each.second), difference, str(each.wins), str(each.losses)]


def _plain(interval: "Interval") -> str:
    return f"{interval.estimate:.4f}"


def _end(value: float) -> str:
    return f"{value:+.4f}"


def _examples(found: "Comparison", ids: Any) -> Iterator[str]:
    for id in ids:
        example = found.example(id)
        yield f"  {id}"
        for letter, key in (("A", "first"), ("B", "second")):
            text = json.dumps(_rounded(example[key]), ensure_ascii=False)
            yield f"    {letter}: {text if len(text) <= _ANSWER_CHARS else text[: _ANSWER_CHARS - 3] + '...'}"


def _rounded(value: Any) -> Any:
    """Log-probabilities as people read them."""
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value


def _show_noise(found: "Comparison", noise: "NoiseFloor", out: Output) -> None:
    """How the first run repeats, beside how far the second is."""
    headline = found.headline
    share = (headline.wins + headline.losses) / headline.num_items
    out.text(
        f"\nnoise floor: A against itself changes {noise.flips.estimate:.2%} of the items "
        f"[{noise.flips.low:.2%}, {noise.flips.high:.2%}]; B changes {share:.2%}"
    )
