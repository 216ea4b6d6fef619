"""What the controller asks, chooses and stops, on machines and texts whose properties are known."""

import random
from dataclasses import dataclass

import pytest

from tokenmill.engine.speculation.controller import Offer, SpeculationConfig, SpeculationController, StepLoad
from tokenmill.engine.speculation.proposers import NO_DRAFT, Draft
from tokenmill.engine.step_time import StepTimeModel, StepTimePrior

MACHINE = StepTimePrior(base_s=7e-3, tile_s=1e-3, row_s=2e-4, out_row_s=1e-4, kv_token_s=2e-6)
"""Tiles of 16 rows, and a slope."""
FREE = StepTimePrior(base_s=1e-2, tile_s=5e-3, row_s=0.0, out_row_s=0.0, kv_token_s=0.0)
"""Rows up to the end of a tile cost nothing."""


def load_of(batch: int, num_prompt_rows: int = 0) -> StepLoad:
    return StepLoad(batch + num_prompt_rows, batch * 300, batch, batch)


def offer(key: int, *probabilities: float) -> Offer:
    return Offer(key, Draft((1,) * len(probabilities), probabilities))


def controller(prior: StepTimePrior = MACHINE) -> SpeculationController:
    return SpeculationController(StepTimeModel(prior))


@dataclass(frozen=True, kw_only=True)
class Text:
    """How often a draft token is right, what the proposer claims, and what it takes, in seconds a token."""

    right: float
    claimed: float
    propose_s: float = 0.0
    catch_up_s: float = 0.0


def gain(text: Text, batch: int, *, num_steps: int = 1500, seed: int = 0) -> float:
    """Tokens a second with speculation, over those without, on answers of 128 steps on a noisy machine."""
    rng = random.Random(seed)
    machine, learnt = StepTimeModel(MACHINE), StepTimeModel()
    control = SpeculationController(learnt)
    load = load_of(batch)
    taken_s, num_tokens = 0.0, 0
    for step in range(num_steps):
        is_new = step % 128 == 0
        if is_new:
            for key in range(batch):
                control.forget(key)
        asked = [control.wanted(key) for key in range(batch)]
        propose_s = (text.propose_s * max(asked) + 2e-5 * batch + text.catch_up_s * is_new) * any(asked)
        drafts = [Draft((1,) * n, (text.claimed,) * n) for n in asked]
        if is_new and text.catch_up_s:
            drafts = [NO_DRAFT] * batch
        offers = [Offer(key, draft) for key, draft in enumerate(drafts)]
        lengths = control.choose(offers, load, room=256)
        num_drafts, num_accepted = sum(lengths), 0
        for each, length in zip(offers, lengths, strict=True):
            num_right = 0
            while num_right < length and rng.random() < text.right:
                num_right += 1
            control.observe(each.key, each.draft.cut(length), num_right)
            num_accepted += num_right
        seconds = machine.predict(batch + num_drafts, load.num_kv_tokens, batch + num_drafts)
        seconds *= max(0.7, rng.gauss(1.0, 0.1))
        learnt.observe(batch + num_drafts, load.num_kv_tokens, batch + num_drafts, seconds)
        control.record(
            load,
            num_drafts=num_drafts,
            num_accepted=num_accepted,
            seconds=seconds,
            propose_seconds=propose_s,
        )
        taken_s += seconds + propose_s
        num_tokens += batch + num_accepted
    return num_tokens / taken_s * machine.predict(*load[:3]) / batch


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("text", [Text(right=0.0, claimed=0.5), Text(right=0.1, claimed=0.9)])
def test_text_without_repetition_costs_less_than_three_percent(text: Text, batch: int) -> None:
    assert gain(text, batch, num_steps=800) > 0.97


@pytest.mark.parametrize("batch", [1, 16])
def test_a_dear_draft_model_that_is_never_right_costs_less_than_three_percent(batch: int) -> None:
    assert gain(Text(right=0.0, claimed=0.6, propose_s=2e-3, catch_up_s=0.05), batch) > 0.97


@pytest.mark.parametrize(("batch", "least"), [(1, 4.0), (4, 2.4), (16, 1.6), (64, 1.3)])
def test_repetitive_text_is_faster(batch: int, least: float) -> None:
    assert gain(Text(right=0.9, claimed=0.6), batch, num_steps=500) > least


def test_a_good_draft_model_pays_although_it_must_catch_up_first() -> None:
    assert gain(Text(right=0.8, claimed=0.8, propose_s=1e-3, catch_up_s=0.05), 1) > 1.4


def test_without_the_account_the_same_text_would_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text(right=0.0, claimed=0.6, propose_s=2e-3)
    assert gain(text, 1, num_steps=400) > 0.97
    monkeypatch.setattr(SpeculationController, "active", property(lambda self: True))
    assert gain(text, 1, num_steps=400) < 0.9


def test_the_rows_of_a_tile_are_filled_and_no_new_one_begun_for_a_doubtful_token() -> None:
    offers = [offer(0, *[0.9] * 30)]
    assert controller(FREE).choose([offer(0, *[0.5] * 5)], load_of(1), room=99) == [5]
    (length,) = controller(FREE).choose(offers, load_of(1), room=99)
    assert length == 15
    assert controller(FREE).choose([offer(0, 0.3)], load_of(16), room=99) == [0], "a tile for 0.3 tokens"
    assert controller(FREE).choose([offer(k, 0.9) for k in range(16)], load_of(16), room=99) == [1] * 16


def test_the_likeliest_tokens_of_the_batch_come_first() -> None:
    offers = [offer(0, 0.9, 0.9, 0.9), offer(1, 0.5, 0.9), offer(2, 0.7), Offer(3, NO_DRAFT)]
    choose = controller(FREE).choose
    # Chances to be reached and right: 0.90 0.81 0.73, 0.50 0.45, 0.70.
    assert [choose(offers, load_of(4), room=room) for room in range(1, 7)] == [
        [1, 0, 0, 0],
        [2, 0, 0, 0],
        [3, 0, 0, 0],
        [3, 0, 1, 0],
        [3, 1, 1, 0],
        [3, 2, 1, 0],
    ]
    assert choose(offers, load_of(4), room=0) == [0, 0, 0, 0]
    assert choose([], load_of(0, num_prompt_rows=9), room=5) == []


def test_prompts_beside_them_make_drafts_look_neither_cheap_nor_dear() -> None:
    offers = [offer(key, 0.12) for key in range(16)]
    assert sum(controller().choose(offers, load_of(16), room=99)) == 0
    assert sum(controller().choose(offers, load_of(16, num_prompt_rows=496), room=99)) == 0
    assert controller(FREE).choose([offer(0, 0.9)], load_of(1, num_prompt_rows=497), room=99) == [1]


def test_each_sequence_is_judged_by_its_own_past() -> None:
    control = controller(FREE)
    for _ in range(20):
        control.observe(0, Draft((1, 1), (0.9, 0.9)), 0)
        control.observe(1, Draft((1, 1), (0.9, 0.9)), 2)
    assert control.wanted(0) == 1 and control.wanted(1) > 4
    offers = [offer(0, 0.95, 0.95), offer(1, 0.5, 0.5)]
    assert control.choose(offers, load_of(2), room=2) == [0, 2]
    control.forget(0)
    control.forget("unknown")
    assert control.choose(offers, load_of(2), room=2) == [2, 0], "a key that comes again is a new sequence"


def test_the_length_asked_for_grows_with_whole_drafts_and_shrinks_with_wrong_ones() -> None:
    control = SpeculationController(StepTimeModel(), SpeculationConfig(max_drafts=12))
    asked = [control.wanted(0)]
    for num_accepted in (5, 11, 0, 0, 0, 0, 0, 0, 0, 0):
        control.observe(0, Draft((1,) * asked[-1], (0.9,) * asked[-1]), min(asked[-1], num_accepted))
        asked.append(control.wanted(0))
    assert asked[:3] == [5, 11, 12] and asked[-1] <= 3
    control.observe(0, NO_DRAFT, 0)
    assert control.wanted(0) == asked[-1], "no draft says nothing"


def spend(
    control: SpeculationController, extra_s: float, *, num_accepted: int = 0, propose_s: float = 0.0
) -> None:
    load = load_of(1)
    plain_s = StepTimeModel(MACHINE).predict(*load[:3])
    control.record(
        load, num_drafts=1, num_accepted=num_accepted, seconds=plain_s + extra_s, propose_seconds=propose_s
    )


def plain_steps_until_active(control: SpeculationController) -> int:
    load, num = load_of(1), 0
    while not control.active:
        assert control.wanted(0) == 0
        plain_s = StepTimeModel(MACHINE).predict(*load[:3])
        control.record(load, num_drafts=0, num_accepted=0, seconds=plain_s, propose_seconds=0.0)
        num += 1
    return num


def test_what_is_lost_is_waited_for_and_then_tried_again() -> None:
    control = controller()
    plain_s = StepTimeModel(MACHINE).predict(*load_of(1)[:3])
    assert control.active
    spend(control, 2 * plain_s)
    assert not control.active
    assert 60 <= plain_steps_until_active(control) <= 70, "one step lost, 1.5 % a step"
    spend(control, 1000 * plain_s)
    assert plain_steps_until_active(control) < 300, "a hiccup is not charged in full"


def test_time_to_propose_counts_and_accepted_tokens_earn() -> None:
    plain_s = StepTimeModel(MACHINE).predict(*load_of(1)[:3])
    poor, rich = controller(), controller()
    for _ in range(20):
        spend(poor, 0.0, propose_s=0.5 * plain_s)
        spend(rich, 0.0, propose_s=0.5 * plain_s, num_accepted=1)
    assert rich.active and not poor.active
    for _ in range(7):
        spend(rich, plain_s)
    assert rich.active
    for _ in range(3):
        spend(rich, plain_s)
    assert not rich.active, "what was earned long ago is not all kept"


def test_catching_up_is_charged_in_instalments() -> None:
    control, load = controller(), load_of(1)
    plain_s = StepTimeModel(MACHINE).predict(*load[:3])
    control.record(load, num_drafts=0, num_accepted=0, seconds=plain_s, propose_seconds=10 * plain_s)
    assert control.active
    for _ in range(30):
        spend(control, 0.0, num_accepted=1)
    assert control.active, "it earns more than the instalments"
    control = controller()
    control.record(load, num_drafts=0, num_accepted=0, seconds=plain_s, propose_seconds=10 * plain_s)
    for _ in range(10):
        spend(control, 0.0)
    assert not control.active
    assert 500 < plain_steps_until_active(control) < 700, "and in the end it is charged in full"
