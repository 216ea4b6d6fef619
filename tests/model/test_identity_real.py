"""Nothing that the engine does to a request changes its tokens, greedy or sampled: the default model.

Each test asks for the same answers, which were made one request at a time without a prefix cache, and says
by a count that what it is about did happen.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.fast.proposer_fakes import eager_guesses
from tests.model.identity import Ask, Driven, check_lookup, drafting_in
from tokenmill.core import Grammar, SamplingParams, Tier
from tokenmill.engine.config import LLMConfig
from tokenmill.engine.sequence import GenerationState
from tokenmill.engine.structured.grammar import GrammarState
from tokenmill.engine.taps.tap import Tap, TapRows, ablate, steer
from tokenmill.kernels import KV_BLOCK, F32Array
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory

NUM_TOKENS = 48
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.8, seed=11)
TEXTS = (
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b\n\n\ndef multiply(",
    "Once upon a time there was",
    "A note. " * 26 + "Write about bread. The first thing to say is",
    "Copy this list: apples, pears, plums, figs, dates.\nThe list: apples, pears,",
    "A note. " * 41 + "Write about rain. The first thing to say is",
)
BLOWN_UP = 3e38


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ModelDirectory:
    return ModelDirectory.open(model_dir)


@pytest.fixture(scope="module")
def asks(model: ModelDirectory) -> list[Ask]:
    """Each text greedily, and sampled with a seed of its own."""
    encode = model.tokenizer().encode
    return [
        Ask(encode(text), params)
        for index, text in enumerate(TEXTS)
        for params in (GREEDY, replace(SAMPLED, seed=index))
    ]


Answers = list[tuple[int, ...]]
Baseline = Callable[[WeightFormat], Answers]


@pytest.fixture(scope="module")
def baseline(model: ModelDirectory, asks: list[Ask]) -> Baseline:
    """What each request gets in a format of the weights: alone, or in dear formats all together."""
    known: dict[WeightFormat, Answers] = {}

    def answers(weights: WeightFormat) -> Answers:
        if weights not in known:
            driven = Driven(model, LLMConfig(weights=weights, prefix_cache=False))
            known[weights] = driven.alone(asks) if weights == "w8a8" else driven.answers(asks)
        return known[weights]

    return answers


@pytest.fixture(scope="module")
def expected(baseline: Baseline) -> Answers:
    found = baseline("w8a8")
    assert len(set(found)) == len(found), "an engine that mixes requests up would be seen"
    return found


def test_a_prefix_hit_is_a_miss(model: ModelDirectory, asks: list[Ask], expected: Answers) -> None:
    driven = Driven(model)
    assert driven.answers(asks) == expected
    again = driven.finish(asks)
    assert [state.completion().token_ids for state in again] == expected
    assert sum(state.num_cached for state in again) >= 4 * 2 * KV_BLOCK
    # The first answer becomes part of the prompt: blocks filled by decoding serve a prompt.
    longer = Ask((*asks[4].prompt, *expected[4]), GREEDY)
    (state,) = driven.finish([longer])
    assert state.num_cached > len(asks[4].prompt)
    assert state.completion().token_ids == Driven(model, LLMConfig(prefix_cache=False)).answers([longer])[0]


@pytest.mark.parametrize(
    ("weights", "swaps"), [("w8a8", False), ("w8a8", True), ("w4a8", True), ("bf16", False)]
)
def test_preempted_is_undisturbed(
    model: ModelDirectory, asks: list[Ask], baseline: Baseline, weights: WeightFormat, swaps: bool
) -> None:
    num_tokens = 9 * KV_BLOCK
    config = LLMConfig(
        weights=weights, kv_tokens=num_tokens, swap_tokens=10 * num_tokens if swaps else 0, prefix_cache=False
    )
    driven = Driven(model, config)
    assert driven.answers(asks) == baseline(weights)
    assert driven.num_preempted > 0
    assert driven.num_swapped == (driven.num_preempted if swaps else 0)


@pytest.mark.parametrize(("weights", "max_batch"), [("w8a8", 1), ("w8a8", 16), ("w4a8", 4), ("bf16", 4)])
def test_guessed_from_what_was_seen_is_plain(
    model: ModelDirectory, asks: list[Ask], baseline: Baseline, weights: WeightFormat, max_batch: int
) -> None:
    config = LLMConfig(weights=weights, max_batch=max_batch, speculation="lookup")
    with eager_guesses():
        states = Driven(model, config).finish(asks)
    assert [state.completion().token_ids for state in states] == baseline(weights)
    assert 0 < sum(s.num_accepted for s in states) < sum(s.num_drafted for s in states)


def test_guessed_on_real_prompts_is_plain(model: ModelDirectory) -> None:
    check_lookup(model, num_prompts=24, num_tokens=48, max_batch=8)


@pytest.mark.parametrize("weights", ["w8a8", "w4a8"])
def test_guessed_by_a_draft_model_is_plain(
    model: ModelDirectory, asks: list[Ask], expected: Answers, weights: WeightFormat
) -> None:
    """The model guesses for itself, and in coarser weights, which is right less often."""
    driven = Driven(model, LLMConfig(max_batch=4), create=drafting_in(weights), draft=model)
    with eager_guesses():
        states = driven.finish(asks)
    assert [state.completion().token_ids for state in states] == expected
    num_accepted, num_drafted = sum(s.num_accepted for s in states), sum(s.num_drafted for s in states)
    assert 0 < num_accepted <= num_drafted
    assert weights == "w8a8" or num_accepted < num_drafted


def raising(rows: TapRows) -> F32Array:
    raise RuntimeError("a handler's own mistake")


def blow_up(model: ModelDirectory) -> Tap:
    """An edit whose values are finite, and what the model makes of them is not."""
    size = model.architecture.intermediate_size
    return steer("blocks.7.mlp.hook_post", np.full(size, BLOWN_UP, np.float32))


def test_neighbours_that_fail_are_not_noticed(
    model: ModelDirectory, asks: list[Ask], expected: Answers
) -> None:
    driven = Driven(model, LLMConfig(max_rows=64))
    prompt = asks[8].prompt
    dead_end = replace(GREEDY, grammar=Grammar(kind="regex", source="aaaa"), bad_words=("a", "aa", "aaaa"))
    nan = driven.submit(Ask(prompt, replace(SAMPLED, n=3)), blow_up(model))
    states = [driven.submit(ask)[0] for ask in asks]
    driven.step()
    mistake = Tap(point="blocks.3.hook_resid_post", handler=raising, intervention="mistake")
    (raised,) = driven.submit(asks[0], mistake)
    (stuck,) = driven.submit(Ask(prompt, dead_end))
    (expired,) = driven.submit(asks[2], timeout_s=1e-3)
    cancelled = driven.submit(Ask(prompt, replace(SAMPLED, n=2)))
    (early,) = driven.submit(asks[4])
    driven.step()
    driven.engine.abort(early)
    while not cancelled[1].num_output:
        driven.step()
    for each in cancelled:
        driven.engine.abort(each)
    driven.run()
    assert [state.completion().token_ids for state in states] == expected
    reasons = {state.finish_reason for state in (*cancelled, early)}
    assert reasons == {"cancelled"} and expired.finish_reason == "expired"
    assert {state.error for state in nan} == {"the model's logits are not finite numbers"}
    assert "a handler's own mistake" in raised.error and "no token may come next" in stuck.error
    # Nor by who comes later, and begins as they did.
    assert driven.answers(asks) == expected


def test_neighbours_that_are_tapped_are_not_noticed(
    model: ModelDirectory, asks: list[Ask], expected: Answers
) -> None:
    """The same prompts beside them, edited: other answers, which are those of the edit alone."""
    edits = [ablate("blocks.0.attn.hook_z"), steer("blocks.9.hook_resid_post", _direction(model))]
    driven = Driven(model, LLMConfig(speculation="lookup"))
    states = [(driven.submit(ask, edits[i % 2])[0], driven.submit(ask)[0]) for i, ask in enumerate(asks)]
    driven.run()
    assert [plain.completion().token_ids for _, plain in states] == expected
    edited = [state.completion().token_ids for state, _ in states]
    assert all(a != b for a, b in zip(edited, expected, strict=True))
    for index, ask in enumerate(asks):
        (alone,) = driven.submit(ask, edits[index % 2])
        driven.run()
        assert alone.completion().token_ids == edited[index]
    assert driven.answers(asks) == expected


def _direction(model: ModelDirectory) -> F32Array:
    size = model.architecture.hidden_size
    return np.random.default_rng(5).normal(0.0, 40.0, size).astype(np.float32)


def test_siblings_are_requests_with_their_seeds(model: ModelDirectory, asks: list[Ask]) -> None:
    prompts = [asks[0].prompt, asks[4].prompt]
    driven = Driven(model, LLMConfig(max_batch=6, speculation="lookup"))
    families = [driven.submit(Ask(prompt, replace(SAMPLED, n=4))) for prompt in prompts]
    driven.run()
    single = Driven(model, LLMConfig(prefix_cache=False))
    for prompt, family in zip(prompts, families, strict=True):
        answers = [state.completion().token_ids for state in family]
        assert len(set(answers)) == 4
        assert single.alone([Ask(prompt, replace(SAMPLED, seed=s.seed)) for s in family]) == answers


@pytest.mark.parametrize("max_rows", [17, 64, 512])
def test_chunks_of_any_size_are_one(
    model: ModelDirectory, asks: list[Ask], expected: Answers, max_rows: int
) -> None:
    driven = Driven(model, LLMConfig(max_rows=max_rows, max_batch=10))
    assert driven.answers(asks) == expected


def test_a_cache_in_int8_changes_no_rule(model: ModelDirectory, asks: list[Ask]) -> None:
    alone = Driven(model, LLMConfig(kv_dtype="int8", prefix_cache=False)).alone(asks)
    roomy = Driven(model, LLMConfig(kv_dtype="int8", max_rows=64, speculation="lookup"))
    assert [roomy.answers(asks), roomy.answers(asks)] == [alone, alone]
    tight = Driven(
        model, LLMConfig(kv_dtype="int8", kv_tokens=9 * KV_BLOCK, max_rows=64, swap_tokens=4 * KV_BLOCK)
    )
    assert tight.answers(asks) == alone
    assert 0 < tight.num_swapped < tight.num_preempted, "both ways"


SCHEMA = """{"type": "object", "properties": {"name_of_the_city": {"type": "string", "maxLength": 20},
"number_of_inhabitants": {"type": "integer"}, "kind_of_place": {"enum": ["capital", "village"]}},
"required": ["name_of_the_city", "number_of_inhabitants", "kind_of_place"], "additionalProperties": false}"""


def test_text_that_is_forced_by_a_grammar_is_what_is_drawn(
    model: ModelDirectory, asks: list[Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = Grammar(kind="json_schema", source=SCHEMA)
    bound = [Ask(a.prompt, replace(a.params, ignore_eos=False, grammar=grammar)) for a in asks]
    with eager_guesses():
        guessed = Driven(model, LLMConfig(speculation="lookup")).finish(bound)
    assert sum(state.num_accepted for state in guessed) > 0
    monkeypatch.setattr(GrammarState, "forced", lambda self: ())
    plain = Driven(model, LLMConfig(prefix_cache=False)).finish(bound)
    assert sum(state.num_drafted for state in plain) == 0
    assert _tokens(guessed) == _tokens(plain)


def _tokens(states: Sequence[GenerationState]) -> list[tuple[int, ...]]:
    return [state.completion().token_ids for state in states]


def test_all_of_it_at_once(model: ModelDirectory, asks: list[Ask], expected: Answers) -> None:
    """A tight cache, small steps, guesses of both kinds, tiers, forks, edits and a failing neighbour."""
    config = LLMConfig(
        kv_tokens=7 * KV_BLOCK, swap_tokens=2048, max_rows=48, max_batch=12, speculation="lookup"
    )
    driven = Driven(model, config, create=drafting_in("w4a8"), draft=model)
    family = driven.submit(Ask(asks[1].prompt, replace(asks[1].params, n=3)))
    driven.submit(asks[4], blow_up(model))
    tiers: tuple[Tier, ...] = ("batch", "standard", "fast")
    states = [driven.submit(ask, tier=tiers[i % 3])[0] for i, ask in enumerate(asks[:5])]
    for _ in range(9):
        driven.step()
    driven.submit(asks[8], ablate("blocks.0.attn.hook_z"))
    states += [driven.submit(ask, tier=tiers[i % 3])[0] for i, ask in enumerate(asks[5:])]
    with eager_guesses():
        driven.run()
    assert [state.completion().token_ids for state in states] == expected
    assert family[0].completion().token_ids == expected[1]
    assert driven.num_swapped > 0, driven.num_preempted
    assert sum(state.num_accepted for state in states) > 0
