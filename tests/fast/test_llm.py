"""The offline engine on a model without weights: every way to compute a request gives the same tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fast.engine_fakes import (
    EOS,
    VOCAB,
    FakeExecutor,
    FakeModel,
    conversation,
    fake_hash,
    fake_logits,
    fake_model,
    reference_tokens,
)
from tokenmill.core import (
    Completion,
    Generator,
    ModelFormatError,
    ResourceError,
    SamplingParams,
    Scorer,
    UsageError,
)
from tokenmill.engine import LLM, LLMConfig, Progress
from tokenmill.kernels import KV_BLOCK

GREEDY = SamplingParams(max_tokens=40)
SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
PROMPTS = [[i + 1] * (7 * i + 1) for i in range(12)]


def open_llm(
    *,
    context: int = 256,
    template: str = "",
    max_rows: int = 512,
    max_batch: int = 64,
    kv_tokens: int | None = None,
) -> tuple[LLM, Callable[[], FakeExecutor]]:
    """An `LLM` on the fake model, and its executor."""
    fake = FakeModel(context, template)
    config = LLMConfig(max_rows=max_rows, max_batch=max_batch, kv_tokens=kv_tokens)
    llm = LLM(fake_model(fake), config, create=fake.create)

    def executor() -> FakeExecutor:
        assert fake.executor is not None
        return fake.executor

    return llm, executor


def all_blocks_are_free(llm: LLM) -> bool:
    llm._engine.check_integrity()
    return not llm._engine.has_work and llm._engine._core.scheduler.pool.num_in_use == 0


def tokens_of(completions: Sequence[Completion]) -> list[list[int]]:
    return [list(completion.token_ids) for completion in completions]


def test_it_is_a_generator_and_a_scorer() -> None:
    llm, _ = open_llm()
    generator: Generator = llm
    scorer: Scorer = llm
    assert generator.generate([], GREEDY) == [] and scorer.score([], []) == []


def test_batched_equals_single_equals_reference() -> None:
    llm, _ = open_llm()
    together = tokens_of(llm.generate_tokens(PROMPTS, GREEDY))
    assert together == [reference_tokens(prompt, 40) for prompt in PROMPTS]
    assert together == [tokens_of(llm.generate_tokens([prompt], GREEDY))[0] for prompt in PROMPTS]
    assert any(len(tokens) == 40 for tokens in together), "some answers are long"
    assert all_blocks_are_free(llm)


@pytest.mark.parametrize("max_rows", [1, 3, 32, 33, 1000])
def test_chunked_equals_whole(max_rows: int) -> None:
    llm, executor = open_llm(max_rows=max_rows, max_batch=5)
    assert tokens_of(llm.generate_tokens(PROMPTS, GREEDY)) == [reference_tokens(p, 40) for p in PROMPTS]
    assert max(batch.num_rows for batch in executor().steps) <= max_rows


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_preempted_equals_undisturbed(params: SamplingParams) -> None:
    tight, _ = open_llm(kv_tokens=6 * KV_BLOCK)
    roomy, _ = open_llm()
    num_preempted = 0

    def count(progress: Progress) -> None:
        nonlocal num_preempted
        num_preempted += progress.step.num_preempted

    got = tokens_of(tight.generate_tokens(PROMPTS, params, on_progress=count))
    assert got == tokens_of(roomy.generate_tokens(PROMPTS, params))
    assert num_preempted > 0, "the test needs preemptions"
    assert all_blocks_are_free(tight)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_limits_give_the_same_tokens(data: st.DataObject) -> None:
    llm, _ = open_llm(
        max_rows=data.draw(st.integers(1, 70)),
        max_batch=data.draw(st.integers(1, 9)),
        kv_tokens=data.draw(st.integers(4 * KV_BLOCK, 12 * KV_BLOCK)),
    )
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 80), st.integers(1, 40)), min_size=1, max_size=8))
    prompts = [[i + 1] * num_prompt for i, (num_prompt, _) in enumerate(lengths)]
    params = [SamplingParams(max_tokens=num_new) for _, num_new in lengths]
    expected = [reference_tokens(p, n) for p, (_, n) in zip(prompts, lengths, strict=True)]
    assert tokens_of(llm.generate_tokens(prompts, params)) == expected
    assert all_blocks_are_free(llm)


def test_a_seed_gives_the_same_answer_in_any_company() -> None:
    llm, _ = open_llm()
    alone = llm.generate_tokens([PROMPTS[3]], SAMPLED)[0].token_ids
    company = llm.generate_tokens([*PROMPTS], [SAMPLED if i == 3 else GREEDY for i in range(12)])
    assert company[3].token_ids == alone
    unseeded = SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True)
    first, second = llm.generate_tokens([PROMPTS[3]] * 2, unseeded)
    assert first.token_ids != second.token_ids, "without a seed one is drawn for each request"


def test_reasons_counts_and_times() -> None:
    llm, _ = open_llm()
    for completion, prompt in zip(llm.generate_tokens(PROMPTS, GREEDY), PROMPTS, strict=True):
        ended = completion.token_ids[-1] == EOS
        assert completion.finish_reason == ("completed" if ended else "length")
        assert completion.usage.num_prompt_tokens == len(prompt)
        assert completion.usage.num_output_tokens == len(completion.token_ids)
        assert 0 < completion.ttft_s <= completion.total_s
    reasons = {c.finish_reason for c in llm.generate_tokens([[i] for i in range(100)], GREEDY)}
    assert reasons == {"completed", "length"}, "the test needs both"


def prompt_that_ends() -> tuple[list[int], int]:
    """A prompt whose greedy answer holds an end token, and after how many others."""
    for i in range(250):
        tokens = reference_tokens([i, i], 40)
        if tokens[-1] == EOS and len(tokens) > 2:
            return [i, i], len(tokens)
    raise AssertionError("no such prompt")


def test_ignore_eos_goes_on_and_shows_no_control_token() -> None:
    llm, _ = open_llm()
    prompt, length = prompt_that_ends()
    plain = llm.generate_tokens([prompt], GREEDY)[0]
    going = llm.generate_tokens([prompt], SamplingParams(max_tokens=40, ignore_eos=True))[0]
    assert len(plain.token_ids) == length and plain.finish_reason == "completed"
    assert going.token_ids[:length] == plain.token_ids and len(going.token_ids) == 40
    assert going.finish_reason == "length" and "<end>" not in going.text + plain.text


def test_the_context_ends_an_answer_with_length() -> None:
    llm, executor = open_llm(context=64)
    params = SamplingParams(max_tokens=500, ignore_eos=True)
    for num_prompt in (1, 62, 63):
        completion = llm.generate_tokens([[5] * num_prompt], params)[0]
        assert completion.finish_reason == "length"
        assert completion.usage.num_total_tokens == 64
    assert max(int(batch.positions.max()) for batch in executor().steps) == 62


@pytest.mark.parametrize("num_prompt", [64, 65, 1000])
def test_a_prompt_without_room_for_an_answer_is_refused(num_prompt: int) -> None:
    llm, executor = open_llm(context=64)
    with pytest.raises(UsageError, match=rf"has {num_prompt} tokens .* context is 64"):
        llm.generate_tokens([[1], [5] * num_prompt], GREEDY)
    assert not executor().steps and all_blocks_are_free(llm)


def test_what_cannot_be_used_is_refused_before_anything_runs() -> None:
    llm, executor = open_llm(kv_tokens=64)
    with pytest.raises(UsageError, match="prompt is empty"):
        llm.generate(["a", ""], GREEDY)
    with pytest.raises(UsageError, match="outside the vocabulary of 260"):
        llm.generate_tokens([[VOCAB]], GREEDY)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        llm.generate_tokens([[-1]], GREEDY)
    with pytest.raises(UsageError, match="2 prompts and 1 sampling"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(ResourceError, match="may need 89 tokens"):
        llm.generate_tokens([[1], [1] * 50], GREEDY)
    with pytest.raises(ResourceError, match="may need 89 tokens"):
        llm.stream([1] * 50, GREEDY)
    with pytest.raises(UsageError, match="1 contexts and 0"):
        llm.score(["a"], [])
    with pytest.raises(UsageError, match="text is empty"):
        llm.score([""], [""])
    with pytest.raises(UsageError, match="text has 300 tokens; the model's context is 256"):
        llm.score(["a" * 100], ["b" * 200])
    with pytest.raises(UsageError, match="window is 257"):
        llm.score_tokens([1, 2], window=257)
    assert not executor().steps and all_blocks_are_free(llm)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_rows": 0},
        {"max_batch": 0},
        {"num_threads": 0},
        {"kv_tokens": 1},
        {"weights": "w2"},
        {"kv_dtype": "fp8"},
    ],
)
def test_a_wrong_configuration_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        LLMConfig(**wrong)


def test_the_cache_is_no_larger_than_useful_or_asked_for() -> None:
    architecture = FakeModel(256).architecture
    assert LLMConfig(max_batch=4).num_blocks(architecture) == 4 * 8
    assert LLMConfig(kv_tokens=100).num_blocks(architecture) == 4
    wide = FakeModel(1 << 20).architecture
    assert LLMConfig().num_blocks(wide) == (2 << 30) // wide.kv_block_bytes()
    int8 = LLMConfig(kv_dtype="int8").num_blocks(wide)
    assert int8 == (2 << 30) // wide.kv_block_bytes("int8") > LLMConfig().num_blocks(wide)


def test_stream_gives_the_same_text_in_pieces_and_then_the_completion() -> None:
    llm, _ = open_llm()
    for params in (GREEDY, SAMPLED):
        whole = llm.generate(["hello"], params)[0]
        *pieces, last = llm.stream("hello", params)
        assert isinstance(last, Completion) and last.token_ids == whole.token_ids
        assert "".join(str(piece) for piece in pieces) == whole.text == last.text
        assert len(pieces) > 1 and "" not in pieces
    assert list(llm.stream(list(b"hello"), GREEDY))[:-1] == list(llm.stream("hello", GREEDY))[:-1]


def test_streams_and_batches_interleave() -> None:
    llm, _ = open_llm(kv_tokens=256)
    one, two = llm.stream([1, 2], SAMPLED), llm.stream([3, 4], SAMPLED)
    mixed: list[list[str | Completion]] = [[next(one)], [next(two)]]
    assert tokens_of(llm.generate_tokens(PROMPTS[:4], GREEDY)) == [
        reference_tokens(p, 40) for p in PROMPTS[:4]
    ]
    mixed[0] += one
    mixed[1] += two
    assert mixed[0][-1].token_ids == llm.generate_tokens([[1, 2]], SAMPLED)[0].token_ids  # type: ignore[union-attr]
    assert mixed[1][-1].token_ids == llm.generate_tokens([[3, 4]], SAMPLED)[0].token_ids  # type: ignore[union-attr]
    assert all_blocks_are_free(llm)


def test_a_stream_closed_early_gives_its_blocks_back() -> None:
    llm, _ = open_llm()
    stream = llm.stream([1] * 50, SAMPLED)
    next(stream)
    assert not all_blocks_are_free(llm)
    stream.close()  # type: ignore[attr-defined]
    assert all_blocks_are_free(llm)
    never_started = llm.stream([1], SAMPLED)
    del never_started
    assert all_blocks_are_free(llm)


@pytest.mark.parametrize("fail_at", [1, 2, 9])
def test_an_interrupt_leaves_no_block_behind(fail_at: int) -> None:
    llm, executor = open_llm(max_rows=16, max_batch=4)
    executor().fail_at = {fail_at: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        llm.generate_tokens(PROMPTS, GREEDY)
    assert all_blocks_are_free(llm)
    assert tokens_of(llm.generate_tokens(PROMPTS, GREEDY)) == [reference_tokens(p, 40) for p in PROMPTS]


def test_an_interrupted_call_does_not_harm_a_paused_stream() -> None:
    llm, executor = open_llm(max_rows=16)
    stream = llm.stream([9, 9], SAMPLED)
    pieces = [next(stream)]
    executor().fail_at = {len(executor().steps) + 3: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        llm.generate_tokens(PROMPTS, GREEDY)
    pieces += stream
    assert "".join(map(str, pieces[:-1])) == llm.generate_tokens([[9, 9]], SAMPLED)[0].text


def test_a_request_that_ends_in_a_failing_step_has_ended() -> None:
    """The head's second pass fails after a first one that sampled a stream's last token."""
    llm, executor = open_llm(max_batch=2)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    stream = llm.stream([1, 2], params)
    pieces = [next(stream)]
    executor().fail_at = {len(executor().steps) + 2: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        llm.score([""], ["some text, more than a tile of it"])
    assert tokens_of(llm.generate_tokens([[8]], GREEDY)) == [reference_tokens([8], 40)]
    pieces += stream
    assert isinstance(pieces[-1], Completion)
    assert list(pieces[-1].token_ids) == reference_tokens([1, 2], 2) and all_blocks_are_free(llm)


def test_an_error_in_the_progress_callback_leaves_no_block_behind() -> None:
    llm, _ = open_llm()

    def fail(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate_tokens(PROMPTS, GREEDY, on_progress=fail)
    assert all_blocks_are_free(llm)


def test_progress_counts_to_the_end_and_steps_add_up() -> None:
    llm, _ = open_llm(max_rows=32, max_batch=4)
    seen: list[Progress] = []
    completions = llm.generate_tokens(PROMPTS, GREEDY, on_progress=seen.append)
    done = [progress.num_done for progress in seen]
    assert done == sorted(done) and done[-1] == len(PROMPTS) == seen[0].num_requests
    steps = [progress.step for progress in seen]
    usage = [completion.usage for completion in completions]
    assert sum(step.num_rows for step in steps) == sum(u.num_total_tokens - 1 for u in usage)
    assert sum(step.num_out_rows for step in steps) == sum(u.num_output_tokens for u in usage)
    assert all(step.num_sequences <= 4 and step.seconds > 0 for step in steps)
    assert max(step.num_waiting for step in steps) == 8


def test_a_row_that_is_no_number_fails_its_own_request_only() -> None:
    llm, executor = open_llm()
    clean = llm.generate_tokens(PROMPTS, GREEDY)
    victim = PROMPTS[4] + list(clean[4].token_ids[:2])
    executor().nan_hashes = {fake_hash(victim)}
    result = llm.generate_tokens(PROMPTS, GREEDY)
    assert result[4].finish_reason == "failed" and result[4].token_ids == clean[4].token_ids[:2]
    assert [c.token_ids for i, c in enumerate(result) if i != 4] == [
        c.token_ids for i, c in enumerate(clean) if i != 4
    ]
    assert all_blocks_are_free(llm)


def test_stop_strings_end_before_they_appear() -> None:
    llm, _ = open_llm()
    plain = llm.generate_tokens([[1, 2]], SAMPLED)[0]
    stop = plain.text[4:6]
    stopped = llm.generate_tokens([[1, 2]], SamplingParams(**{**vars(SAMPLED), "stop": (stop,)}))[0]
    assert stopped.text == plain.text[: plain.text.index(stop)] and stopped.finish_reason == "stopped"
    assert stopped.token_ids == plain.token_ids[: len(stopped.token_ids)]
    assert stopped.usage.num_output_tokens < 40


def test_text_that_only_looked_like_a_stop_string_is_shown_at_the_end() -> None:
    llm, _ = open_llm()
    plain = llm.generate_tokens([[1, 2]], SAMPLED)[0]
    params = SamplingParams(**{**vars(SAMPLED), "stop": (plain.text[-1] + "never",)})
    assert llm.generate_tokens([[1, 2]], params)[0].text == plain.text
    *pieces, _last = llm.stream([1, 2], params)
    assert "".join(map(str, pieces)) == plain.text


def test_chat_uses_the_template() -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    llm, _ = open_llm(template=template)
    prompt = list(b"[user]hi[assistant]")
    assert llm.encode_chat(conversation("hi")) == prompt
    assert tokens_of(llm.chat([conversation("hi")], GREEDY)) == [reference_tokens(prompt, 40)]
    with pytest.raises(UsageError, match="no chat template"):
        open_llm()[0].chat([conversation("hi")], GREEDY)


def reference_logprob(tokens: Sequence[int], index: int) -> float:
    logits_V = fake_logits(tokens[:index]).astype(np.float64)
    return float(logits_V[tokens[index]] - np.log(np.exp(logits_V).sum()))


@pytest.mark.parametrize(
    ("max_rows", "max_batch", "kv_tokens"), [(512, 64, None), (7, 3, None), (512, 64, 96)]
)
def test_scores_are_log_probabilities_however_they_are_computed(
    max_rows: int, max_batch: int, kv_tokens: int | None
) -> None:
    llm, _ = open_llm(max_rows=max_rows, max_batch=max_batch, kv_tokens=kv_tokens)
    contexts = ["", "a", "a long context, longer than one block of the cache", "x"]
    continuations = ["first", "b", " and more", "y" * 60]
    scores = llm.score(contexts, continuations)
    for context, continuation, score in zip(contexts, continuations, scores, strict=True):
        tokens = list((context + continuation).encode())
        first = max(1, len(context))
        assert score.token_ids == tuple(tokens[first:])
        expected = [reference_logprob(tokens, i) for i in range(first, len(tokens))]
        assert np.allclose(score.logprobs, expected, rtol=0, atol=1e-5)
    assert all_blocks_are_free(llm)


def test_what_has_no_scored_token_has_an_empty_score() -> None:
    llm, executor = open_llm()
    scores = llm.score(["", "abc", "a"], ["x", "", "b"])
    assert [len(score.logprobs) for score in scores] == [0, 0, 1]
    assert sum(batch.num_rows for batch in executor().steps) == 1


def test_windows_do_not_overlap_and_see_nothing_before_them() -> None:
    llm, _ = open_llm()
    tokens = [i * 7 % 250 for i in range(101)]
    scores = llm.score_tokens(tokens, window=50)
    assert [score.token_ids for score in scores] == [tuple(tokens[1:50]), tuple(tokens[51:100])]
    assert np.isclose(scores[1].logprobs[0], reference_logprob(tokens[50:], 1), atol=1e-5)


def test_scores_that_are_no_numbers_are_an_error() -> None:
    llm, executor = open_llm()
    executor().nan_hashes = {fake_hash(list(b"ab"))}
    with pytest.raises(ModelFormatError, match="not finite"):
        llm.score(["a"], [chr(98) + chr(3)])
    assert all_blocks_are_free(llm)


def test_scoring_and_generation_share_batches() -> None:
    llm, _ = open_llm(kv_tokens=256)
    stream = llm.stream([1, 2], SAMPLED)
    next(stream)
    tokens = list(b"some text to score")
    score = llm.score([""], ["some text to score"])[0]
    expected = [reference_logprob(tokens, i) for i in range(1, len(tokens))]
    assert np.allclose(score.logprobs, expected, rtol=0, atol=1e-5)
    *_, last = stream
    assert isinstance(last, Completion)
    assert last.token_ids == llm.generate_tokens([[1, 2]], SAMPLED)[0].token_ids
