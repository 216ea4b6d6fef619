"""Line S12: Schemathesis against a running server: every route of its own OpenAPI document, in all phases.

    python -m benchmarks.reliability.s12 --examples 500 --seed 1
    python -m benchmarks.reliability.s12 --examples 50 --guard off

The server is `tokenmill serve` on a mock. Phases: examples, coverage (each bound and type of each field),
fuzzing with valid and invalid data, stateful. A violation is a status of 500 or above, an answer that its
schema or its documented statuses do not allow, invalid data that was taken, or an operation that was never
called. A health probe that answers `no` (503) is none. Valid data may be refused with a 400 by rules that no
schema says (a choice of a tool that is not there): how much was answered is counted, `accepted` of `valid`.
With `--guard off` temperature, penalties, biases and the length of a page have no bounds: Schemathesis must
find a 5xx.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.reliability.server import deployment, running
from scripts.scorecard import Line
from scripts.scorecard.__main__ import as_json, as_text

__all__ = ["Found", "main", "read_events", "run"]

_UNGUARDED: Final = """\
from tokenmill.core import SamplingParams
from tokenmill.server import openai_batches

SamplingParams._check_distribution = lambda self: None
openai_batches.number_of = lambda request, name, default, most: int(request.query_params.get(name, default))
"""
"""What every process of the control's server does at its start."""
_MOCK: Final = {"context_length": 2048}
_SHOWN: Final = 8
_OPTIONS: Final = (
    "--mode=all", "--checks=all", "--exclude-checks=positive_data_acceptance", "--no-shrink",
    "--continue-on-failure", "--generation-database=none", "--report=ndjson", "--warnings=off",
    "--suppress-health-check=all",
)  # fmt: skip


@dataclass(kw_only=True)
class Found:
    """What a run's events say: requests by operation and phase, and what was wrong by kind."""

    phases: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    selected: int = 0
    valid: int = 0
    accepted: int = 0
    failed: int = 0
    finished: bool = False

    @property
    def num_skipped(self) -> int:
        """Operations that were never called, by coverage or fuzzing."""
        return self.selected - len(self.operations)


def read_events(path: Path) -> Found:
    """Count the events of a run."""
    found = Found()
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            ((kind, event),) = json.loads(line).items()
            if kind == "LoadingFinished":
                found.selected = event["statistic"]["operations"]["selected"]
            elif kind == "ScenarioFinished":
                _add(found, event)
            elif kind in ("NonFatalError", "FatalError"):
                found.wrong[f"{kind} {json.dumps(event)[:200]}"] += 1
            elif kind == "EngineFinished":
                found.finished = True
    return found


def _add(found: Found, event: Mapping[str, Any]) -> None:
    recorder, phase = event.get("recorder") or {}, event["phase"]
    for name, interaction in (recorder.get("interactions") or {}).items():
        response = interaction.get("response") or {}
        status = int(response.get("status_code", 0))
        found.phases[phase] += 1
        found.statuses[status] += 1
        label = _label(recorder, name)
        if phase in ("coverage", "fuzzing"):
            found.operations[str(recorder.get("label"))] += 1
        if _is_valid(recorder, name):
            found.valid += 1
            found.accepted += status == 200
        if (status >= 500 and not _is_health(label, status)) or status == 0:
            found.failed += 1
            found.wrong[f"{label}: status {status}"] += 1
    for name, checks in (recorder.get("checks") or {}).items():
        for check in checks:
            is_health = check["name"] == "not_a_server_error" and _is_health(_label(recorder, name), 503)
            if check["status"] != "success" and not is_health:
                found.wrong[f"{_label(recorder, name)}: {check['name']}: {_why(check)}"] += 1


def _is_health(label: str, status: int) -> bool:
    """A probe's `no` is a 503, which is an answer: its schema is held all the same."""
    return label.startswith("GET /health") and status == 503


def _label(recorder: Mapping[str, Any], name: str) -> str:
    """The operation of a case; a stateful scenario has several."""
    value = (recorder.get("cases") or {}).get(name, {}).get("value", {})
    if value.get("method") and value.get("path"):
        return f"{value['method']} {value['path']}"
    return str(recorder.get("label"))


def _is_valid(recorder: Mapping[str, Any], name: str) -> bool:
    meta = (recorder.get("cases") or {}).get(name, {}).get("value", {}).get("meta") or {}
    return bool((meta.get("generation") or {}).get("mode") == "positive")


def _why(check: Mapping[str, Any]) -> str:
    failure = check.get("failure_info") or check.get("failure") or {}
    inner = failure.get("failure", failure)
    return " ".join(str(inner.get("message") or inner.get("title") or "")[:120].split())


def run(
    examples: int, seed: int = 1, guard: bool = True, *, phases: str = "", path: str = "", most: int = 0
) -> Line:
    """Start a server, let Schemathesis loose on it, and count.

    `phases` and `path` are those that are tried (empty: all); it ends after `most` failures (0: never).
    """
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="s12-") as name:
        folder = Path(name)
        with running(deployment(mock=_MOCK), folder, env=_environment(folder, guard)) as server:
            events = folder / "events.ndjson"
            command = [*_tool(), server.url + "/openapi.json", f"--report-ndjson-path={events}"]
            command += [*_OPTIONS, f"--max-examples={examples}", f"--seed={seed}"]
            command += [f"--phases={phases}"] if phases else []
            command += [f"--include-path={path}"] if path else []
            command += [f"--max-failures={most}"] if most else []
            said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            is_alive = server.process.poll() is None
            errors = [] if is_alive and not said.returncode else _errors(server.log)
        found = read_events(events) if events.exists() else Found()
    if not found.finished:
        found.wrong[f"Schemathesis did not end: {said.stdout[-300:]}{said.stderr[-300:]}"] += 1
    if not is_alive:
        found.wrong["the server is gone"] += 1
    return _line(found, begun_s, errors)


def _errors(log: Path) -> list[str]:
    """The first errors that the server logged, refusals of probes aside."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        errors = [
            line.strip()[:2000] for line in lines if '"level":"info"' not in line and "/health/" not in line
        ]
    return errors[:_SHOWN]


def _line(found: Found, begun_s: float, errors: list[str]) -> Line:
    kinds = [f"{kind} ({number})" for kind, number in found.wrong.most_common(_SHOWN)]
    figures: dict[str, float | int | str] = {
        "operations": found.selected,
        "operations skipped": found.num_skipped,
        "status 500 and above": found.failed,
        "requests by phase": str(dict(found.phases)),
        "requests by status": str(dict(sorted(found.statuses.items()))),
        "valid": found.valid,
        "accepted": found.accepted,
        **{f"wrong {at}": kind for at, kind in enumerate(kinds, 1)},
        **({f"log {at}": text for at, text in enumerate(errors, 1)} if found.wrong else {}),
    }
    return Line(
        name="S12",
        what="requests of Schemathesis to every operation, valid and invalid, in all phases",
        cases=sum(found.phases.values()),
        violations=sum(found.wrong.values()) + found.num_skipped,
        seconds=time.monotonic() - begun_s,
        figures=figures,
    )


def _tool() -> Iterator[str]:
    yield from (str(Path(sys.executable).with_name("schemathesis")), "run")


def _environment(folder: Path, guard: bool) -> dict[str, str]:
    """The server's; for the control, without the guard."""
    if guard:
        return {}
    (folder / "sitecustomize.py").write_text(_UNGUARDED, encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))}


def main(arguments: list[str] | None = None) -> int:
    """Run and print; 0 if the guarded run found nothing, or the control a 5xx."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability.s12", description=__doc__)
    parser.add_argument(
        "--examples", type=int, default=500, help="of each operation and phase (default: 500)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--phases", default="", help="only these, with commas (default: all)")
    parser.add_argument("--path", default="", help="only this path (default: all)")
    parser.add_argument("--guard", choices=("on", "off"), default="on")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    guard = options.guard == "on"
    line = run(options.examples, options.seed, guard, phases=options.phases, path=options.path)
    print(as_json(line, options.seed, guard) if options.json else as_text(line, options.seed, guard))
    good = line.violations == 0 if guard else line.figures["status 500 and above"] != 0
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
