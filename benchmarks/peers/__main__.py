"""The comparison from the command line: `python -m benchmarks.peers`; `make bench` calls it."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from benchmarks.peers.child import Child
from benchmarks.peers.compare import Measured, Plan, Stage, compare, num_pieces
from benchmarks.peers.environments import ENVIRONMENTS, NotPrepared, prepare
from benchmarks.peers.quality import Kept, read_text, windows
from benchmarks.peers.systems import ROWS, SYSTEMS, Isa, Row, System, for_isa
from benchmarks.peers.table import Report, document, fill, table
from tokenmill.cli.machine import Machine, machine_fields
from tokenmill.core import TokenmillError
from tokenmill.engine.bench import machine_rates
from tokenmill.kernels import default_threads
from tokenmill.kernels.probe import busy_share, measure_machine, read_hardware
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.export import export_gguf
from tokenmill.models.store.library import Library

_ROOT = Path(__file__).parents[2]
_BUILD = _ROOT / "build" / "peers"
_TEXT = _ROOT.parent / "shared" / "data" / "wikitext2" / "wiki.test.tokens.txt.gz"
_WINDOW = 2048


def main(argv: Sequence[str]) -> int:
    """Prepare, measure, print; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.isa:
        os.environ["TOKENMILL_ISA"] = args.isa
    systems = for_isa(_chosen(args.systems, SYSTEMS), args.isa)
    rows = _chosen(args.rows, ROWS)
    if not systems:
        raise SystemExit(f"none of these systems can be held to {args.isa}")
    if args.page:
        fill(
            args.page.read_text(encoding="utf-8"), ""
        )  # a page without marks is refused before the measuring, not after
    ready = _prepared(systems)
    if args.prepare:
        return 1 if any(isinstance(found, NotPrepared) for found in ready.values()) else 0
    try:
        report = _report(args, systems, rows, ready)
    except TokenmillError as error:
        raise SystemExit(str(error)) from None
    text = table(report)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document(report), indent=1) + "\n", encoding="utf-8")
    if args.page:
        args.page.write_text(fill(args.page.read_text(encoding="utf-8"), text), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="a pulled model, or its folder (default: smollm2-135m)")
    add("--systems", type=_names([each.key for each in SYSTEMS]), metavar="LIST", help="some, with commas")
    add("--rows", type=_names([each.key for each in ROWS]), metavar="LIST", help="some, with commas")
    add("--rounds", type=_positive, default=3, metavar="N", help="measured rounds (default: 3)")
    add("--threads", type=_positive, default=default_threads(), metavar="N", help="of every system")
    add("--isa", choices=get_args(Isa), help="hold tokenmill and llama.cpp to an instruction set")
    add("--text", type=Path, metavar="FILE", help="text to measure perplexity on, plain or .gz")
    add("--windows", type=_number, default=16, metavar="N", help="of 2048 tokens each; 0: no perplexity")
    add("--json", type=Path, metavar="FILE", help="also write every figure here")
    add("--page", type=Path, metavar="FILE", help="also write the table between the marks of this page")
    add("--prepare", action="store_true", help="only make the environments of the peers")
    return parser


def _report(
    args: argparse.Namespace,
    systems: Sequence[System],
    rows: Sequence[Row],
    ready: Mapping[str, Path | NotPrepared],
) -> Report:
    model = Library().find(args.model)
    scored = _text_windows(model, args.text, args.windows)
    _say("measuring the limits of the machine")
    busy = busy_share()
    limits = measure_machine(num_threads=args.threads)
    machine = machine_fields(Machine(limits=limits, hardware=read_hardware(), busy=busy))
    size = model.architecture.vocab_size
    plan = Plan(
        rows=rows,
        rounds=args.rounds,
        threads=args.threads,
        windows=scored,
        vocabulary=range(size // 4, max(size // 2, size // 4 + 1)),
    )
    results = _compared(systems, plan, model, ready, args.isa or "")
    return Report(
        model=model.name,
        day=datetime.now(UTC).date().isoformat(),
        machine=machine,
        rates=machine_rates(limits),
        rows=rows,
        rounds=args.rounds,
        num_scored=sum(len(window) - 1 for window in scored),
        results=results,
    )


def _compared(
    systems: Sequence[System],
    plan: Plan,
    model: ModelDirectory,
    ready: Mapping[str, Path | NotPrepared],
    isa: str,
) -> list[Measured]:
    with tqdm(total=num_pieces(systems, plan), disable=None, unit="piece") as bar:

        def say(text: str) -> None:
            bar.set_description_str(text, refresh=False)
            bar.update()

        stage = Stage(
            model=lambda system: _source(model, system),
            open=lambda system: _open(system, ready, plan.threads),
            kept=Kept(_BUILD / "perplexity.json"),
            context=(model.digest, isa),
            say=say,
        )
        return compare(systems, plan, stage)


def _prepared(systems: Sequence[System]) -> dict[str, Path | NotPrepared]:
    """The Python of every environment that is needed, or why there is none."""
    ready: dict[str, Path | NotPrepared] = {"": Path(sys.executable)}
    for name in dict.fromkeys(system.environment for system in systems if not system.is_own):
        try:
            ready[name] = prepare(ENVIRONMENTS[name], _BUILD, _say)
        except NotPrepared as fault:
            _say(f"{name}: {fault}")
            ready[name] = fault
    return ready


def _open(system: System, ready: Mapping[str, Path | NotPrepared], threads: int) -> Child:
    python = ready[system.environment]
    if isinstance(python, NotPrepared):
        raise python
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if not system.is_own:
        variables.pop("PYTHONPATH", None)
    command = [str(python), "-m", f"benchmarks.peers.runners.{system.runner}"]
    return Child(command, _BUILD / "logs" / f"{system.key}.log", cwd=_ROOT, env=variables)


def _source(model: ModelDirectory, system: System) -> str:
    """The path that a system reads; a GGUF file is made once."""
    if system.source == "directory":
        return str(model.path)
    if system.source == "model.gguf":
        path = model.path / "model.gguf"
        if not path.is_file():
            raise NotPrepared(f"{model.name} was not pulled as a GGUF file")
        return str(path)
    path = _BUILD / "models" / f"{model.digest[:16]}-{system.source}.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        export_gguf(model, path, system.source)
    return str(path)


def _text_windows(model: ModelDirectory, given: Path | None, most: int) -> list[list[int]]:
    if most == 0:
        return []
    path = given or _TEXT
    if given is None and not path.is_file():
        _say("no perplexity: the text of WikiText-2 is not here; give one with --text")
        return []
    try:
        text = read_text(path)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} cannot be read: {error}; give a text in UTF-8, plain or .gz") from None
    return windows(model.tokenizer().encode(text), _WINDOW, most)


def _chosen(keys: Sequence[str] | None, each: Sequence[Any]) -> list[Any]:
    return [one for one in each if keys is None or one.key in keys]


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of a flag that takes some of these names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {','.join(known)}")
        return names

    return parse


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def _positive(text: str) -> int:
    if _number(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return int(text)


def _say(text: str) -> None:
    print(f"peers: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
