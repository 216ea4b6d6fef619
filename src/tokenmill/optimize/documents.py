"""What a run found as documents: report.json, from which the page is made, and certificate.json.

The report has everything that a person may want to look at. The certificate has what somebody else needs to
check the claim: hashes of the workload, the splits, the recipe, the weights and the engine, the figures, the
verdicts, lineage and terms, and a seal over all of it. The seal proves that nothing was changed, not who made
it.
"""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tokenmill import __version__
from tokenmill.core import StorageError
from tokenmill.optimize.book import CERTIFY
from tokenmill.optimize.cases import Case
from tokenmill.optimize.choice import pareto
from tokenmill.optimize.records import Artefact, Item, to_json
from tokenmill.optimize.run import Entry, Outcome
from tokenmill.runs import content_hash

__all__ = [
    "CERTIFICATE",
    "REPORT",
    "certificate",
    "file_hash",
    "machine_fields",
    "report",
    "seal",
    "verdict_of",
]

CERTIFICATE: Final = "certificate"
REPORT: Final = "report"

_FORMAT: Final = 1
_EXAMPLES: Final = 12
_TEXT_CHARS: Final = 1200


def report(outcome: Outcome, machine: Mapping[str, Any], *, now: datetime | None = None) -> dict[str, Any]:
    """The document of the report."""
    problem = outcome.problem
    points = {
        name: (entry.figures.usd_per_pass.estimate, entry.figures.quality.estimate)
        for name, entry in outcome.entries.items()
    }
    known = {name: (usd, quality) for name, (usd, quality) in points.items() if usd and quality is not None}
    front = pareto(known)
    cases = {case.id: case for case in problem.certify}
    return {
        "format": _FORMAT,
        "made": (now or datetime.now(UTC)).isoformat(timespec="seconds"),
        "tokenmill": __version__,
        "machine": dict(machine),
        "verdict": verdict_of(outcome),
        "choice": outcome.choice.to_json(),
        "workload": {**problem.about, "digests": dict(problem.digests)},
        "incumbent": _incumbent(outcome),
        "plan": to_json(outcome.plan),
        "num_looks": outcome.num_looks,
        "candidates": [
            {
                **_candidate(entry),
                "on_front": entry.name in front,
                "judged": outcome.judged[entry.name].to_json(),
                "lost": outcome.choice.lost.get(entry.name, ""),
                "disagreements": _disagreements(entry, cases),
            }
            for entry in outcome.entries.values()
        ],
        "lost": [to_json(each) for each in outcome.lost],
        "explored": [to_json(each) for each in outcome.explored],
        "notes": _notes(outcome),
    }


def certificate(outcome: Outcome, folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate of a run whose other files are in `folder`; `document` is its report."""
    winner = outcome.winner
    fields: dict[str, Any] = {
        "kind": "tokenmill certificate",
        **{name: document[name] for name in ("format", "made", "tokenmill", "machine", "verdict", "choice")},
        "workload": {
            name: document["workload"][name] for name in ("log", "num_rows", "parts", "quality", "slo")
        },
        "digests": {
            **outcome.problem.digests,
            "run": content_hash(dict(outcome.header)),
            "certify_lines": file_hash(folder / f"{CERTIFY}.jsonl"),
            "report": content_hash(dict(document)),
        },
        "incumbent": document["incumbent"],
        "num_candidates": len(outcome.entries),
        "num_looks": outcome.num_looks,
        "winner": None if winner is None else _winner(winner, outcome),
        "verdicts": {name: _verdict(each.to_json()) for name, each in outcome.judged.items()},
        "costs": {name: to_json(each.figures.usd_per_pass) for name, each in outcome.entries.items()},
        "lost": dict(outcome.choice.lost),
        "notes": list(document["notes"]),
    }
    return {**fields, "seal": seal(fields)}


def seal(fields: Mapping[str, Any]) -> str:
    """SHA-256 over a certificate without its seal."""
    return content_hash({name: value for name, value in fields.items() if name != "seal"})


def verdict_of(outcome: Outcome) -> str:
    """Of the whole run: pass with a winner, undecided where more rows might make one, else fail."""
    if outcome.winner is not None:
        return "pass"
    return "undecided" if any(each.outcome == "undecided" for each in outcome.judged.values()) else "fail"


def machine_fields(hardware: Mapping[str, Any], *, busy: float) -> dict[str, Any]:
    """The machine in a few words, with the share of it that others used when the run began."""
    return {**hardware, "system": f"{platform.system()} {platform.release()}", "busy_share": busy}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, empty if there is none. Raises StorageError."""
    if not path.exists():
        return ""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}", hint="check it") from error


def _candidate(entry: Entry) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": entry.name,
        "kind": entry.kind,
        "recipe": dict(entry.candidate.recipe),
        "recipe_hash": content_hash(dict(entry.candidate.recipe)),
        "artefact": _artefact(entry.artefact),
        "figures": to_json(entry.figures),
    }
    if entry.cascade is not None:
        boldest = entry.cascade.boldest
        fields["cascade"] = {
            "first": entry.cascade.first,
            "threshold": entry.cascade.certified.threshold,
            "certified": entry.cascade.certified.to_json(),
            "boldest": None if boldest is None else boldest.to_json(),
        }
    return fields


def _artefact(artefact: Artefact) -> dict[str, Any]:
    """Without the ids of what it was trained on, but their number and hash."""
    fields = to_json(artefact)
    ids = fields.pop("trained_on")
    return {**fields, "num_trained_on": len(ids), "trained_on_hash": content_hash(sorted(ids))}


def _winner(entry: Entry, outcome: Outcome) -> dict[str, Any]:
    judged = outcome.judged[entry.name]
    return {**_candidate(entry), "judged": _verdict(judged.to_json())}


def _verdict(judged: Mapping[str, Any]) -> dict[str, Any]:
    """Of one candidate, short: outcome, overall, slices by outcome, gates."""
    return {
        "outcome": judged["outcome"],
        "overall": judged["overall"],
        "slices": {each["slice"]: each["verdict"]["outcome"] for each in judged["slices"]},
        "gates": judged["gates"],
        "reasons": judged["reasons"],
    }


def _incumbent(outcome: Outcome) -> dict[str, Any]:
    problem = outcome.problem
    cost = problem.incumbent_cost
    num_estimated = sum(case.usd_is_estimated for case in problem.certify)
    share = sum(case.passed for case in problem.certify) / len(problem.certify)
    score = sum(case.score for case in problem.certify) / len(problem.certify)
    return {
        **problem.about["incumbent"],
        "usd_per_pass": None if cost is None else to_json(cost),
        "pass_share": share,
        "quality": score,
        "num_estimated_usage": num_estimated,
    }


def _disagreements(entry: Entry, cases: Mapping[str, Case]) -> list[dict[str, Any]]:
    """Rows in which one is better: those that the incumbent has right first, spread over the slices."""
    lost = [each for each in entry.items if each.score < each.incumbent_score]
    won = [each for each in entry.items if each.score > each.incumbent_score]
    num_won = min(len(won), _EXAMPLES // 3)
    chosen = [*_spread(lost, _EXAMPLES - num_won), *_spread(won, num_won)]
    return [_shown(each, cases[each.id]) for each in chosen]


def _spread(items: Sequence[Item], num: int) -> list[Item]:
    """So many, of each slice in turn."""
    by_slice: dict[str, list[Item]] = {}
    for item in items:
        by_slice.setdefault(item.slice, []).append(item)
    rounds = zip(*(_padded(each, num) for each in by_slice.values()), strict=True)
    return [item for each in rounds for item in each if item is not None][:num]


def _padded(items: Sequence[Item], num: int) -> list[Item | None]:
    return [*items[:num], *([None] * (num - len(items)))]


def _shown(item: Item, case: Case) -> dict[str, Any]:
    asked = ""
    if case.call is not None:
        asked = next((each.content or "" for each in reversed(case.call.messages) if each.role == "user"), "")
    return {
        "id": item.id,
        "line": case.number,
        "slice": item.slice,
        "asked": asked[:_TEXT_CHARS],
        "wanted": case.wanted[:_TEXT_CHARS],
        "incumbent": case.answer[:_TEXT_CHARS],
        "candidate": item.answer[:_TEXT_CHARS] if not item.error else f"(no answer: {item.error})",
        "incumbent_score": item.incumbent_score,
        "score": item.score,
        "probability": item.probability,
    }


def _notes(outcome: Outcome) -> list[str]:
    """What a reader must know to take the figures for what they are."""
    problem = outcome.problem
    about = problem.about
    incumbent = about["incumbent"]
    notes = [
        f"Money of candidates: {problem.usd_per_hour:g} USD an hour of this machine "
        f"({about['usd_per_hour_source']}), busy all the time. At half the load it costs twice as much.",
        "Candidates were loaded behind HTTP, at the batch that serves them best; answers are greedy.",
    ]
    if incumbent["has_references"] == about["num_rows"]:
        notes.append("Quality is against the references in the log, for the incumbent too.")
    elif not incumbent["has_references"]:
        notes.append(
            "The log has no references: what the incumbent answered counts as right; quality is agreement."
        )
    if problem.incumbent_cost is None:
        notes.append("Nobody said what the incumbent costs, so no saving is claimed.")
    elif incumbent["has_usage"] < about["num_rows"]:
        notes.append(
            "Where the log has no token counts, those of the incumbent are estimated from its texts."
        )
    if outcome.num_looks > len(outcome.entries):
        notes.append(
            f"{outcome.num_looks} different candidates were ever measured on these rows; the verdicts are "
            f"corrected for the {len(outcome.entries)} of this run."
        )
    if any(entry.figures.client_limited for entry in outcome.entries.values()):
        notes.append("Some candidates answered as fast as the load could be sent: they may be faster still.")
    return notes
