"""The step loop where several rare things meet: half-done steps, forks, guesses, grammars, deadlines."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.fast import tap_tools
from tests.fast.engine_fakes import FakeModel, fake_adapter, fake_model
from tests.fast.test_core import GREEDY, PROMPTS, Bench, guess, sampled
from tokenmill.core import Grammar, ModelFormatError, NotFoundError, Request, ResourceError, SamplingParams
from tokenmill.engine.adapters import AdapterSlot
from tokenmill.engine.config import LLMConfig
from tokenmill.engine.llm import LLM, Progress
from tokenmill.engine.local import LocalEngine
from tokenmill.engine.mock import MockModel, MockScript
from tokenmill.engine.sequence import GenerationState
from tokenmill.engine.speculation.proposers import Draft, DraftRow
from tokenmill.engine.structured.grammar import GrammarState
from tokenmill.engine.taps.points import FINAL_NORM
from tokenmill.engine.taps.tap import Recording, TapRows
from tokenmill.kernels import StepBatch


def broken_once(run: Callable[..., None], at_run: int) -> Callable[..., None]:
    """An executor's run that raises the first time that it is called with this number."""
    count = 0

    def broken(batch: StepBatch, first: int = 0, last: int | None = None) -> None:
        nonlocal count
        count += 1
        if count == at_run:
            raise RuntimeError("once")
        run(batch, first, last)

    return broken


class Breaking(Bench):
    """Raises in the executor's run with number `at_run`, counted from when it is set."""

    at_run = 0

    def break_at(self, at_run: int) -> None:
        executor = self.model.executor
        executor.run = broken_once(executor.run, at_run)  # type: ignore[method-assign]


SCORED = SamplingParams(max_tokens=3, prompt_logprobs=0)


@pytest.mark.parametrize("at_run", [2, 3])
@pytest.mark.parametrize("num_prompt", range(29, 35))
def test_a_step_that_breaks_off_between_two_groups_of_rows_fails_nobody(num_prompt: int, at_run: int) -> None:
    """Tokens were chosen for the rows of the first group, and then nothing counted as computed."""
    bench = Breaking(max_batch=4)
    prompts = [[5 * i % 256 for i in range(num_prompt)], [9] * (num_prompt + 1)]
    states = [bench.submit(prompt)[0] for prompt in prompts]
    bench.engine.step()
    (scored,) = bench.submit(range(11), SCORED)
    bench.break_at(at_run)
    bench.run()
    assert [s.completion().token_ids for s in states] == [bench.reference(prompt) for prompt in prompts]
    assert scored.finish_reason == "length" and len(scored.completion().prompt_logprobs or ()) == 10


@pytest.mark.parametrize("stopped", [(), (0,), (1,), (0, 2), (0, 1, 2)])
def test_a_fork_of_a_step_that_breaks_off_is_made_later(stopped: tuple[int, ...]) -> None:
    """Some of the completions end at their first token."""
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=4, n=3)
    firsts = [state.completion().token_ids[0] for state in _ran(Bench(), params)]
    params = replace(params, stop_token_ids=tuple(firsts[i] for i in stopped))
    expected = [state.completion() for state in _ran(Bench(), params)]
    assert {each.index for each in expected if len(each.token_ids) == 1} == set(stopped)
    bench = Breaking(max_batch=4)
    states = bench.submit([7] * 40, params)
    bench.submit(range(11), SCORED)
    bench.break_at(2)
    finished = bench.run()
    assert [each.completion().token_ids for each in states] == [each.token_ids for each in expected]
    assert [each.finish_reason for each in states] == [each.finish_reason for each in expected]
    assert len(finished) == 4


def _ran(bench: Bench, params: SamplingParams) -> tuple[GenerationState, ...]:
    states = bench.submit([7] * 40, params)
    bench.run()
    return states


def test_cancelling_a_completion_that_did_not_begin_leaves_the_others_together() -> None:
    bench = Bench(max_rows=16, prefix_cache=False)
    states = bench.submit([1] * 100, sampled(1, n=3))
    bench.engine.step()
    bench.engine.abort(states[1])
    num_rows = 16
    while bench.engine.has_work:
        num_rows += bench.engine.step().stats.num_rows
        bench.engine.check_integrity()
    assert [state.finish_reason for state in states] == ["length", "cancelled", "length"]
    assert num_rows == 100 + 2 * 19, "the prompt is computed once"


HELLO = Grammar(kind="regex", source="hello, [a-z]{6}")


@pytest.mark.parametrize("num_prompt", [32, 33, 34])
def test_completions_follow_their_grammar_though_the_first_has_guesses(num_prompt: int) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3, n=3, grammar=HELLO)
    texts = []
    for max_rows in (32, 64):
        bench = Bench(max_rows=max_rows)
        states = bench.submit([1] * num_prompt, params)
        if max_rows == 32 and num_prompt == 33:
            bench.engine.step()
            guess(states[0], list(b"hello, "))
        bench.run()
        bench.engine.close()
        assert [state.finish_reason for state in states] == ["completed"] * 3, states[0].error
        texts.append([state.completion().text for state in states])
    assert texts[0] == texts[1]


ANY_TEXT = r"[\s\S]*"


@pytest.mark.parametrize("source", [HELLO.source, ANY_TEXT, "[a-m]*|[n-z]{3,9}(once|twice)"])
def test_a_mask_after_the_best_token_or_before_it_is_the_same(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks, counts = GrammarState.masks, list[int]()

    def count(state: GrammarState, *args: Any) -> int:
        counts[-1] += 1
        return masks(state, *args)

    monkeypatch.setattr(GrammarState, "masks", count)
    late = SamplingParams(
        max_tokens=30,
        grammar=Grammar(kind="regex", source=source),
        logprobs=2,
        presence_penalty=1.5,
        bad_words=("b", "he"),
        min_tokens=4,
    )
    # To the sampler this is greedy too, but whoever draws gets the masks first.
    early = replace(late, temperature=1e-6)
    results = []
    for params in (late, early):
        counts.append(0)
        bench = Bench()
        states = [bench.submit(prompt, params)[0] for prompt in PROMPTS]
        bench.run()
        bench.engine.close()
        ended = [state.completion() for state in states]
        results.append([(each.token_ids, each.logprobs, each.finish_reason, each.error) for each in ended])
    assert results[0] == results[1]
    assert counts[0] <= counts[1] / (2 if source == ANY_TEXT else 1)


class Troubled:
    """A proposer that guesses, and raises where it is told to."""

    def __init__(self, *, raises: str) -> None:
        self.raises = raises

    def _check(self, where: str) -> None:
        if where == self.raises:
            raise RuntimeError(where)

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        self._check("propose")
        return [Draft((1, 2), (0.9, 0.9)) for _ in rows]

    def observe(self, key: int | str, draft: Draft, num_accepted: int) -> None:
        self._check("observe")

    def forget(self, key: int | str) -> None:
        self._check("forget")


@pytest.mark.parametrize("where", ["propose", "observe", "forget"])
@pytest.mark.parametrize("num", [1, 3])
def test_a_proposer_that_raises_fails_nobody(where: str, num: int) -> None:
    bench = Bench()
    bench.engine._core._speculator._proposer = Troubled(raises=where)
    states = [bench.submit(prompt)[0] for prompt in PROMPTS[:num]]
    bench.run()
    assert [s.completion().token_ids for s in states] == [bench.reference(p) for p in PROMPTS[:num]]


def test_while_guessing_is_stopped_nobody_is_asked_and_the_account_fills(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    bench.engine._core._guesses = True
    speculator = bench.engine._core._speculator
    speculator._proposer = Troubled(raises="propose")
    controller = speculator._controller
    controller._account_s = -1e-9
    monkeypatch.setattr(Troubled, "propose", lambda *_: pytest.fail("asked"))
    (state,) = bench.submit(PROMPTS[0])
    while not state.num_output:
        bench.engine.step()
    assert not controller.active
    bench.engine.step()
    assert controller.active, "1.5 % of a step is more than a nanosecond"


def test_guesses_for_a_step_without_room_are_forgotten() -> None:
    bench = Bench(max_rows=1, max_batch=2)
    states = [bench.submit([i])[0] for i in range(2)]
    bench.engine.step()
    while not states[1].num_output and not states[1].finished:
        guess(states[1], [1, 2])
        bench.engine.step()
        assert not states[1].drafts
    bench.run()
    assert [s.completion().token_ids for s in states] == [bench.reference([i]) for i in range(2)]


def test_a_stop_string_within_the_least_length_does_not_end_the_text() -> None:
    bench = Bench(MockScript(answers=((b"q", b"abcabcabc"),)))
    for min_tokens, text in ((0, "a"), (2, "a"), (3, "abca"), (5, "abca"), (6, "abcabca"), (9, "abcabcabc")):
        params = SamplingParams(min_tokens=min_tokens, max_tokens=9, stop=("bc",))
        (state,) = bench.submit(b"q", params)
        texts = []
        while bench.engine.has_work:
            bench.engine.step()
            texts.append(state.take().text)
        assert (state.completion().text, "".join(texts)) == (text, text), min_tokens


def test_deadlines_keep_nothing_of_what_has_ended() -> None:
    bench = Bench()
    for _ in range(50):
        for i in range(10):
            bench.submit([i], SamplingParams(max_tokens=1), timeout_s=1e6)
        bench.run()
    assert len(bench.engine._core._expiries) < 200


def test_an_urgent_prompt_gets_on_where_every_step_is_long() -> None:
    bench = Bench(MockScript(step_s=0.5, row_s=0.002), fast_step_s=0.1, max_rows=64)
    slow = [bench.submit([i] * 20, SamplingParams(max_tokens=400, ignore_eos=True))[0] for i in range(3)]
    for _ in range(30):
        bench.engine.step()
    began_s = bench.clock.now_s
    (urgent,) = bench.submit([7] * 400, tier="fast")
    while not urgent.num_output:
        bench.engine.step()
    assert bench.clock.now_s - began_s < 6.0 and not slow[0].finished


def test_an_urgent_prompt_does_not_wait_for_the_long_prompts_of_others() -> None:
    bench = Bench(max_rows=32)
    for i in range(3):
        bench.submit([i] * 2000)
    bench.engine.step()
    (urgent,) = bench.submit([7] * 40, tier="fast")
    for _ in range(4):
        bench.engine.step()
    assert urgent.num_output


def test_an_adapter_that_was_unloaded_since_is_not_used() -> None:
    fake = FakeModel(256)
    engine = LocalEngine(fake_model(fake), LLMConfig(max_adapters=1), create=fake.create)
    executor = fake.executor
    assert executor is not None

    def load(name: str, digest: str) -> None:
        executor.set_adapter(0, fake_adapter(digest))
        engine.adapters._free = []
        engine.adapters._loaded = {name: AdapterSlot(0, digest)}

    load("a", "aa11")
    states = engine.prepare(Request(request_id="r", prompt=(1, 2), params=GREEDY, adapter="a"))
    engine.unload_adapter("a")
    load("b", "bb22")
    with pytest.raises(NotFoundError, match="adapter"):
        engine.submit_state(states[0])
    assert not engine.has_work


class Grumpy:
    """A grammar state that reaches a limit while somebody guesses."""

    num_words = 9
    finished = False

    def allows(self, token_id: int) -> bool:
        return False

    def forced(self) -> tuple[int, ...]:
        raise ResourceError("too much to follow")

    def num_valid(self, tokens: Sequence[int]) -> int:
        raise ResourceError("too much to follow")

    def masks(self, drafts: Sequence[int], mask_rw: npt.NDArray[np.uint32]) -> int:
        mask_rw[:] = 0xFFFFFFFF
        return 1 + len(drafts)

    def accept(self, token_id: int) -> None:
        pass


def test_a_limit_that_is_reached_while_guessing_ends_nothing() -> None:
    bench = Bench()
    (state,) = bench.submit([3, 4], SamplingParams(max_tokens=5, ignore_eos=True))
    state.grammar = Grumpy()  # type: ignore[assignment]
    bench.run()
    assert (state.finish_reason, state.num_output) == ("length", 5)


def test_what_was_cancelled_alone_may_be_cancelled_with_its_family() -> None:
    bench = Bench(max_rows=16)
    states = bench.submit([1] * 100, sampled(1, n=3))
    bench.engine.step()
    for index in (2, 0, 1):
        bench.engine.abort(states[index])
    assert [state.finish_reason for state in states] == ["cancelled"] * 3 and not bench.engine.has_work


def test_a_read_of_the_head_that_fails_fails_a_request_that_would_end_in_that_step() -> None:
    def refuse(rows: TapRows) -> None:
        if 8 in rows.positions_T:
            raise RuntimeError("no")

    core = tap_tools.engine(tap_tools.executor())
    state = tap_tools.generation("a", tap_tools.tokens(1, 20), 1, tap_tools.read(FINAL_NORM, refuse))
    other = tap_tools.generation("b", tap_tools.tokens(2, 5), 3)
    tap_tools.drive(core, [state, other])
    assert (state.finish_reason, state.error) == ("failed", "no") and other.finish_reason == "length"


def test_a_text_whose_scoring_failed_has_no_score() -> None:
    fake = FakeModel(256)
    llm = LLM(fake_model(fake), create=fake.create)
    assert fake.executor is not None
    fake.executor.fail_at = {1: RuntimeError("bad")}
    with pytest.raises(ModelFormatError, match="has no score: RuntimeError: bad"):
        llm.score(["ab"], ["cd"])


def test_a_call_that_is_broken_off_before_the_first_token_ends_every_completion() -> None:
    model = MockModel()
    llm = LLM(model, LLMConfig(max_rows=16), create=model.create)

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    for _ in range(8):  # in whatever order they are ended
        with pytest.raises(KeyboardInterrupt):
            llm.generate_tokens([[1] * 100], sampled(1, n=4), on_progress=stop)
    assert not llm._engine.has_work


def test_a_block_that_cannot_be_copied_is_not_read() -> None:
    bench = Bench()
    states = bench.submit([7] * 40, sampled(1, n=2))
    bench.submit([8] * 40)
    bench.engine.step()

    def broken(_: object) -> None:
        raise RuntimeError("copy")

    bench.model.executor.copy_blocks = broken  # type: ignore[assignment, method-assign]
    with pytest.raises(RuntimeError, match="copy"):
        bench.engine.step()
    assert [state.num_output for state in states] == [1, 1]


def test_guesses_may_go_on_in_a_new_block_though_the_cache_is_full_of_what_is_kept() -> None:
    bench = Bench(kv_tokens=320)
    for i in range(4):
        bench.answer([i] * 128, SamplingParams(max_tokens=1))
    pool = bench.engine._core.scheduler.pool
    assert pool.num_free <= 1
    prompt = [5] * 30
    (state,) = bench.submit(prompt)
    bench.engine.step()
    guess(state, bench.reference(prompt)[1:7])
    bench.engine.step()
    assert state.num_output == 8


@pytest.mark.parametrize("at_run", [2, 3, 4])
def test_what_was_read_in_a_step_that_breaks_off_is_not_read_again(at_run: int) -> None:
    executor = tap_tools.executor()
    recording = Recording()
    executor.run = broken_once(executor.run, at_run)  # type: ignore[method-assign]
    reads = [tap_tools.read(point, recording) for point in (tap_tools.POST, FINAL_NORM)]
    watched = tap_tools.scoring("s", tap_tools.tokens(1, 41), *reads)
    tap_tools.drive(tap_tools.engine(executor), [watched, tap_tools.generation("g", [1, 2], 1)])
    for read in reads:
        assert recording.rows("s", read.point).positions_T.tolist() == list(range(40))
