"""Guessing as part of the step loop: asks for drafts before a step is planned, settles them after it ran.

    running sequences ─► proposer ─► controller: how many are worth their rows ─► state.drafts
    step ─► tokens that stood ─► proposer and controller learn; the step's time is compared with a plain one

Verification needs nothing from here: a guess stands if the model draws the same token (`core.py`), so
answers are those of plain decoding whatever is guessed.
"""

from array import array
from collections.abc import Callable
from typing import NamedTuple

from tokenmill.engine.proposers import Draft, DraftRow, Proposer
from tokenmill.engine.scheduler import Schedule, Scheduler
from tokenmill.engine.sequence import GenerationState
from tokenmill.engine.speculation import Offer, SpeculationController, StepLoad
from tokenmill.engine.step_time import StepTimeModel

__all__ = ["Speculator"]


class _Attached(NamedTuple):
    """A draft that a sequence goes into the step with, and what it had had accepted before."""

    state: GenerationState
    draft: Draft
    num_accepted: int


class Speculator:
    """Guesses for one engine. `clock` returns seconds."""

    def __init__(self, proposer: Proposer, step_time: StepTimeModel, *, clock: Callable[[], float]) -> None:
        self._proposer = proposer
        self._controller = SpeculationController(step_time)
        self._clock = clock
        self._attached: dict[int, _Attached] = {}
        self._propose_s = 0.0

    def guess(self, scheduler: Scheduler) -> None:
        """Attach drafts to running sequences, where they are expected to pay."""
        began_s = self._clock()
        self._attached = {}
        running = scheduler.running
        decoding = [s for s in running if isinstance(s, GenerationState) and s.num_pending == 1]
        states = [state for state in decoding if state.can_draft]
        rows = [row for row in map(self._row, states) if row.max_tokens > 0]
        if rows:
            by_key = {state.arrival: state for state in states}
            offers = [
                Offer(row.key, draft) for row, draft in zip(rows, self._proposer.propose(rows), strict=True)
            ]
            load = StepLoad(
                num_rows=min(scheduler.limits.max_rows, sum(state.num_pending for state in running)),
                num_kv_tokens=sum(state.num_total for state in decoding),
                num_out_rows=len(decoding),
                num_decodes=len(decoding),
            )
            room = scheduler.limits.max_out_rows - len(decoding)
            for offer, length in zip(offers, self._controller.choose(offers, load, room=room), strict=True):
                self._attach(by_key[int(offer.key)], offer.draft.cut(length))
        self._propose_s = self._clock() - began_s

    def settle(self, schedule: Schedule, seconds: float) -> None:
        """Learn from a step that took `seconds`, guessing not counted."""
        num_drafts = num_accepted = 0
        for chunk in schedule.chunks:
            attached = self._attached.get(chunk.sequence.arrival)
            if attached is None or not chunk.num_drafts:
                continue
            accepted = attached.state.num_accepted - attached.num_accepted
            draft = attached.draft.cut(chunk.num_drafts)
            self._proposer.observe(chunk.sequence.arrival, draft, accepted)
            self._controller.observe(chunk.sequence.arrival, draft, accepted)
            num_drafts, num_accepted = num_drafts + chunk.num_drafts, num_accepted + accepted
        num_decodes = sum(chunk.num_rows - chunk.num_drafts == 1 for chunk in schedule.chunks)
        if num_decodes:
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

    def forget(self, state: GenerationState) -> None:
        """Drop what is kept of a sequence that ended."""
        self._proposer.forget(state.arrival)
        self._controller.forget(state.arrival)

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

    def _attach(self, state: GenerationState, draft: Draft) -> None:
        if draft.tokens:
            state.drafts = array("i", draft.tokens)
            self._attached[state.arrival] = _Attached(state, draft, state.num_accepted)
