"""Candidates that are models as they are: in other weight formats, with examples in the prompt, with a
grammar.

Nothing is trained. Examples come from rows whose terms allow training, for they become part of what is
served.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.optimize.candidate import Expected, Workshop
from tokenmill.optimize.records import Artefact, Kind, Lineage
from tokenmill.optimize.served import ServedCandidate, ServedModel, answer_grammar, answer_limit, chosen_shots

__all__ = ["LocalCandidate", "directory_bytes", "lineage_of", "local_candidates"]

_START_S = 6.0
_TOKENS_PER_S = 1000.0
_MOST_ITEMS = 400
_GUESSED_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class LocalCandidate(ServedCandidate):
    """A model directory with settings. `shots` examples stand in front; `constrained` bounds the answers."""

    name: str
    path: str
    digest: str
    weights: WeightFormat = "w8a8"
    shots: int = 0
    constrained: bool = False
    is_control: bool = False

    @property
    def kind(self) -> Kind:
        """A model as it is."""
        return "model"

    @property
    def is_trained(self) -> bool:
        """It is not: the same at every share."""
        return False

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What decides it, beside the rows."""
        return {
            "kind": "model",
            "digest": self.digest,
            "weights": self.weights,
            "shots": self.shots,
            "constrained": self.constrained,
        }

    def expected(self, workshop: Workshop, num_items: int) -> Expected:
        """By a rough speed: what the model needs is known only when it runs."""
        num = min(num_items, _MOST_ITEMS)  # what is no good is given up early
        return Expected(0.0, 2 * _START_S + num * _GUESSED_TOKENS / _TOKENS_PER_S)

    def make(self, workshop: Workshop, share: float) -> Artefact:
        """Choose examples and grammar."""
        began_s = time.monotonic()
        directory = ModelDirectory.open(Path(self.path))
        messages = chosen_shots(workshop.train, self.shots)
        served = ServedModel(
            weights=self.weights,
            messages=messages,
            grammar=answer_grammar(workshop.train, workshop.labels) if self.constrained else None,
            max_tokens=answer_limit(workshop.train),
        )
        return Artefact(
            path=self.path,
            digest=directory.digest,
            num_bytes=directory_bytes(directory),
            seconds=time.monotonic() - began_s,
            lineage=(lineage_of(directory),),
            trained_on=tuple(case.id for case in workshop.train) if messages else (),
            settings=served.to_json(),
        )


def local_candidates(
    directory: ModelDirectory,
    *,
    formats: Sequence[WeightFormat] = ("w8a8", "w4a8"),
    shots: int = 4,
    has_form: bool,
) -> list[LocalCandidate]:
    """The model plain and with examples, in the formats given; with a grammar where answers have a form."""
    first = formats[0]
    plain = LocalCandidate(
        name=f"{directory.name} {first}", path=str(directory.path), digest=directory.digest, weights=first
    )
    found = [plain, *(replace(plain, name=f"{directory.name} {each}", weights=each) for each in formats[1:])]
    found.append(replace(plain, name=f"{directory.name} {first}, {shots} examples", shots=shots))
    if has_form:
        name = f"{directory.name} {first}, {shots} examples, grammar"
        found.append(replace(plain, name=name, shots=shots, constrained=True))
    return found


def lineage_of(directory: ModelDirectory) -> Lineage:
    """A model's name, digest and licences."""
    manifest = directory.manifest
    return Lineage(
        what="model",
        name=directory.name if manifest is None else f"{directory.name} ({manifest.source})",
        digest=directory.digest,
        terms=() if manifest is None else manifest.licences,
    )


def directory_bytes(directory: ModelDirectory) -> int:
    """Bytes of a model's files on the disk; without the quantised original, which is kept for its grid."""
    files = [each for each in directory.path.iterdir() if each.is_file() and each.suffix != ".gguf"]
    return sum(each.stat().st_size for each in files)
