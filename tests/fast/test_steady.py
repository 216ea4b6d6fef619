"""Steady steps are those of the general path: the same batches for the executor, and the same answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from tests.fast.engine_fakes import EOS, FakeExecutor, FakeModel, fake_hash, fake_model
from tokenmill.core import Completion, Grammar, SamplingParams
from tokenmill.engine import LLM, LLMConfig
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.steady import SteadyRun
from tokenmill.kernels import KV_BLOCK, Choice, ChoiceTable, StepBatch, available_isas, choose_tokens

FORMS: Sequence[dict[str, Any]] = (
    {},
    {"ignore_eos": True},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 1.2, "seed": 6, "top_k": 30, "top_p": 0.9, "ignore_eos": True},
    {"stop": ("\x07", "ab"), "ignore_eos": True},
    {"stop_token_ids": (3, 9, 77, 130), "ignore_eos": True},
    {"min_tokens": 20},
    {"logit_bias": ((EOS, 5.0), (7, -3.0))},
)
GRAMMARS: Sequence[dict[str, Any]] = (
    {"grammar": Grammar(kind="regex", source=r"[\s\S]*"), "ignore_eos": True},
    {"grammar": Grammar(kind="regex", source="([a-f]{3,9} )+!")},
)
PLANNED: Sequence[dict[str, Any]] = (
    {"logprobs": 2},
    {"repetition_penalty": 1.3},
    {"n": 3, "temperature": 1.0, "seed": 2},
    {"bad_words": ("a", "xy")},
    {"prompt_logprobs": 1},
    {"temperature": 1.0, "seed": 4, "grammar": Grammar(kind="regex", source="[a-z ]*")},
)


@contextmanager
def counted_steps() -> Iterator[list[int]]:
    """The sizes of the steady steps that are made while this is open."""
    sizes: list[int] = []
    step = SteadyRun.step

    def counting(run: SteadyRun, clock: Callable[[], float]) -> Any:
        sizes.append(len(run.states))
        return step(run, clock)

    with patch.object(SteadyRun, "step", counting):
        yield sizes


def generate(
    requests: Sequence[tuple[list[int], SamplingParams]],
    *,
    prepare: Callable[[FakeExecutor], None] = lambda executor: None,
    **config: Any,
) -> tuple[list[Completion], list[StepBatch]]:
    """The answers, and what the executor was given."""
    fake = FakeModel(256)
    llm = LLM(fake_model(fake), LLMConfig(**config), create=fake.create)
    assert fake.executor is not None
    prepare(fake.executor)
    answers = llm.generate_tokens([ids for ids, _ in requests], [params for _, params in requests])
    return answers, fake.executor.steps


def assert_both_ways_agree(requests: Sequence[tuple[list[int], SamplingParams]], **config: Any) -> list[int]:
    """Compare with the general path alone; returns the sizes of the steady steps."""
    with counted_steps() as sizes:
        answers, batches = generate(requests, **config)
    with patch.object(SteadyRun, "begin", lambda scheduler, executor: None):
        wanted, wanted_batches = generate(requests, **config)
    timeless = [(c.text, c.token_ids, c.finish_reason, c.usage, c.logprobs, c.error) for c in answers]
    assert timeless == [(c.text, c.token_ids, c.finish_reason, c.usage, c.logprobs, c.error) for c in wanted]
    assert len(batches) == len(wanted_batches)
    for batch, other in zip(batches, wanted_batches, strict=True):
        for field in fields(StepBatch):
            mine, twins = getattr(batch, field.name), getattr(other, field.name)
            assert np.array_equal(mine, twins) and mine.dtype == twins.dtype, field.name
    return sizes


def requests_of(
    seed: int, forms: Sequence[dict[str, Any]], count: int
) -> list[tuple[list[int], SamplingParams]]:
    drawn = Random(seed)
    return [
        (
            [drawn.randrange(256) for _ in range(drawn.randrange(1, 70))],
            SamplingParams(max_tokens=drawn.choice((21, 31, 32, 33, 100)), **drawn.choice(forms)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_plain_requests(seed: int) -> None:
    sizes = assert_both_ways_agree(requests_of(seed, FORMS, 12))
    assert len(sizes) > 10 and max(sizes) > 4


@pytest.mark.parametrize("seed", range(3))
def test_grammars(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is guessed, which a grammar's forced tokens are as long as a tile has rows to spare."""
    for module in ("steady", "speculation.speculator"):
        monkeypatch.setattr(f"tokenmill.engine.{module}.ROW_TILE", 0)
    sizes = assert_both_ways_agree(requests_of(seed, ({"ignore_eos": True}, *GRAMMARS), 12))
    assert len(sizes) > 20 and max(sizes) > 4


@pytest.mark.parametrize(("count", "is_steady"), [(15, False), (16, True)])
def test_grammars_need_a_full_tile(count: int, is_steady: bool) -> None:
    params = SamplingParams(max_tokens=20, **GRAMMARS[0])
    with counted_steps() as sizes:
        generate([([i] * 5, params) for i in range(count)], max_batch=count)
    assert (count in sizes) == is_steady


@pytest.mark.parametrize("seed", range(4))
def test_among_requests_that_are_not_plain(seed: int) -> None:
    assert_both_ways_agree(requests_of(seed, (*FORMS, *FORMS, *PLANNED), 8))


@pytest.mark.parametrize("seed", range(4))
def test_with_few_blocks_and_a_queue(seed: int) -> None:
    """Preempted and waiting sequences, small steps."""
    requests = requests_of(seed, FORMS, 14)
    assert assert_both_ways_agree(requests, kv_tokens=10 * KV_BLOCK, max_batch=4, max_rows=24)
    assert assert_both_ways_agree(requests, kv_tokens=10 * KV_BLOCK, max_batch=8, max_rows=3)


@pytest.mark.parametrize("step", [3, 20, 45])
def test_a_step_that_raises_fails_nobody_else(step: int) -> None:
    def prepare(executor: FakeExecutor) -> None:
        executor.fail_at[step] = RuntimeError("broken")

    assert assert_both_ways_agree(requests_of(1, FORMS, 8), prepare=prepare)


def test_a_row_that_is_not_finite_fails_its_own_sequence() -> None:
    requests = [([i] * 5, SamplingParams(max_tokens=40, ignore_eos=True)) for i in range(4)]
    (answer, *_), _ = generate(requests)

    def prepare(executor: FakeExecutor) -> None:
        executor.nan_hashes = {fake_hash([0] * 5 + list(answer.token_ids[:20]))}

    (broken, *others), _ = generate(requests, prepare=prepare)
    assert broken.finish_reason == "failed" and broken.token_ids == answer.token_ids[:20]
    assert all(each.finish_reason == "length" for each in others)
    assert_both_ways_agree(requests, prepare=prepare)


def test_an_interrupt_leaves_the_engine_usable() -> None:
    fake = FakeModel(256)
    llm = LLM(fake_model(fake), create=fake.create)
    requests = [([i] * 5, SamplingParams(max_tokens=40, ignore_eos=True)) for i in range(4)]
    prompts, params = [ids for ids, _ in requests], [each for _, each in requests]
    assert fake.executor is not None
    fake.executor.fail_at[20] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), counted_steps() as sizes:
        llm.generate_tokens(prompts, params)
    assert len(sizes) == 19
    assert [c.token_ids for c in llm.generate_tokens(prompts, params)] == [
        c.token_ids for c in generate(requests)[0]
    ]


@pytest.mark.parametrize("isa", available_isas())
def test_a_table_that_moves_on_chooses_as_a_new_one(isa: str) -> None:
    logits_LV = np.random.default_rng(3).standard_normal((3, 500)).astype(np.float32)
    choices = [
        Choice(logits_row=row, inverse_temperature=1.0, seed=row, position=7 * row) for row in range(3)
    ]
    table = ChoiceTable(choices, isa)
    for step in range(5):
        now = [choice._replace(position=choice.position + step) for choice in choices]
        assert table.choose(logits_LV).tolist() == choose_tokens(logits_LV, now, isa).tolist()
        table.advance()


@pytest.mark.parametrize("seed", range(20))
def test_text_of_many_tokens_is_that_of_one_after_the_other(seed: int) -> None:
    drawn = Random(seed)
    text = "aé한国🙂\ud7ff퟿ \n".encode(errors="surrogatepass") + bytes([0xED, 0xA0, 0xED, 0x9F, 0xFF, 0xC3])
    parts = [bytes(drawn.choices(text, k=drawn.randrange(4))) for _ in range(60)]
    one, many = Detokenizer(parts.__getitem__), Detokenizer(parts.__getitem__)
    at = 0
    while at < len(parts):
        stop = at + drawn.randrange(1, 9)
        ids = range(at, min(stop, len(parts)))
        assert many.push_all(ids) == "".join(one.push(each).text for each in ids)
        at = stop
