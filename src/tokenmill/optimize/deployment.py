"""The deployment file of a run: what `tokenmill serve` needs to answer as the winner did when it was
measured.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from tokenmill.optimize.run import Entry, Outcome

__all__ = ["DEPLOYMENT", "deployment_text", "served_name"]

DEPLOYMENT: Final = "deployment.yaml"

_INCUMBENT: Final = "incumbent"


def served_name(outcome: Outcome) -> str:
    """What clients ask for: the workload's name."""
    log = outcome.problem.config.log
    name = log.name.partition(".")[0]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", log.resolve().parent.name if name == "log" else name).strip(
        "-._"
    )
    return plain[:60] or "workload"


def deployment_text(outcome: Outcome, folder: Path) -> str:
    """The file. Without a winner it serves the incumbent's endpoint, where that is known."""
    name = served_name(outcome)
    winner = outcome.winner
    head = [f"# {line}" for line in _head(outcome, folder, name)]
    parts = _kept(outcome, name) if winner is None else dict(_parts(winner, outcome, name, folder))
    parts["machine"] = {
        "usd_per_hour": outcome.problem.usd_per_hour,
        "source": str(outcome.problem.about["usd_per_hour_source"]),
    }
    body = yaml.safe_dump(parts, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join(head) + "\n\n" + body


def _head(outcome: Outcome, folder: Path, name: str) -> list[str]:
    lines = [outcome.choice.why, f"tokenmill serve {folder / DEPLOYMENT}    # clients ask for: {name}"]
    needs = "" if outcome.winner is None else outcome.winner.artefact.needs
    if outcome.winner is not None and outcome.winner.cascade is not None:
        needs = f"{needs} Fill in the incumbent's endpoint below (url, model, key_env).".strip()
    if outcome.winner is None and not outcome.problem.config.incumbent.url:
        needs = "Fill in the incumbent's endpoint below (url, model, key_env)."
    return [*lines, *([needs] if needs else [])]


def _parts(winner: Entry, outcome: Outcome, name: str, folder: Path) -> Mapping[str, Any]:
    if winner.cascade is None:
        return _relative(winner.candidate.deployment(winner.artefact, name), folder)
    inner = f"{name}-first"
    parts = dict(_relative(winner.candidate.deployment(winner.artefact, inner), folder))
    parts["upstreams"] = [_upstream(outcome, _INCUMBENT)]
    parts["cascades"] = [
        {
            "name": name,
            "first": inner,
            "second": _INCUMBENT,
            "min_probability": winner.cascade.certified.threshold,
        }
    ]
    return parts


def _kept(outcome: Outcome, name: str) -> dict[str, Any]:
    return {"upstreams": [_upstream(outcome, name)]}


def _upstream(outcome: Outcome, name: str) -> dict[str, Any]:
    """The incumbent as an upstream; what the workload's file does not say is for the reader to fill in."""
    incumbent = outcome.problem.config.incumbent
    fields: dict[str, Any] = {
        "name": name,
        "url": incumbent.url or "https://incumbent.invalid/v1",
        "model": incumbent.name.rpartition("/")[2] or "the-incumbents-model",
        "key_env": incumbent.key_env or "INCUMBENT_API_KEY",
    }
    if incumbent.price_in is not None and incumbent.price_out is not None:
        fields["price"] = {"input_usd": incumbent.price_in, "output_usd": incumbent.price_out}
        if incumbent.price_cached is not None:
            fields["price"]["cached_usd"] = incumbent.price_cached
    return fields


def _relative(parts: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Paths inside of the run's folder as seen from it, so that the folder can be moved."""
    root = str(folder.resolve())

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: moved(each) for key, each in value.items()}
        if isinstance(value, list):
            return [moved(each) for each in value]
        if isinstance(value, str) and value.startswith(f"{root}/"):
            return f".{value[len(root) :]}"
        return value

    return {key: moved(each) for key, each in parts.items()}
