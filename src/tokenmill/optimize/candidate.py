"""What may take the incumbent's place: something with a recipe that is made, opened as a backend and served.

A candidate knows how to make itself from the training rows that the terms allow, into files of the run's
folder, and how to be opened as the backend that `tokenmill serve` would run. Everything that decides what it
answers is in its recipe, whose hash is its name in the cache of the run.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from tokenmill.core import TokenmillError
from tokenmill.optimize.cases import Case
from tokenmill.optimize.records import Artefact, Kind
from tokenmill.router import Backend

__all__ = ["Candidate", "CannotBeMadeError", "Expected", "Opened", "Progress", "Workshop"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told (what, done, of how many)."""


class CannotBeMadeError(TokenmillError):
    """A candidate that cannot be made here, such as one whose export is not what was trained."""


class Expected(NamedTuple):
    """What making and measuring it will take, in seconds, before anything is spent; guesses."""

    make_s: float
    measure_s: float


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What a candidate is made from: `train` are rows whose terms allow training, `select` are for choosing.

    `folder` is its own, within the run's; what is half made there is gone on with. `labels` are the closed
    set, if there is one.
    """

    folder: Path
    train: Sequence[Case]
    select: Sequence[Case]
    labels: tuple[str, ...]
    seed: int
    usd_per_hour: float
    progress: Progress


class Opened(NamedTuple):
    """A candidate that answers: its backend, and the bytes of memory that it takes now."""

    backend: Backend
    memory_bytes: Callable[[], int]


class Candidate(Protocol):
    """One way to answer the workload."""

    @property
    def name(self) -> str:
        """Unique in a run; people read it."""
        ...

    @property
    def kind(self) -> Kind:
        """What it is."""
        ...

    @property
    def is_control(self) -> bool:
        """Whether it is measured to the end, however it does on the way."""
        ...

    @property
    def is_trained(self) -> bool:
        """Whether it is made from rows of the workload, so that a share of them makes another one."""
        ...

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Everything that decides what it answers, as JSON."""
        ...

    def expected(self, workshop: Workshop, num_items: int) -> Expected:
        """What it will take, with so many rows to answer."""
        ...

    def make(self, workshop: Workshop, share: float) -> Artefact:
        """Make it from a share of the training. Killed and called again, it goes on and ends the same.

        Raises TokenmillError if it cannot be made, which is a result, not the end of the run.
        """
        ...

    def opened(self, artefact: Artefact, workshop: Workshop) -> AbstractAsyncContextManager[Opened]:
        """Open it as a backend."""
        ...

    def deployment(self, artefact: Artefact, name: str) -> Mapping[str, Any]:
        """The part of a deployment file that serves it as `name`."""
        ...
