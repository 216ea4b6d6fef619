"""Checks a finished run again: what can be recomputed is, and what does not hold is named.

The seal and the hashes of files; the rows from the log, split again; the verdicts, the costs and the choice
from the lines of certify; the winner's files. Answers are not asked again: that takes the machine, and
another run.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec

from tokenmill.core import NotFoundError, TokenmillError, UsageError
from tokenmill.evals.statistics import cost_per_pass
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.manifest import MANIFEST_NAME
from tokenmill.optimize.book import CERTIFY, MEASURED
from tokenmill.optimize.choice import choose
from tokenmill.optimize.classifier import file_digest
from tokenmill.optimize.documents import CERTIFICATE, REPORT, file_hash, seal
from tokenmill.optimize.problem import Problem, problem_of
from tokenmill.optimize.records import Figures, Item, Lost, Range, from_json
from tokenmill.optimize.verdict import Bar, Gate, Judged, judge_all
from tokenmill.optimize.write import WORKLOAD
from tokenmill.router.linear import CONFIG_NAME, NUMBERS_NAME
from tokenmill.runs import content_hash
from tokenmill.workload import WorkloadConfig, read_rows, split_rows

__all__ = ["Check", "CheckOutcome", "gate_outcome", "read_certificate", "verify"]

CheckOutcome: TypeAlias = Literal["holds", "does not hold", "not checked"]

_CLOSE: Final = 1e-9


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was checked, and in words what was found."""

    name: str
    outcome: CheckOutcome
    words: str


def read_certificate(folder: Path) -> dict[str, Any]:
    """The certificate of a run. Raises UsageError if there is none, or it is damaged."""
    path = folder / f"{CERTIFICATE}.json"
    if not path.is_file():
        unfinished = (folder / "run.json").is_file()
        hint = (
            "go on with it: tokenmill optimize ... --output" if unfinished else "give a folder of `optimize`"
        )
        what = "is not finished: it has" if unfinished else "has"
        raise UsageError(f"{folder} {what} no {path.name}", hint=hint)
    return _read(path)


def gate_outcome(certificate: Mapping[str, Any]) -> str:
    """pass, fail or undecided. Raises UsageError for a certificate whose seal is broken."""
    if certificate.get("seal") != seal(certificate):
        raise UsageError("the certificate was changed after it was made", hint="tokenmill verify says more")
    return str(certificate["verdict"])


def verify(folder: Path) -> list[Check]:
    """Every check, in the order in which one rests on the other. Raises UsageError without a certificate."""
    certificate = read_certificate(folder)
    checks = [_sealed(certificate), *_files(folder, certificate)]
    problem, found = _workload(folder, certificate)
    checks += found
    checks += _guarded("verdicts", lambda: _recomputed(folder, certificate, problem))
    checks += _guarded("the winner's files", lambda: [_artefact(folder, certificate)])
    return checks


def _guarded(name: str, check: Callable[[], list[Check]]) -> list[Check]:
    """What cannot even be read does not hold."""
    try:
        return check()
    except TokenmillError as error:
        return [Check(name=name, outcome="does not hold", words=str(error))]
    except (KeyError, TypeError, AttributeError) as error:
        return [Check(name=name, outcome="does not hold", words=f"a field is missing or damaged ({error})")]


def _sealed(certificate: Mapping[str, Any]) -> Check:
    if certificate.get("seal") == seal(certificate):
        return Check(name="seal", outcome="holds", words="the certificate is as it was made")
    return Check(name="seal", outcome="does not hold", words="the certificate was changed after it was made")


def _files(folder: Path, certificate: Mapping[str, Any]) -> Iterator[Check]:
    digests = certificate.get("digests", {})
    path = folder / f"{CERTIFY}.jsonl"
    yield _equal("lines of certify", file_hash(path), digests.get("certify_lines"), path.name)
    report = folder / f"{REPORT}.json"
    if not report.is_file():
        yield Check(name="report", outcome="does not hold", words=f"{report.name} is gone")
        return
    yield _equal("report", content_hash(_read(report)), digests.get("report"), report.name)
    header = folder / "run.json"
    run = _read(header).get("header") if header.is_file() else None
    yield _equal("run", content_hash(run), digests.get("run"), header.name)


def _equal(name: str, found: object, wanted: object, what: str) -> Check:
    if found == wanted:
        return Check(name=name, outcome="holds", words=f"{what}: as certified")
    return Check(name=name, outcome="does not hold", words=f"{what}: not what was certified")


def _workload(folder: Path, certificate: Mapping[str, Any]) -> tuple[Problem | None, list[Check]]:
    """The problem made again from the log, and whether it is the same."""
    config = _config(folder / f"{WORKLOAD}.json")
    if not config.log.exists():
        words = f"{config.log} is not here, so rows, splits and terms were not looked at"
        return None, [Check(name="workload", outcome="not checked", words=words)]
    try:
        log = read_rows(config)
        problem = problem_of(config, log, split_rows(config, log))
    except TokenmillError as error:
        return None, [Check(name="workload", outcome="does not hold", words=str(error))]
    names = {"log": "the log", "splits": "the splits", "certify": "the certifying rows", "rules": "the rules"}
    wanted = certificate["digests"]
    return problem, [
        _equal(what, problem.digests[name], wanted.get(name), what) for name, what in names.items()
    ]


def _recomputed(folder: Path, certificate: Mapping[str, Any], problem: Problem | None) -> list[Check]:
    """Verdicts, costs and choice from the lines."""
    report = _read(folder / f"{REPORT}.json")
    items, figures = _lines(folder, report)
    quality = certificate["workload"]["quality"]
    absolute = None if isinstance(quality["bar"], str) else float(quality["bar"])
    bar = Bar(margin=quality["margin"], confidence=quality["confidence"], absolute=absolute)
    slo = certificate["workload"]["slo"]
    has_slo = any(slo[name] is not None for name in ("ttft_ms", "tpot_ms", "e2e_ms"))
    gates = {
        each["name"]: [Gate(**gate) for gate in each["judged"]["gates"] if gate["name"] != "latency"]
        for each in report["candidates"]
    }
    judged = judge_all(items, bar, figures, gates, num_slo_percent=slo["percentile"] if has_slo else None)
    checks = [_verdicts(judged, certificate), _costs(items, figures, bar)]
    cost = certificate["incumbent"]["usd_per_pass"]
    incumbent = None if cost is None else Range(**cost)
    if problem is not None:
        checks.append(_terms(folder, certificate, problem))
        incumbent = problem.incumbent_cost
    lost = [from_json(Lost, each, "report.json") for each in report["lost"]]
    choice = choose(judged, figures, incumbent, lost)
    wanted = certificate["choice"]["winner"]
    same = choice.winner == wanted
    words = f"the cheapest that passes is {choice.winner or 'nobody: the incumbent is kept'}"
    if not same:
        words += f", and the certificate says {wanted or 'nobody'}"
    return [*checks, Check(name="choice", outcome="holds" if same else "does not hold", words=words)]


def _lines(folder: Path, report: Mapping[str, Any]) -> tuple[list[Item], dict[str, Figures]]:
    """The lines of the candidates in the report: measured ones as they stand, those of cascades made
    again.
    """
    figures = {
        each["name"]: from_json(Figures, each["figures"], "report.json") for each in report["candidates"]
    }
    by_key: dict[str, dict[str, Item]] = {}
    for number, line in _json_lines(folder / f"{CERTIFY}.jsonl"):
        item = from_json(Item, line["item"], f"{CERTIFY}.jsonl:{number}")
        by_key.setdefault(line["key"], {})[item.id] = item
    names = {line["key"]: line["candidate"] for _, line in _json_lines(folder / f"{MEASURED}.jsonl")}
    own = {names[key]: list(items.values()) for key, items in by_key.items() if key in names}
    found = [item for name in figures for item in own.get(name, ())]
    for each in report["candidates"]:
        if "cascade" in each:
            found += _cascade_lines(each, own[each["cascade"]["first"]])
    return found, figures


def _cascade_lines(candidate: Mapping[str, Any], first: list[Item]) -> list[Item]:
    """Kept lines are the first's; a deferred row is the incumbent's, and paid twice."""
    threshold = candidate["cascade"]["threshold"]
    found = []
    for item in first:
        if not item.error and (item.probability or 0.0) >= threshold:
            found.append(replace(item, candidate=candidate["name"]))
            continue
        found.append(
            replace(
                item,
                candidate=candidate["name"],
                score=item.incumbent_score,
                passed=item.incumbent_passed,
                usd=item.usd + (item.incumbent_usd or 0.0),
                deferred_to="incumbent",
                error="",
            )
        )
    return found


def _verdicts(judged: Mapping[str, Judged], certificate: Mapping[str, Any]) -> Check:
    wanted = certificate["verdicts"]
    wrong = [
        name
        for name in sorted({*judged, *wanted})
        if name not in judged
        or name not in wanted
        or judged[name].outcome != wanted[name]["outcome"]
        or abs(judged[name].overall.difference - wanted[name]["overall"]["difference"]) > _CLOSE
    ]
    if not wrong:
        words = f"{len(judged)} verdicts follow from the lines of certify"
        return Check(name="verdicts", outcome="holds", words=words)
    words = f"the lines of certify say something else of {', '.join(wrong)}"
    return Check(name="verdicts", outcome="does not hold", words=words)


def _costs(items: list[Item], figures: Mapping[str, Figures], bar: Bar) -> Check:
    wrong = []
    for name, each in figures.items():
        own = [item for item in items if item.candidate == name]
        if not own:
            wrong.append(name)
            continue
        found = cost_per_pass(
            [item.usd for item in own], [float(item.passed) for item in own], confidence=bar.confidence
        )
        estimate = Range.of(found).estimate
        wanted = each.usd_per_pass.estimate
        if (estimate is None) != (wanted is None) or abs((estimate or 0) - (wanted or 0)) > _CLOSE * (
            wanted or 1
        ):
            wrong.append(name)
    if not wrong:
        return Check(
            name="costs", outcome="holds", words="dollars for each passing answer follow from the lines"
        )
    return Check(
        name="costs", outcome="does not hold", words=f"the lines cost something else: {', '.join(wrong)}"
    )


def _terms(folder: Path, certificate: Mapping[str, Any], problem: Problem) -> Check:
    """The winner against the terms of the log, as the workload's file rules on them."""
    winner = certificate["winner"]
    if winner is None:
        return Check(name="terms", outcome="holds", words="nothing is deployed")
    seen: set[str] = set()
    for _, line in _json_lines(folder / "made.jsonl"):
        artefact = line["artefact"]
        if artefact is not None and artefact["digest"] == winner["artefact"]["digest"]:
            seen |= set(artefact["trained_on"])
    denied = seen & problem.denied
    if denied:
        words = f"the winner was made from {len(denied)} rows whose terms deny that"
        return Check(name="terms", outcome="does not hold", words=words)
    return Check(name="terms", outcome="holds", words=f"none of {len(seen)} rows trained on is denied")


def _artefact(folder: Path, certificate: Mapping[str, Any]) -> Check:
    """The winner's files by their hash."""
    name = "the winner's files"
    winner = certificate["winner"]
    if winner is None:
        return Check(name=name, outcome="not checked", words="there is no winner")
    artefact = winner["artefact"]
    path = Path(artefact["path"])
    own = folder / "candidates" / path.name
    path = own if own.is_dir() else path
    if (path / CONFIG_NAME).is_file():
        return _equal(name, file_digest(path, (CONFIG_NAME, NUMBERS_NAME))[0], artefact["digest"], str(path))
    if not (path / MANIFEST_NAME).is_file():
        return Check(name=name, outcome="not checked", words=f"{path} is not here, or has no manifest")
    directory = ModelDirectory.open(path)
    directory.verify()
    return _equal(name, directory.digest, artefact["digest"], str(path))


def _config(path: Path) -> WorkloadConfig:
    def to_path(kind: type, value: object) -> object:
        return Path(str(value)) if kind is Path else value

    try:
        return msgspec.convert(_read(path), WorkloadConfig, dec_hook=to_path)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: no workload ({error})", hint="run it again") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"{path} is gone", hint="give the whole folder of the run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error})", hint="give the folder as it was made") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is no JSON object", hint="give the folder as it was made")
    return value


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = json.loads(line)
            except ValueError:
                raise UsageError(f"{path}:{number}: no JSON", hint="give the folder as it was made") from None
            yield number, value
