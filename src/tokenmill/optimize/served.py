"""A local model as something that is served: its weights, what is told to it in front, the grammar of
answers.

The same settings make the backend that is measured and the part of the deployment file that serves it, so
that what is served is what was measured.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from tokenmill.core import Grammar
from tokenmill.engine import LLMConfig
from tokenmill.engine.serving.messages import EngineSpec
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.optimize.candidate import Opened, Workshop
from tokenmill.optimize.cases import Case
from tokenmill.optimize.records import Artefact
from tokenmill.router.local import LocalBackend, LocalConfig
from tokenmill.router.prompted import PromptedBackend, PromptedConfig, Turn

__all__ = [
    "ServedCandidate",
    "ServedModel",
    "answer_grammar",
    "answer_limit",
    "chosen_shots",
    "resident_bytes",
]

_INNER: Final = "candidate-model"
_MAX_SHOT_CHARS: Final = 1200
_MAX_LABEL_GRAMMAR: Final = 1000
_BYTES_PER_TOKEN: Final = 2
_JsonTypes: TypeAlias = Mapping[type, str]
_TYPES: Final[_JsonTypes] = {
    str: "string",
    bool: "boolean",
    int: "number",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """How a model is served: everything beside its files that decides its answers and its speed."""

    weights: WeightFormat = "w8a8"
    messages: tuple[Turn, ...] = ()
    grammar: Grammar | None = None
    max_tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As a recipe and as settings of an artefact."""
        grammar = self.grammar
        return {
            "weights": self.weights,
            "messages": [{"role": each.role, "content": each.content} for each in self.messages],
            "grammar": None if grammar is None else {"kind": grammar.kind, "source": grammar.source},
            "max_tokens": self.max_tokens,
        }

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "ServedModel":
        """The settings of `to_json`; other keys are for others."""
        grammar = fields["grammar"]
        return ServedModel(
            weights=fields["weights"],
            messages=tuple(Turn(**each) for each in fields["messages"]),
            grammar=None if grammar is None else Grammar(**grammar),
            max_tokens=fields["max_tokens"],
        )

    def prompted(self, name: str, backend: str) -> PromptedConfig:
        """What stands in front of the model; the answers are greedy, for that is what was measured."""
        return PromptedConfig(
            name=name,
            backend=backend,
            messages=self.messages,
            grammar=self.grammar,
            temperature=0.0,
            max_tokens=self.max_tokens,
        )

    def deployment(self, path: str, name: str) -> dict[str, Any]:
        """The part of a deployment file."""
        inner = f"{name}-model"
        prompted: dict[str, Any] = {"name": name, "backend": inner, "temperature": 0.0}
        fields = self.to_json()
        prompted |= {key: fields[key] for key in ("messages", "grammar", "max_tokens") if fields[key]}
        return {
            "models": [{"name": inner, "model": path, "engine": {"weights": self.weights}}],
            "prompted": [prompted],
        }


class ServedCandidate:
    """How a candidate whose artefact is a model with settings (`ServedModel`) is opened and deployed."""

    @asynccontextmanager
    async def opened(self, artefact: Artefact, workshop: Workshop) -> AsyncIterator[Opened]:
        """The engine in a process of its own, with what stands in front of it."""
        served = ServedModel.from_json(artefact.settings)
        directory = await asyncio.to_thread(ModelDirectory.open, Path(artefact.path))
        spec = EngineSpec(model=artefact.path, config=LLMConfig(weights=served.weights))
        config = LocalConfig(name=_INNER, model=directory.name, usd_per_hour=workshop.usd_per_hour)
        local = await LocalBackend.open(config, directory, spec)
        try:
            yield Opened(
                PromptedBackend(served.prompted("candidate", _INNER), local),
                lambda: resident_bytes(local.engine.stats.pid),
            )
        finally:
            await local.close()

    def deployment(self, artefact: Artefact, name: str) -> Mapping[str, Any]:
        """A model, and what stands in front of it."""
        return ServedModel.from_json(artefact.settings).deployment(artefact.path, name)


def resident_bytes(pid: int) -> int:
    """The most memory that a process had, weights that it shares with others included; 0 if it is gone.

    `pid` 0 is this process.
    """
    try:
        text = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", text, flags=re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def chosen_shots(cases: Sequence[Case], num: int) -> tuple[Turn, ...]:
    """Examples as turns of a conversation: short rows, each of another slice and answer as far as there are.

    The first ones of the training part are taken, so that they do not depend on chance.
    """
    usable = [case for case in cases if case.call is not None and not case.call.tools and _is_short(case)]
    chosen: list[Case] = []
    counts: Counter[str] = Counter()
    while len(chosen) < num and usable:
        best = min(
            range(len(usable)), key=lambda at: (counts[usable[at].wanted] + counts[usable[at].slice], at)
        )
        case = usable.pop(best)
        counts.update((case.wanted, case.slice))
        chosen.append(case)
    return tuple(turn for case in chosen for turn in _turns(case))


def _is_short(case: Case) -> bool:
    assert case.call is not None
    users = [each for each in case.call.messages if each.role == "user"]
    return len(users) == 1 and len(users[0].content or "") + len(case.wanted) <= _MAX_SHOT_CHARS


def _turns(case: Case) -> tuple[Turn, Turn]:
    assert case.call is not None
    asked = next(each.content or "" for each in case.call.messages if each.role == "user")
    return Turn(role="user", content=asked), Turn(role="assistant", content=case.wanted)


def answer_limit(cases: Sequence[Case]) -> int | None:
    """Tokens that no answer needs: twice the longest of the training part, so that none runs on; None of
    none.
    """
    if not cases:
        return None
    return 16 + 2 * max(len(case.wanted.encode()) for case in cases) // _BYTES_PER_TOKEN


def answer_grammar(cases: Sequence[Case], labels: Sequence[str]) -> Grammar | None:
    """What all answers of the training part match: a label, or a JSON object with the keys seen; None if they
    have no such form.
    """
    if labels and len(labels) <= _MAX_LABEL_GRAMMAR:
        return Grammar(kind="regex", source="|".join(re.escape(each) for each in sorted(labels)))
    objects = [_object(case.wanted) for case in cases]
    found = [each for each in objects if each is not None]
    if not found or len(found) < len(objects):
        return None
    return Grammar(kind="json_schema", source=json.dumps(_schema(found), sort_keys=True))


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _schema(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of objects: the keys that occurred with their types; those in all of them are required."""
    kinds: dict[str, set[str]] = {}
    for value in values:
        for key, each in value.items():
            kinds.setdefault(str(key), set()).add(_TYPES[type(each)])
    required = [key for key in kinds if all(key in value for value in values)]
    properties = {key: {"type": sorted(kinds[key])} for key in sorted(kinds)}
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(required),
        "additionalProperties": False,
    }
