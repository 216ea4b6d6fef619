"""`tokenmill optimize`: a workload in, the cheapest deployment that passes out."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.arguments import Subparsers, add_command, positive
from tokenmill.cli.machine import BUSY, busy_warning
from tokenmill.cli.output import Output
from tokenmill.core import UsageError

if TYPE_CHECKING:
    from tokenmill.models.store.directory import ModelDirectory
    from tokenmill.optimize import Machine, Outcome
    from tokenmill.optimize.defaults import Maker
    from tokenmill.optimize.plan import Plan
    from tokenmill.workload import Log, WorkloadConfig

__all__ = ["add_parser", "seconds"]

_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_YAML: Final = (".yaml", ".yml")
_DESCRIPTION = """\
Find the cheapest way to answer a workload that is as good as what answers it today, and prove it on rows that
nothing was chosen on.

WORKLOAD is a workload.yaml of `tokenmill init`, or a log, of which everything is guessed. The plan is shown
first, with what it is expected to take. A run that was interrupted goes on when it is called again, with the
same figures; nothing that was measured is measured twice.

The folder of --output gets report.html, report.json, certificate.json, deployment.yaml (for `tokenmill
serve`) and junit.xml. `tokenmill verify` checks it again, `tokenmill gate` turns it into an exit code.

  tokenmill optimize workload.yaml --budget 30m --output run
  tokenmill serve run/deployment.yaml
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `optimize`."""
    parser = add_command(
        subparsers,
        "optimize",
        _optimize,
        summary="the cheapest deployment that passes a workload's test",
        description=_DESCRIPTION,
    )
    parser.add_argument("workload", type=Path, metavar="WORKLOAD", help="a workload.yaml, or a log")
    parser.add_argument(
        "--budget",
        type=seconds,
        metavar="TIME",
        help="what the search may take, such as 90s, 30m or 2h (default: the workload's, else 30m)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="RUN",
        help="the run's folder (default: the workload's name with .run, where you are)",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="a local model to try, by name or path; again for several (default: all that are pulled)",
    )
    parser.add_argument(
        "--finalists",
        type=positive,
        default=5,
        metavar="N",
        help="how many are measured for the verdict at most, controls not counted (default: 5)",
    )
    parser.add_argument(
        "--watts",
        type=float,
        metavar="W",
        help="what the machine draws under load, where its energy cannot be measured; figures are estimates",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything drawn (default: 0)")
    parser.add_argument("--plan", action="store_true", help="show the plan, and do nothing")


def seconds(text: str) -> float:
    """`90s`, `30m`, `2h`, or plain seconds. Raises ArgumentTypeError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smh]?)", text.strip().lower(), flags=re.ASCII)
    value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 1.0 <= value <= 30 * 86400.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time from 1s to 720h")
    return value


def _optimize(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.optimize import OptimizeConfig, SearchConfig, optimize, problem_of
    from tokenmill.optimize.defaults import default_candidates
    from tokenmill.optimize.write import write_outcome
    from tokenmill.workload import split_rows

    if args.watts is not None and args.watts <= 0:
        raise UsageError(f"--watts is {args.watts:g}", hint="give watts above 0")
    config, log = _workload(args, out)
    problem = problem_of(config, log, split_rows(config, log))
    candidates = default_candidates(problem, _models(args.model, config), _trained())
    search = SearchConfig(max_finalists=args.finalists, seed=args.seed)
    settings = OptimizeConfig(budget_s=args.budget or config.budget_s, search=search)
    if args.plan:
        return _plan_only(problem, candidates, settings, out)
    folder: Path = args.output or Path(f"{_name(args.workload)}.run")
    machine, fields = _machine(problem.usd_per_hour, args.watts, out)
    with out.progress("call") as bar:
        outcome = optimize(
            problem,
            folder,
            candidates,
            machine,
            settings,
            say=_Sayer(out, bar),
            on_plan=lambda plan: _show_plan(plan, out),
        )
    document = write_outcome(outcome, folder, fields)
    _show(outcome, folder, out)
    out.document({**document, "folder": str(folder)})
    return 0


def _workload(args: argparse.Namespace, out: Output) -> "tuple[WorkloadConfig, Log]":
    """The configuration and the rows; a log without a file is guessed at, and what was guessed is said."""
    from tokenmill.workload import infer_log, read_rows, read_workload

    path: Path = args.workload
    with out.busy(f"reading {path}"):
        if path.suffix in _YAML:
            config = read_workload(path)
        else:
            guess = infer_log(path)
            config = guess.config
            for name, reason in guess.reasons.items():
                out.note(f"guessed {name}: {reason}")
        log = read_rows(config)
    if log.faults:
        out.warn(
            f"{len(log.faults)} lines make no call and are left out; the first is {log.faults[0]} "
            "(`tokenmill workload check` shows them)"
        )
    return config, log


def _name(path: Path) -> str:
    return path.resolve().parent.name if path.stem == "workload" else path.name.partition(".")[0]


def _models(names: Sequence[str], config: "WorkloadConfig") -> "list[ModelDirectory]":
    """The local models to try: those named, else all of the store, and an incumbent that is one."""
    from tokenmill.models.store.library import Library

    library = Library()
    wanted = list(dict.fromkeys(names)) or library.names()
    incumbent = config.incumbent
    if incumbent.kind == "model" and incumbent.name not in wanted:
        wanted.append(incumbent.name)
    return [library.find(name) for name in wanted]


def _trained() -> "Maker | None":
    """What trains candidates; None without torch."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        return None
    from tokenmill.optimize.trained import trained_candidates

    return trained_candidates


def _machine(usd_per_hour: float, watts: float | None, out: Output) -> "tuple[Machine, Mapping[str, Any]]":
    """The machine and how its energy is known, with what is said of it."""
    from tokenmill.costs import Unmeasured, find_counters
    from tokenmill.costs.energy import EnergyModel
    from tokenmill.kernels.probe import busy_share, read_hardware
    from tokenmill.optimize import Machine
    from tokenmill.optimize.documents import machine_fields

    hardware, busy = read_hardware(), busy_share()
    if busy > BUSY:
        out.warn(f"{busy_warning(busy, hardware.load_average)}; costs come out too high")
    counters = find_counters()
    machine = Machine(usd_per_hour=usd_per_hour)
    if not isinstance(counters, Unmeasured):
        machine = replace(machine, counters=counters, energy_note="energy counters of the processors")
    elif watts is not None:
        energy = EnergyModel(watts=watts, joules_per_flop=0.0, error=0.1, basis="--watts")
        machine = replace(machine, energy=energy, energy_note=f"{watts:g} W while it works, given")
    else:
        machine = replace(machine, energy_note=counters.why)
    return machine, machine_fields(asdict(hardware), busy=busy)


class _Sayer:
    """What is going on: a bar on a terminal, a line for each thing that begins elsewhere."""

    def __init__(self, out: Output, bar: Any) -> None:
        self._out = out
        self._bar = bar
        self._said = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._said:
            self._said = what
            if not self._out.stderr.isatty():
                self._out.note(what)
        self._bar(what, done, total)


def _plan_only(problem: Any, candidates: Any, settings: Any, out: Output) -> int:
    from tokenmill.optimize.candidate import Workshop
    from tokenmill.optimize.plan import plan_run
    from tokenmill.optimize.records import to_json

    workshop = Workshop(
        folder=Path(),
        train=problem.train,
        select=problem.select,
        labels=problem.labels,
        seed=settings.search.seed,
        usd_per_hour=problem.usd_per_hour,
        progress=lambda what, done, total: None,
    )
    plan = plan_run(
        problem,
        candidates,
        workshop,
        budget_s=settings.budget_s,
        max_finalists=settings.search.max_finalists,
    )
    _show_plan(plan, out, to_stdout=True)
    out.document({"plan": to_json(plan)})
    return 0


def _show_plan(plan: "Plan", out: Output, *, to_stdout: bool = False) -> None:
    """The plan for people: on standard output if it is the result, else as notes."""
    from tokenmill.cli.output import format_table
    from tokenmill.optimize.choice import usd

    rows = [
        [
            each.name,
            each.kind,
            f"{each.make_s:.0f}",
            f"{each.measure_s:.0f}",
            "" if each.is_tried else "no time",
        ]
        for each in plan.candidates
    ]
    say = out.text if to_stdout else out.note
    for line in format_table(["candidate", "kind", "make, s", "measure, s", ""], rows).splitlines():
        say(line)
    say(
        f"expected: about {plan.expected_s / 60:.1f} min of {plan.budget_s / 60:.0f}, "
        f"{usd(plan.expected_usd)} of this machine"
    )
    if plan.provable is None:
        say(f"{plan.num_certify} rows certify, which prove nothing: a longer log is needed")
    elif plan.provable > plan.margin:
        say(
            f"{plan.num_certify} rows certify: they can rule out a loss of {plan.provable:.3f} if a tenth of "
            f"the answers differ, and {plan.margin:g} is asked for; a verdict may stay undecided"
        )


def _show(outcome: "Outcome", folder: Path, out: Output) -> None:
    """The result for people."""
    from tokenmill.optimize.choice import usd_million

    rows = []
    for name, entry in outcome.entries.items():
        figures = entry.figures
        rows.append(
            [
                name,
                outcome.judged[name].outcome,
                f"{figures.quality.estimate or 0:.3f}",
                usd_million(figures.usd_per_pass.estimate),
                f"{figures.p99_ms.estimate or 0:.1f}",
                f"{figures.requests_per_s:.1f}",
            ]
        )
    cost = outcome.problem.incumbent_cost
    about = outcome.problem.about["incumbent"]
    certify = outcome.problem.certify
    quality = sum(case.score for case in certify) / len(certify)
    price = "unknown" if cost is None else usd_million(cost.estimate)
    rows.append([about["name"], "incumbent", f"{quality:.3f}", price, "-", "-"])
    out.table(["candidate", "verdict", "quality", "$ 1M passing", "p99, ms", "calls/s"], rows)
    for name, reason in sorted(outcome.choice.lost.items()):
        out.note(f"{name}: {reason}")
    out.text(outcome.choice.why)
    out.text(f"{folder / 'report.html'}, {folder / 'certificate.json'}")
    if outcome.winner is not None:
        out.text(f"tokenmill serve {folder / 'deployment.yaml'}")
