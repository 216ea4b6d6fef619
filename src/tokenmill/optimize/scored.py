"""A candidate for closed label sets: a model as it is chooses the likeliest label instead of writing one."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenmill.core import UsageError
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.optimize.candidate import Expected, Opened, Workshop
from tokenmill.optimize.local import directory_bytes, lineage_of
from tokenmill.optimize.records import Artefact, Kind
from tokenmill.optimize.served import chosen_shots, resident_bytes
from tokenmill.router.labels import LabelBackend, LabelConfig, LabelExample

__all__ = ["ScoredCandidate"]

_START_S: Final = 3.0
_LABELS_PER_S: Final = 500.0
_MOST_ITEMS: Final = 400


@dataclass(frozen=True, kw_only=True)
class ScoredCandidate:
    """A model directory that scores the labels of the workload after `shots` examples."""

    name: str
    path: str
    digest: str
    weights: WeightFormat = "w8a8"
    shots: int = 4
    is_control: bool = False

    @property
    def kind(self) -> Kind:
        """Scored labels."""
        return "scored labels"

    @property
    def is_trained(self) -> bool:
        """It is not."""
        return False

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What decides it, beside the rows and labels."""
        return {"kind": self.kind, "digest": self.digest, "weights": self.weights, "shots": self.shots}

    def expected(self, workshop: Workshop, num_items: int) -> Expected:
        """By the labels that are scored."""
        num = min(num_items, _MOST_ITEMS) * max(2, len(workshop.labels))
        return Expected(0.0, _START_S + num / _LABELS_PER_S)

    def make(self, workshop: Workshop, share: float) -> Artefact:
        """Choose the examples. Raises UsageError without a closed set of labels."""
        if not workshop.labels:
            raise UsageError("there is no closed set of labels", hint="name them in the workload's file")
        began_s = time.monotonic()
        directory = ModelDirectory.open(Path(self.path))
        turns = chosen_shots(workshop.train, self.shots)
        pairs = zip(turns[::2], turns[1::2], strict=True)
        return Artefact(
            path=self.path,
            digest=directory.digest,
            num_bytes=directory_bytes(directory),
            seconds=time.monotonic() - began_s,
            lineage=(lineage_of(directory),),
            trained_on=tuple(case.id for case in workshop.train) if turns else (),
            settings={
                "weights": self.weights,
                "labels": list(workshop.labels),
                "examples": [{"text": text.content, "label": label.content} for text, label in pairs],
            },
        )

    @asynccontextmanager
    async def opened(self, artefact: Artefact, workshop: Workshop) -> AsyncIterator[Opened]:
        """The model in this process."""
        config = _config(artefact, "candidate")
        backend = await asyncio.to_thread(LabelBackend.open, config, usd_per_hour=workshop.usd_per_hour)
        try:
            yield Opened(backend, lambda: resident_bytes(0))
        finally:
            await backend.close()

    def deployment(self, artefact: Artefact, name: str) -> Mapping[str, Any]:
        """Scored labels of the server."""
        settings = artefact.settings
        fields = {key: settings[key] for key in ("labels", "weights", "examples")}
        return {"scored": [{"name": name, "model": artefact.path, **fields}]}


def _config(artefact: Artefact, name: str) -> LabelConfig:
    settings = artefact.settings
    return LabelConfig(
        name=name,
        model=artefact.path,
        labels=tuple(settings["labels"]),
        weights=settings["weights"],
        examples=tuple(LabelExample(**each) for each in settings["examples"]),
    )
