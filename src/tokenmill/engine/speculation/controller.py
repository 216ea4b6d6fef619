"""How much to speculate: what to ask of a proposer, which drafts to verify, and when to stop.

The policy, in three parts that share the step-time model:

- Asking. A sequence is asked for one draft more than twice its average of accepted ones. A draft that is
  accepted whole raises the average at once, one that is not pulls it down slowly.
- Choosing. The draft tokens of the batch, each with its chance (the proposer's estimates, corrected by the
  sequence's own past), are taken in order of chance; as many are verified as make the expected tokens a
  second most. None is often the answer: then the step is a plain one.
- Stopping. An account in seconds holds what speculation may lose. Every step pays in 1.5 % of its plain
  time; accepted tokens pay in the time they would have taken; proposing and extra rows are paid from it,
  as measured. While it is overdrawn nothing is asked. So in the long run speculation costs 1.5 % at most,
  and where it loses it is still tried now and then. A proposer that must catch up first is charged for
  that in instalments, so that it can earn them.

No clock is read, times are passed in; the same calls give the same answers. What is asked and verified
never changes the text, so nothing here is about correctness.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenmill.engine.speculation.proposers import Calibration, Draft, SequenceKey
from tokenmill.engine.step_time import ROW_TILE, StepTimeModel

__all__ = ["Offer", "SpeculationConfig", "SpeculationController", "StepLoad"]

_START_ACCEPTED = 2.0
_RATE = 0.25
_MIN_CHANCE = 0.02
_ALLOWANCE = 0.015
# The account, in plain steps: what it starts with, the most it holds, the most that one step is charged.
_START_STEPS = 1.0
_MAX_STEPS = 8.0
_MAX_CHARGE_STEPS = 4.0
_INSTALMENT = 0.25


@dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """`max_drafts` bounds the draft tokens of a sequence in a step; with its own row they fill a tile."""

    max_drafts: int = ROW_TILE - 1

    def __post_init__(self) -> None:
        assert 0 < self.max_drafts < 1024, self


class Offer(NamedTuple):
    """A sequence and what was proposed for it."""

    key: SequenceKey
    draft: Draft


class StepLoad(NamedTuple):
    """A step as it would be without drafts; `num_decodes` of its sequences lack one token only."""

    num_rows: int
    num_kv_tokens: int
    num_out_rows: int
    num_decodes: int


class SpeculationController:
    """Decides for one engine. A step asks `wanted` and `choose` before it runs, and tells after it."""

    def __init__(self, step_time: StepTimeModel, config: SpeculationConfig | None = None) -> None:
        self._step_time = step_time
        self._config = config or SpeculationConfig()
        self._pasts: dict[SequenceKey, _Past] = {}
        self._account_s: float | None = None
        self._owed_s = 0.0

    @property
    def active(self) -> bool:
        """False while speculation loses time and is stopped."""
        return self._account_s is None or self._account_s >= 0.0

    def wanted(self, key: SequenceKey) -> int:
        """How many drafts to ask for; 0 while stopped."""
        if not self.active:
            return 0
        past = self._pasts.setdefault(key, _Past())
        return min(self._config.max_drafts, 1 + round(2 * past.mean_accepted))

    def choose(self, offers: Sequence[Offer], load: StepLoad, *, room: int) -> list[int]:
        """How many tokens of each draft to verify, at most `room` in all."""
        ranked = sorted(self._chances(offers), key=lambda each: -each[0])[:room]
        plain_s = self._predict(load)
        decode_s = self._decode_seconds(load)
        best_num, best_rate = 0, load.num_decodes / decode_s
        expected = float(load.num_decodes)
        for num, (chance, _) in enumerate(ranked, start=1):
            expected += chance
            rate = expected / (decode_s + self._predict(load, num) - plain_s)
            if rate > best_rate:
                best_num, best_rate = num, rate
        lengths = [0] * len(offers)
        for _, index in ranked[:best_num]:
            lengths[index] += 1
        return lengths

    def observe(self, key: SequenceKey, draft: Draft, num_accepted: int) -> None:
        """Learn how many tokens of a draft, as far as it was verified, were right."""
        if draft.tokens:
            self._pasts.setdefault(key, _Past()).update(draft, num_accepted)

    def record(
        self, load: StepLoad, *, num_drafts: int, num_accepted: int, seconds: float, propose_seconds: float
    ) -> None:
        """Settle a step: `seconds` it took but for proposing, with `num_drafts` verified rows in it."""
        plain_s, decode_s = self._predict(load), self._decode_seconds(load)
        account_s = _START_STEPS * plain_s if self._account_s is None else self._account_s
        account_s += _ALLOWANCE * plain_s
        if num_drafts:
            charge_s = propose_seconds + seconds - plain_s
            account_s += num_accepted * decode_s / load.num_decodes
            account_s -= min(charge_s, _MAX_CHARGE_STEPS * plain_s)
        else:
            self._owed_s += propose_seconds
        paid_s = min(self._owed_s, _INSTALMENT * plain_s)
        self._owed_s -= paid_s
        self._account_s = min(account_s - paid_s, _MAX_STEPS * plain_s)

    def forget(self, key: SequenceKey) -> None:
        """Drop what is known of a sequence that ended. No-op if it is unknown."""
        self._pasts.pop(key, None)

    def _chances(self, offers: Sequence[Offer]) -> list[tuple[float, int]]:
        """For each draft token the chance that it is reached and right, and whose it is; in draft order."""
        chances = []
        for index, (key, draft) in enumerate(offers):
            chance = 1.0
            for probability in self._pasts.setdefault(key, _Past()).calibration.apply(draft.probabilities):
                chance *= probability
                if chance < _MIN_CHANCE:
                    break
                chances.append((chance, index))
        return chances

    def _predict(self, load: StepLoad, num_drafts: int = 0) -> float:
        return self._step_time.predict(
            load.num_rows + num_drafts, load.num_kv_tokens, load.num_out_rows + num_drafts
        )

    def _decode_seconds(self, load: StepLoad) -> float:
        """A step of the decoding sequences alone: what a token costs, whatever prompts run beside it."""
        return self._step_time.predict(load.num_decodes, load.num_kv_tokens, load.num_decodes)


class _Past:
    """What became of the drafts of one sequence."""

    def __init__(self) -> None:
        self.calibration = Calibration()
        self.mean_accepted = _START_ACCEPTED

    def update(self, draft: Draft, num_accepted: int) -> None:
        self.calibration.update(draft.probabilities, num_accepted)
        if num_accepted == len(draft.tokens):
            self.mean_accepted = max(self.mean_accepted, float(num_accepted))
        else:
            self.mean_accepted += _RATE * (num_accepted - self.mean_accepted)
