"""The step loop on the mock model: forks, deadlines, prefixes, guesses, failures; answers are known."""

from array import array
from collections.abc import Sequence
from typing import Any

import pytest

from scripts.scorecard import s14
from tests.fast.proposer_fakes import eager_guesses
from tokenmill.core import Request, SamplingParams, Tier
from tokenmill.engine import core
from tokenmill.engine.config import LLMConfig
from tokenmill.engine.local import LocalEngine
from tokenmill.engine.mock import FaultKind, MockClock, MockFault, MockModel, MockScript, reference_tokens
from tokenmill.engine.sequence import GenerationState, SequenceState
from tokenmill.models.text.byte_tokenizer import END_TOKEN

MARKER = END_TOKEN + 1
GREEDY = SamplingParams(max_tokens=40)


class Bench:
    """An engine on the mock model, and its clock."""

    def __init__(self, script: MockScript | None = None, **config: Any) -> None:
        self.clock = MockClock()
        self.script = script or MockScript()
        self.model = MockModel(self.script, sleep=self.clock.sleep)
        self.engine = LocalEngine(
            self.model,
            LLMConfig(**config),
            create=self.model.create,
            clock=self.clock,
        )
        self._num_requests = 0

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams = GREEDY,
        *,
        tier: Tier = "standard",
        timeout_s: float | None = None,
    ) -> tuple[GenerationState, ...]:
        self._num_requests += 1
        name = f"r{self._num_requests}"
        return self.engine.submit(
            Request(request_id=name, prompt=tuple(prompt), params=params, tier=tier, timeout_s=timeout_s)
        )

    def run(self) -> list[GenerationState]:
        """Step to the end; what finished, in order."""
        finished: list[GenerationState] = []
        while self.engine.has_work:
            for state in self.engine.step().finished:
                assert isinstance(state, GenerationState)
                finished.append(state)
            self.engine.check_integrity()
        assert len({id(state) for state in finished}) == len(finished), "something ended twice"
        return finished

    def answer(self, prompt: Sequence[int], params: SamplingParams = GREEDY) -> tuple[int, ...]:
        (state,) = self.submit(prompt, params)
        self.run()
        return state.completion().token_ids

    def reference(self, prompt: Sequence[int]) -> tuple[int, ...]:
        return tuple(reference_tokens(prompt, 40, self.script))


PROMPTS = [[7, i, 5 * i % 200] * (1 + 9 * i % 40) for i in range(12)]


def sampled(seed: int, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True, n=n)


def test_several_completions_of_a_prompt_are_those_of_their_seeds() -> None:
    bench = Bench()
    states = bench.submit(PROMPTS[3], sampled(5, n=4))
    bench.run()
    answers = [state.completion() for state in states]
    assert [answer.index for answer in answers] == [0, 1, 2, 3]
    assert len({answer.token_ids for answer in answers}) == 4
    assert answers[0].token_ids == bench.answer(PROMPTS[3], sampled(5)), "the first is what one alone gives"
    alone = Bench(prefix_cache=False)
    for state, answer in zip(states, answers, strict=True):
        assert alone.answer(PROMPTS[3], sampled(state.seed)) == answer.token_ids


@pytest.mark.parametrize("num_prompt", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_forks_compute_the_prompt_once(num_prompt: int, max_batch: int) -> None:
    bench = Bench(max_batch=max_batch, max_rows=64, prefix_cache=False)
    prompt = [3 * i % 256 for i in range(num_prompt)]
    bench.submit(prompt, sampled(1, n=3))
    num_rows = 0
    while bench.engine.has_work:
        num_rows += bench.engine.step().stats.num_rows
        bench.engine.check_integrity()
    assert num_rows == num_prompt + 3 * 19 if max_batch == 8 else num_rows > num_prompt + 3 * 19


def test_cancelling_before_the_first_token_ends_the_whole_request() -> None:
    bench = Bench(max_rows=16)
    states = bench.submit([1] * 100, sampled(1, n=3))
    bench.engine.step()
    bench.engine.abort(states[0])
    assert [state.finish_reason for state in states] == ["cancelled"] * 3 and not bench.engine.has_work
    bench.engine.check_integrity()


def test_cancelling_after_it_ends_one() -> None:
    bench = Bench()
    states = bench.submit([1] * 100, sampled(1, n=3))
    bench.engine.step()
    bench.engine.abort(states[0])
    bench.run()
    assert [state.finish_reason for state in states] == ["cancelled", "length", "length"]


def test_completions_cancelled_before_their_time_end_once() -> None:
    """Also if the first that waits is cancelled the others begin where the prompt ends, not before."""
    params = sampled(1, n=3)
    bench = Bench(max_rows=16)
    states = bench.submit([1] * 100, params)
    num_rows = bench.engine.step().stats.num_rows
    bench.engine.abort(states[1])
    finished = list[SequenceState]()
    while bench.engine.has_work:
        result = bench.engine.step()
        num_rows += result.stats.num_rows
        finished += result.finished
    assert finished == [states[0], states[2]] and num_rows == 100 + 2 * 19
    assert [state.finish_reason for state in states] == ["length", "cancelled", "length"]
    for timeout_s, ended in ((None, "cancelled"), (1.5, "expired")):
        bench = Bench(MockScript(step_s=1.0), max_rows=16)
        states = bench.submit([1] * 100, params, timeout_s=timeout_s)
        bench.engine.abort(states[2])
        if timeout_s is None:
            bench.engine.abort(states[0])
        assert states[2] not in bench.run()
        assert [state.finish_reason for state in states] == [ended, ended, "cancelled"]


def test_a_deadline_ends_what_runs_and_what_waits() -> None:
    bench = Bench(MockScript(step_s=1.0), max_batch=2)
    slow = SamplingParams(max_tokens=100, ignore_eos=True)
    states = [bench.submit([i], slow, timeout_s=10.5)[0] for i in range(3)]
    free = bench.submit([9], slow)[0]
    forked = bench.submit([8], sampled(1, n=2), timeout_s=3.5)
    finished = bench.run()
    assert [state.finish_reason for state in states] == ["expired"] * 3
    assert {state.finish_reason for state in forked} == {"expired"} and free.finish_reason == "length"
    assert [state.num_output for state in states] == [11, 11, 0]
    assert len(finished) == 6 and all(11.0 <= (s.finished_s or 0.0) <= 12.0 for s in states)


def test_a_prefix_hit_gives_the_same_tokens_and_is_counted() -> None:
    bench, plain = Bench(), Bench(prefix_cache=False)
    prompt = [i % 250 for i in range(200)]
    first = bench.answer(prompt)
    (state,) = bench.submit(prompt)
    num_rows = bench.engine.step().stats.num_rows
    bench.run()
    assert state.completion().token_ids == first == plain.answer(prompt) == bench.reference(prompt)
    assert state.completion().usage.num_cached_tokens == 192 and num_rows == 8
    longer = [*prompt, *first, 1, 2]
    assert bench.answer(longer) == plain.answer(longer), "what was generated is found too"


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("swap_tokens", [0, 1024])
def test_preempted_both_ways_equals_undisturbed(
    monkeypatch: pytest.MonkeyPatch, swap_tokens: int, prefix_cache: bool
) -> None:
    monkeypatch.setattr(core, "measure_swap", lambda file: 0.0)
    bench = Bench(kv_tokens=320, max_batch=6, max_rows=48, prefix_cache=prefix_cache, swap_tokens=swap_tokens)
    states = [bench.submit(prompt)[0] for prompt in PROMPTS]
    num_preempted = num_swapped = 0
    while bench.engine.has_work:
        stats = bench.engine.step().stats
        num_preempted, num_swapped = num_preempted + stats.num_preempted, num_swapped + stats.num_swapped
        bench.engine.check_integrity()
    assert [state.completion().token_ids for state in states] == [bench.reference(p) for p in PROMPTS]
    assert num_preempted > 0 and num_swapped == (num_preempted if swap_tokens else 0)


def test_the_scorecard_finds_what_it_is_about() -> None:
    """A short form; the long one, and each control for itself, are a slow test."""
    line = s14.run(cases=100, seed=5, guard=True)
    assert line.violations == 0
    assert min(float(figure) for figure in line.figures.values()) > 0, line.figures
    assert s14.run(cases=50, seed=3, guard=False).violations > 0


def guess(state: GenerationState, tokens: Sequence[int]) -> None:
    state.drafts = array("i", tokens)


@pytest.mark.parametrize("params", [GREEDY, sampled(3)])
@pytest.mark.parametrize("num_right", [0, 1, 2, 5])
def test_right_guesses_save_steps_and_no_guess_changes_an_answer(
    params: SamplingParams, num_right: int
) -> None:
    plain = Bench().answer(PROMPTS[2], params)
    bench = Bench()
    (state,) = bench.submit(PROMPTS[2], params)
    num_steps = 0
    while bench.engine.has_work:
        if state.num_output and state.num_output + 7 < len(plain):
            after = plain[state.num_output :]
            guess(state, [*after[:num_right], (after[num_right] + 1) % 200, 1])
        bench.engine.step()
        bench.engine.check_integrity()
        num_steps += 1
    assert state.completion().token_ids == plain
    assert num_steps <= 8 + len(plain) // (num_right + 1)
    assert state.num_accepted % num_right == 0 if num_right else state.num_accepted == 0


@pytest.mark.parametrize("kind", ["nan", "raise"])
@pytest.mark.parametrize("num_others", [0, 3])
def test_a_guess_at_which_the_model_fails_fails_nobody(kind: FaultKind, num_others: int) -> None:
    bench = Bench(MockScript(faults=(MockFault(kind=kind, marker=(MARKER,)),)))
    states = [bench.submit(prompt)[0] for prompt in PROMPTS[: num_others + 1]]
    bench.engine.step()
    guess(states[0], [MARKER, 1])
    bench.run()
    answers = [state.completion().token_ids for state in states]
    assert answers == [bench.reference(prompt) for prompt in PROMPTS[: num_others + 1]]
    assert states[0].num_accepted == 0


def test_a_small_batch_has_room_for_guesses() -> None:
    bench = Bench(max_batch=1, speculation="lookup")
    with eager_guesses():
        for _ in range(2):
            (state,) = bench.submit(PROMPTS[1])
            bench.run()
            assert state.completion().token_ids == bench.reference(PROMPTS[1])
    assert state.num_accepted > 10


def test_an_exception_fails_its_own_request_and_neighbours_go_on() -> None:
    bench = Bench(MockScript(faults=(MockFault(kind="raise", marker=(MARKER,)),)))
    states = [bench.submit(prompt)[0] for prompt in PROMPTS]
    bench.engine.step()
    (bad,) = bench.submit([1, 2, MARKER, 3])
    bench.run()
    assert (
        bad.finish_reason == "failed" and bad.completion().error == "RuntimeError: the mock was told to fail"
    )
    assert [s.completion().token_ids for s in states] == [bench.reference(prompt) for prompt in PROMPTS]


def test_an_exception_that_does_not_come_again_fails_nobody() -> None:
    bench = Bench(MockScript(faults=(MockFault(kind="raise", at_step=5),)))
    states = [bench.submit(prompt)[0] for prompt in PROMPTS]
    bench.run()
    assert [s.completion().token_ids for s in states] == [bench.reference(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["nan", "inf", "minus_inf"])
def test_logits_that_are_no_numbers_fail_their_row_only(kind: FaultKind) -> None:
    bench = Bench(MockScript(faults=(MockFault(kind=kind, marker=(MARKER,)),)))
    states = [bench.submit(prompt)[0] for prompt in PROMPTS]
    family = bench.submit([*range(64), MARKER], sampled(1, n=3))
    bench.run()
    assert [state.finish_reason for state in family] == ["failed"] * 3
    assert "not finite" in family[2].completion().error
    assert [s.completion().token_ids for s in states] == [bench.reference(prompt) for prompt in PROMPTS]
    (again,) = bench.submit([*range(64), 5])
    bench.run()
    assert again.num_cached == 0, "what failed is not kept"


def test_end_tokens_stop_tokens_and_the_least_length() -> None:
    bench = Bench(MockScript(answers=((b"q", b"abcdef"),)))
    plain = bench.submit(b"q")[0]
    stopped = bench.submit(b"q", SamplingParams(stop_token_ids=(ord("c"),)))[0]
    ended = bench.submit(b"q", SamplingParams(max_tokens=4))[0]
    later = bench.submit(b"q", SamplingParams(min_tokens=9, max_tokens=12))[0]
    bench.run()
    texts = [(s.completion().text, s.finish_reason) for s in (plain, stopped, ended)]
    assert texts == [("abcdef", "completed"), ("ab", "stopped"), ("abcd", "length")]
    assert later.num_output >= 9


def test_deltas_add_up_to_the_completion() -> None:
    bench = Bench()
    (state,) = bench.submit(PROMPTS[4], sampled(2))
    texts, tokens = "", tuple[int, ...]()
    while bench.engine.has_work:
        bench.engine.step()
        delta = state.take()
        texts, tokens = texts + delta.text, (*tokens, *delta.token_ids)
    assert (texts, tokens) == (state.completion().text, state.completion().token_ids)
    assert state.take() == ("", (), ())
