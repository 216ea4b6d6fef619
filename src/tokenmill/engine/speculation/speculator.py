"""Guessing as part of the step loop: asks for drafts before a step is planned, settles them after it ran.

    running sequences ─► proposer, grammar ─► controller: how many are worth their rows ─► state.drafts
    step ─► tokens that stood ─► proposer and controller learn; the step's time is compared with a plain one

Verification needs nothing from here: a guess stands if the model draws the same token (`outputs.py`), so
answers are those of plain decoding whatever is guessed. Where a grammar leaves one text only, its tokens
are guesses that cannot be wrong, and need no proposer.
"""

import contextlib
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tokenmill.core import TokenmillError
from tokenmill.engine.schedule import Schedule
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.sequence import GenerationState, SequenceState
from tokenmill.engine.speculation.controller import Offer, SpeculationController, StepLoad
from tokenmill.engine.speculation.proposers import NO_DRAFT, Draft, DraftRow, Proposer
from tokenmill.engine.step_time import ROW_TILE, StepTimeModel

__all__ = ["Speculator"]

_FORCED_CHANCE = 0.98


class _Attached(NamedTuple):
    """A draft that a sequence goes into the step with, and what it had had accepted before."""

    state: GenerationState
    draft: Draft
    num_accepted: int
    is_forced: bool


class Speculator:
    """Guesses for one engine. `clock` returns seconds. Where the proposer raises, there is no guess."""

    def __init__(
        self,
        proposer: Proposer | None,
        step_time: StepTimeModel,
        *,
        clock: Callable[[], float],
        for_fast_only: bool = False,
    ) -> None:
        self._proposer = proposer
        self._controller = SpeculationController(step_time)
        self._clock = clock
        self._for_fast_only = for_fast_only
        self._attached: dict[int, _Attached] = {}
        self._propose_s = 0.0
        self._is_idle = False
        self._asked: list[GenerationState] = []

    def has_askers(self, scheduler: Scheduler) -> bool:
        """Whether the proposer may guess for anybody who runs."""
        return not self._for_fast_only or any(each.tier == "fast" for each in scheduler.running)

    @property
    def costs(self) -> dict[SequenceState, float]:
        """Seconds that guessing took before this step, by those that were guessed for."""
        return dict.fromkeys(self._asked, self._propose_s / max(1, len(self._asked)))

    def guess(self, scheduler: Scheduler) -> None:
        """Attach drafts to running sequences, where they are expected to pay."""
        self._attached, self._propose_s, self._is_idle, self._asked = {}, 0.0, False, []
        decoding = [s for s in scheduler.running if isinstance(s, GenerationState) and s.num_pending == 1]
        # What a grammar forces is asked for where rows are free: in a tile that is not full.
        asks_grammars = len(decoding) < ROW_TILE
        states = [
            each
            for each in decoding
            if each.can_draft
            and ((self._proposer and self._asks_for(each)) or (each.grammar and asks_grammars))
        ]
        # While guessing loses time even looking on would: a proposer catches up when it is asked again.
        self._is_idle = bool(states) and not self._controller.active
        if not states or self._is_idle:
            return
        began_s, self._asked = self._clock(), states
        # Also those that want nothing now: a proposer learns from what it sees.
        rows = [self._row(state) for state in states]
        drafts = [
            self._guided(s, row, draft)
            for s, row, draft in zip(states, rows, self._propose(rows), strict=True)
        ]
        offers = [Offer(row.key, each.draft) for row, each in zip(rows, drafts, strict=True)]
        room = scheduler.limits.max_out_rows - len(decoding)
        lengths = self._controller.choose(offers, _load(scheduler, decoding), room=room)
        for attached, length in zip(drafts, lengths, strict=True):
            if length:
                attached.state.drafts = array("i", attached.draft.tokens[:length])
                self._attached[attached.state.arrival] = attached
        self._propose_s = self._clock() - began_s

    def _asks_for(self, state: GenerationState) -> bool:
        return state.tier == "fast" or not self._for_fast_only

    def settle(self, schedule: Schedule, seconds: float) -> None:
        """Learn from a step that took `seconds`, guessing not counted."""
        num_drafts = num_accepted = 0
        for chunk in schedule.chunks:
            attached = self._attached.get(chunk.sequence.arrival)
            if attached is None or not chunk.num_drafts:
                continue
            accepted = attached.state.num_accepted - attached.num_accepted
            draft = attached.draft.cut(chunk.num_drafts)
            self._controller.observe(chunk.sequence.arrival, draft, accepted)
            if self._proposer is not None and not attached.is_forced:
                with contextlib.suppress(Exception):
                    self._proposer.observe(chunk.sequence.arrival, draft, accepted)
            num_drafts, num_accepted = num_drafts + chunk.num_drafts, num_accepted + accepted
        num_decodes = sum(chunk.num_rows - chunk.num_drafts == 1 for chunk in schedule.chunks)
        if num_decodes and (num_drafts or self._propose_s or self._is_idle):
            load = StepLoad(
                num_rows=schedule.num_rows - num_drafts,
                num_kv_tokens=schedule.num_kv_tokens - num_drafts,
                num_out_rows=schedule.num_out_rows - num_drafts,
                num_decodes=num_decodes,
            )
            self._controller.record(
                load,
                num_drafts=num_drafts,
                num_accepted=num_accepted,
                seconds=seconds,
                propose_seconds=self._propose_s,
            )
        # The next step may be planned without guesses.
        self._attached, self._propose_s, self._is_idle = {}, 0.0, False

    def forget(self, state: GenerationState) -> None:
        """Drop what is kept of a sequence that ended."""
        self._controller.forget(state.arrival)
        if self._proposer is not None:
            with contextlib.suppress(Exception):
                self._proposer.forget(state.arrival)

    def _propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        """Drafts; none at all where the proposer fails, since nobody needs them."""
        drafts = [NO_DRAFT] * len(rows)
        if self._proposer is not None:
            with contextlib.suppress(Exception):
                drafts = self._proposer.propose(rows)
        return drafts

    def _guided(self, state: GenerationState, row: DraftRow, draft: Draft) -> _Attached:
        """The draft under the sequence's grammar, or what that forces."""
        if state.grammar is not None:
            room = state.max_total - state.num_total - 1
            try:
                if row.max_tokens and (forced := state.grammar.forced()[:room]):
                    sure = Draft(forced, (_FORCED_CHANCE,) * len(forced))
                    return _Attached(state, sure, state.num_accepted, True)
                draft = draft.cut(state.grammar.num_valid(draft.tokens))
            except TokenmillError:  # a limit, which sampling will meet
                draft = NO_DRAFT
        return _Attached(state, draft, state.num_accepted, False)

    def _row(self, state: GenerationState) -> DraftRow:
        room = state.max_total - state.num_total - 1
        return DraftRow(
            key=state.arrival,
            tenant=state.tenant,
            tokens=state.tokens,
            num_prompt=state.num_prompt,
            max_tokens=min(room, self._controller.wanted(state.arrival)),
            params=state.params,
            seed=state.seed,
        )


def _load(scheduler: Scheduler, decoding: Sequence[SequenceState]) -> StepLoad:
    """The next step without guesses, as far as it is known before it is planned."""
    return StepLoad(
        num_rows=min(scheduler.limits.max_rows, sum(state.num_pending for state in scheduler.running)),
        num_kv_tokens=sum(state.num_total for state in decoding),
        num_out_rows=len(decoding),
        num_decodes=len(decoding),
    )
