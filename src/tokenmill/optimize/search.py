"""The search: many candidates on little, fewer on more, the last ones on everything but certify.

Successive halving (Jamieson and Talwalkar 2016): each round gives those that are left a larger share of their
training and of the rows of select, and keeps the better half; controls always stay. First come those that
reach the bar, the cheapest of them first: quality above the bar earns nothing. Then those that still may.
What is finished is in the book, so a run that was killed asks nothing twice.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from tokenmill.core import StorageError, TokenmillError
from tokenmill.evals.statistics import mean_interval, paired
from tokenmill.optimize.book import Book
from tokenmill.optimize.candidate import Candidate, Workshop
from tokenmill.optimize.cases import Case
from tokenmill.optimize.measure import Machine, answer
from tokenmill.optimize.problem import Problem
from tokenmill.optimize.records import Artefact, Explored, Item, Lost, Range, Stage
from tokenmill.runs import content_hash

__all__ = ["Explorer", "Finalist", "SearchConfig", "select_key"]

_NAME_CHARS: Final = 12
_FIRST_ROWS: Final = 48
"""After so many rows of select it is seen whether more are worth asking."""
_HOPELESS: Final = 0.001
_UNLIKELY: Final = 0.05


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """`shares` of training and of select in each round; the last is 1. At most `max_finalists`, controls not
    counted, are measured on certify: each costs confidence.
    """

    shares: tuple[float, ...] = (0.25, 1.0)
    max_finalists: int = 5
    seed: int = 0


class Finalist(NamedTuple):
    """A candidate that is to be measured: what it is made of, and its answers to all of select."""

    candidate: Candidate
    artefact: Artefact
    key: str
    select: tuple[Item, ...]


class Explorer:
    """The search over one problem, into one book. `say` is told what is going on."""

    def __init__(
        self,
        problem: Problem,
        book: Book,
        machine: Machine,
        config: SearchConfig,
        *,
        say: Callable[[str, int, int], None],
    ) -> None:
        self._problem = problem
        self._book = book
        self._machine = machine
        self._config = config
        self._say = say
        self.lost: list[Lost] = []

    def run(self, candidates: Sequence[Candidate]) -> list[Finalist]:
        """The finalists, in the order of their promise. `lost` says what became of the others."""
        alive = list(candidates)
        rivals = [each for each in alive if not each.is_control]
        shares = self._config.shares if len(rivals) > self._config.max_finalists else self._config.shares[-1:]
        finalists: list[Finalist] = []
        for number, share in enumerate(shares):
            finalists = [each for each in (self._round(c, share) for c in alive) if each is not None]
            is_last = number + 1 == len(shares)
            keep = self._config.max_finalists
            if not is_last:
                keep = max(keep, math.ceil(len(finalists) / 2))
            finalists = self._kept(finalists, keep, share)
            alive = [each.candidate for each in finalists]
        return finalists

    def workshop(self, key: str) -> Workshop:
        """Where a candidate with this key is made."""
        problem = self._problem
        return Workshop(
            folder=self._book.run.path / "candidates" / key[:_NAME_CHARS],
            train=problem.train,
            select=problem.select,
            labels=problem.labels,
            seed=self._config.seed,
            usd_per_hour=problem.usd_per_hour,
            progress=self._say,
        )

    def _round(self, candidate: Candidate, share: float) -> Finalist | None:
        """Make a candidate at this share, and let it answer this share of select; None if it is lost."""
        key = select_key(candidate, self._problem, share, self._config.seed)
        artefact = self._made(candidate, key, share)
        if artefact is None:
            return None
        num = max(1, math.ceil(share * len(self._problem.select)))
        is_whole = share == 1.0 or not candidate.is_trained
        try:
            if is_whole and not candidate.is_control and num > 2 * _FIRST_ROWS:
                first = self._answers(candidate, artefact, key, _FIRST_ROWS)
                if self._reach(first, _HOPELESS)[0] < self._bar(first):
                    self._lose(candidate, "explore", self._why(first, share, _HOPELESS))
                    return None
            items = self._answers(candidate, artefact, key, num)
        except StorageError:
            raise
        except TokenmillError as error:
            self._lose(candidate, "explore", str(error))
            return None
        return Finalist(candidate, artefact, key, items)

    def _made(self, candidate: Candidate, key: str, share: float) -> Artefact | None:
        known = self._book.made(key)
        if known is None:
            self._say(f"making {candidate.name}", 0, 1)
            workshop = self.workshop(key)
            try:
                known = candidate.make(workshop, share)
                self._book.keep_made(key, candidate.name, known)
            except StorageError:
                raise
            except TokenmillError as error:
                known = str(error)
                self._book.keep_made(key, candidate.name, None, known)
        if isinstance(known, str):
            self._lose(candidate, "make", known)
            return None
        return known

    def _answers(self, candidate: Candidate, artefact: Artefact, key: str, num: int) -> tuple[Item, ...]:
        """The lines of the first rows of select; those that are missing are asked."""
        wanted = self._problem.select[:num]
        known = self._book.selected(key)
        missing = [case for case in wanted if case.id not in known]
        if missing:
            self._say(f"exploring {candidate.name}", 0, len(missing))
            began_s = time.monotonic()
            items = asyncio.run(self._ask(candidate, artefact, key, missing))
            self._book.keep_selected(key, items)
            self._keep_round(candidate, key, num, time.monotonic() - began_s)
        known = self._book.selected(key)
        return tuple(known[case.id] for case in wanted)

    async def _ask(
        self, candidate: Candidate, artefact: Artefact, key: str, cases: Sequence[Case]
    ) -> tuple[Item, ...]:
        async with candidate.opened(artefact, self.workshop(key)) as opened:
            return await answer(candidate.name, opened, cases, self._problem.rules, self._machine)

    def _keep_round(self, candidate: Candidate, key: str, num: int, seconds: float) -> None:
        items = list(self._book.selected(key).values())[:num]
        score = mean_interval([each.score for each in items], bounds=(0.0, 1.0))
        explored = Explored(
            candidate=candidate.name,
            share=num / len(self._problem.select),
            num_items=len(items),
            score=Range.of(score),
            usd=math.fsum(each.usd for each in items) / len(items),
            seconds=seconds,
        )
        self._book.keep_explored(f"{key}:{num}", explored)

    def _kept(self, found: Sequence[Finalist], keep: int, share: float) -> list[Finalist]:
        """Controls, and the best of the others."""
        rivals = sorted((each for each in found if not each.candidate.is_control), key=self._promise)
        for each in rivals[keep:]:
            self._lose(each.candidate, "explore", self._why(each.select, share, _UNLIKELY))
        kept = {each.key for each in rivals[:keep]}
        ordered = [each for each in found if each.candidate.is_control]
        return [*ordered, *(each for each in rivals if each.key in kept)]

    def _promise(self, finalist: Finalist) -> tuple[int, float]:
        """Smaller is better: who reaches the bar, by cost; who still may, and who may not, by score."""
        reach, score = self._reach(finalist.select, _UNLIKELY)
        bar = self._bar(finalist.select)
        if score >= bar:
            cost = math.fsum(each.usd for each in finalist.select) / len(finalist.select)
            return 0, cost / max(score, 1e-6)
        return (1 if reach >= bar else 2), -score

    def _reach(self, items: Sequence[Item], alpha: float) -> tuple[float, float]:
        """The most that its score may be, but for a probability of `alpha`, and the score."""
        mean = math.fsum(each.score for each in items) / len(items)
        if self._problem.bar.absolute is not None:
            found = mean_interval([each.score for each in items], confidence=1 - 2 * alpha, bounds=(0.0, 1.0))
            return found.high, mean
        incumbent = math.fsum(each.incumbent_score for each in items) / len(items)
        evidence = paired([each.score for each in items], [each.incumbent_score for each in items])
        return incumbent + evidence.upper(alpha), mean

    def _bar(self, items: Sequence[Item]) -> float:
        bar = self._problem.bar
        if bar.absolute is not None:
            return bar.absolute
        return math.fsum(each.incumbent_score for each in items) / len(items) - bar.margin

    def _why(self, items: Sequence[Item], share: float, alpha: float) -> str:
        reach, score = self._reach(items, alpha)
        bar = self._bar(items)
        rows = f"on {len(items)} rows of select"
        if reach < bar:
            return f"{rows} it scores {score:.3f}, at most {reach:.3f}; {bar:.3f} is needed"
        return f"{rows} others promised more: it scores {score:.3f} (share of training {share:g})"

    def _lose(self, candidate: Candidate, stage: Stage, reason: str) -> None:
        self.lost.append(Lost(candidate=candidate.name, stage=stage, reason=reason))


def select_key(candidate: Candidate, problem: Problem, share: float, seed: int) -> str:
    """The hash of everything that decides what a candidate answers at a share of its training."""
    return content_hash(
        {
            "recipe": dict(candidate.recipe),
            "share": share if candidate.is_trained else 1.0,
            "splits": problem.digests["splits"],
            "rules": problem.digests["rules"],
            "engine": problem.digests["engine"],
            "seed": seed,
        }
    )
