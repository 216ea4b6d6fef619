"""What a run has finished, by content: artefacts, answers to select, measurements. A killed run goes on
from it.

    made.jsonl       a candidate at a share of its training: its artefact, or why it could not be made
    select.jsonl     its answers to rows of select, asked once each
    explored.jsonl   what they came to, by round
    measured.jsonl   figures on certify; each line is a look at that part, and is never taken twice
    certify.jsonl    the lines behind them

A key is the hash of everything that decides what stands under it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from tokenmill.core import UsageError
from tokenmill.optimize.records import Artefact, Explored, Figures, Item, from_json, to_json
from tokenmill.runs import RunFolder

__all__ = ["CERTIFY", "MEASURED", "Book", "certify_items"]

_MADE: Final = "made"
_SELECT: Final = "select"
_EXPLORED: Final = "explored"
MEASURED: Final = "measured"
CERTIFY: Final = "certify"


class Book:
    """The finished work of one run folder."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._made: dict[str, dict[str, Any]] = {each["key"]: each for each in run.lines(_MADE)}
        self._select: dict[str, dict[str, Item]] = {}
        for at, line in enumerate(run.lines(_SELECT), start=1):
            item = from_json(Item, line["item"], f"{run.path}/{_SELECT}.jsonl:{at}")
            self._select.setdefault(line["key"], {})[item.id] = item
        self._explored = {
            each["key"]: from_json(Explored, each["explored"], f"{run.path}/{_EXPLORED}.jsonl")
            for each in run.lines(_EXPLORED)
        }
        self._figures = {
            each["key"]: from_json(Figures, each["figures"], f"{run.path}/{MEASURED}.jsonl")
            for each in run.lines(MEASURED)
        }
        self._items = certify_items(run)

    def made(self, key: str) -> Artefact | str | None:
        """The artefact, the reason why there is none, or None if nobody tried."""
        line = self._made.get(key)
        if line is None:
            return None
        if line["artefact"] is None:
            return str(line["reason"])
        return from_json(Artefact, line["artefact"], f"{self.run.path}/{_MADE}.jsonl")

    def keep_made(self, key: str, candidate: str, artefact: Artefact | None, reason: str = "") -> None:
        """Write it down."""
        fields = None if artefact is None else to_json(artefact)
        line = {"key": key, "candidate": candidate, "artefact": fields, "reason": reason}
        self.run.append(_MADE, [line])
        self._made[key] = line

    def selected(self, key: str) -> Mapping[str, Item]:
        """The answers to rows of select, by id."""
        return self._select.get(key, {})

    def keep_selected(self, key: str, items: Iterable[Item]) -> None:
        """Write them down."""
        own = self._select.setdefault(key, {})
        new = [each for each in items if each.id not in own]
        self.run.append(_SELECT, [{"key": key, "item": to_json(each)} for each in new])
        own.update({each.id: each for each in new})

    def explored(self, key: str) -> Explored | None:
        """What a round of a candidate came to."""
        return self._explored.get(key)

    def keep_explored(self, key: str, explored: Explored) -> None:
        """Write it down."""
        self.run.append(_EXPLORED, [{"key": key, "explored": to_json(explored)}])
        self._explored[key] = explored

    def all_explored(self) -> list[Explored]:
        """Every round, in the order in which they were finished."""
        return list(self._explored.values())

    def measured(self, key: str) -> tuple[Figures, tuple[Item, ...]] | None:
        """Figures and lines of a candidate on certify."""
        figures = self._figures.get(key)
        return None if figures is None else (figures, self._items.get(key, ()))

    def keep_measured(self, key: str, candidate: str, figures: Figures, items: Iterable[Item]) -> None:
        """Write down the lines, then the figures: lines without figures are of a run that was killed."""
        lines = tuple(items)
        self.run.append(CERTIFY, [{"key": key, "item": to_json(each)} for each in lines])
        self.run.append(MEASURED, [{"key": key, "candidate": candidate, "figures": to_json(figures)}])
        self._items[key] = lines
        self._figures[key] = figures


def certify_items(run: RunFolder) -> dict[str, tuple[Item, ...]]:
    """The lines of certify by key; of lines of a row that were written twice the later counts.

    Raises UsageError with file and line for one that is damaged.
    """
    found: dict[str, dict[str, Item]] = {}
    for at, line in enumerate(run.lines(CERTIFY), start=1):
        where = f"{run.path}/{CERTIFY}.jsonl:{at}"
        if not isinstance(line.get("key"), str) or not isinstance(line.get("item"), dict):
            raise UsageError(f"{where}: no line of a measurement", hint="run it again in another folder")
        item = from_json(Item, line["item"], where)
        found.setdefault(line["key"], {})[item.id] = item
    return {key: tuple(items.values()) for key, items in found.items()}
