"""May an answer train a model? Its terms decide: the workload's policy allows, warns of or denies each.

Some licences are known here; what a provider's terms say is for whoever agreed to them, so answers of a
provider and terms that nobody named are a warning until the workload's file says otherwise. This is a reading
aid and no legal advice.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, Literal, NamedTuple, TypeAlias

from tokenmill.workload.row import Row

__all__ = ["Action", "Ruling", "Terms", "TermsCount", "count_terms"]

Action: TypeAlias = Literal["allow", "warn", "deny"]

_SEVERITY: Final[Mapping[Action, int]] = {"allow": 0, "warn": 1, "deny": 2}
_KNOWN: Final[Mapping[str, Action]] = {
    "*-nc-*": "warn",
    "*noncommercial*": "warn",
    "*-sa-*": "warn",
    "apache-2.0": "allow",
    "mit": "allow",
    "bsd-*": "allow",
    "cc0-1.0": "allow",
    "cc-by-*": "allow",
    "public-domain": "allow",
    "own": "allow",
}
"""By what a term is called, in small letters with hyphens; the first that fits."""


class Ruling(NamedTuple):
    """What holds for an answer, and because of which term ("" if nobody named one)."""

    action: Action
    term: str


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The policy. `answers` are the terms of rows that name none; `rules` say what a term (or `origin:NAME`,
    a model that answered) may, with `*` for any text; `unknown` holds where no rule fits.
    """

    answers: tuple[str, ...] = ()
    rules: Mapping[str, Action] = field(default_factory=dict)
    unknown: Action = "warn"

    def ruling(self, row: Row) -> Ruling:
        """The strictest of all that holds for a row's answer."""
        terms = row.terms or self.answers
        rulings = [Ruling(self._action(each), each) for each in terms] or [Ruling(self.unknown, "")]
        origin = f"origin:{row.origin}"
        action = self._given(origin) if row.origin else None
        if action is not None:
            # Who answered is a rule of its own where nobody named terms, and else may only be stricter.
            rulings = [each for each in rulings if each.term] + [Ruling(action, origin)]
        return max(rulings, key=lambda each: _SEVERITY[each.action])

    def _action(self, term: str) -> Action:
        given = self._given(term)
        if given is not None:
            return given
        plain = _plain(term)
        return next((action for name, action in _KNOWN.items() if fnmatchcase(plain, name)), self.unknown)

    def _given(self, name: str) -> Action | None:
        plain = _plain(name)
        fitting = (action for rule, action in self.rules.items() if fnmatchcase(plain, _plain(rule)))
        return max(fitting, key=lambda action: _SEVERITY[action], default=None)


class TermsCount(NamedTuple):
    """So many rows have this ruling."""

    action: Action
    term: str
    num_rows: int


def count_terms(rows: Iterable[Row], terms: Terms) -> tuple[TermsCount, ...]:
    """The rulings of all rows, the strictest first."""
    counts = Counter(terms.ruling(row) for row in rows)
    found = (TermsCount(ruling.action, ruling.term, num) for ruling, num in counts.items())
    return tuple(sorted(found, key=lambda each: (-_SEVERITY[each.action], -each.num_rows, each.term)))


def _plain(name: str) -> str:
    return "-".join(name.lower().split())
