"""The mock model: known answers, faults on demand, and a cache that gives a wrong block away."""

import numpy as np
import pytest

from tests.fast.engine_fakes import conversation
from tokenmill.core import NotFoundError, SamplingParams, UsageError
from tokenmill.engine import LLM, LLMConfig
from tokenmill.engine.mock import (
    MOCK_VOCAB_SIZE,
    MockExecutor,
    MockFault,
    MockModel,
    MockScript,
    mock_logits,
    reference_tokens,
)
from tokenmill.kernels import KV_BLOCK, I32Array, StepBatch
from tokenmill.models.text.byte_tokenizer import BYTE_VOCAB_SIZE, END_TOKEN, ByteTokenizer

MARK = 258


def int32(values: object) -> I32Array:
    return np.array(values, np.int32)


def batch_of(tokens: list[int], start: int, blocks: list[int]) -> StepBatch:
    """The rows [start, end) of one sequence whose blocks these are; logits of the last row."""
    positions = np.arange(start, len(tokens))
    slots = int32(blocks)[positions // KV_BLOCK] * KV_BLOCK + positions % KV_BLOCK
    spans = [
        (block, index * KV_BLOCK, min(KV_BLOCK, len(tokens) - index * KV_BLOCK))
        for index, block in enumerate(blocks)
    ]
    return StepBatch(
        tokens=int32(tokens[start:]),
        positions=int32(positions),
        kv_slots=int32(slots),
        row_starts=int32([0, len(positions)]),
        block_starts=int32([0, len(spans)]),
        blocks=int32(spans),
        out_rows=int32([len(positions) - 1]),
    )


def executor(script: MockScript | None = None) -> MockExecutor:
    return MockExecutor(script or MockScript(), num_blocks=8, max_rows=128, max_out_rows=4)


def llm(script: MockScript, **config: int) -> LLM:
    model = MockModel(script)
    return LLM(model, LLMConfig(**config), create=model.create)  # type: ignore[arg-type]


def test_chunks_over_scattered_blocks_see_what_no_cache_sees() -> None:
    tokens = [(7 * i) % 256 for i in range(70)]
    mock = executor()
    mock.run(batch_of(tokens[:40], 0, [5, 2]))
    mock.run(batch_of(tokens, 40, [5, 2, 7]))
    assert np.array_equal(mock.buffer("logits")[0], mock_logits(tokens))


def test_a_block_of_another_history_gives_other_logits() -> None:
    """Equal tokens in the block itself are not enough, as in a model whose keys depend on all before."""
    first, second = [1] * KV_BLOCK + [3] * KV_BLOCK, [2] * KV_BLOCK + [3] * KV_BLOCK
    mock = executor()
    mock.run(batch_of(first, 0, [0, 1]))
    mock.run(batch_of(second, 0, [2, 3]))
    mock.run(batch_of([*second, 9], 2 * KV_BLOCK, [2, 1, 4]))
    assert not np.array_equal(mock.buffer("logits")[0], mock_logits([*second, 9]))
    mock.run(batch_of([*second, 9], 2 * KV_BLOCK, [2, 3, 4]))
    assert np.array_equal(mock.buffer("logits")[0], mock_logits([*second, 9]))


def test_blocks_can_be_copied_and_moved_out_and_in() -> None:
    tokens = list(range(40))
    mock = executor()
    mock.run(batch_of(tokens, 0, [0, 1]))
    mock.copy_blocks([(1, 3)])
    saved = mock.block(0).copy()
    mock.block(0)[:] = 0
    mock.block(6)[:] = saved
    mock.run(batch_of([*tokens, 7], 40, [6, 3]))
    assert np.array_equal(mock.buffer("logits")[0], mock_logits([*tokens, 7]))
    mock.run(batch_of([*tokens, 7], 40, [0, 3]))
    assert not np.array_equal(mock.buffer("logits")[0], mock_logits([*tokens, 7]))


def test_the_engine_gives_the_reference_tokens() -> None:
    script = MockScript(seed=3)
    prompts = [[(11 * i + k) % 256 for i in range(5 + 30 * k)] for k in range(6)]
    engine = llm(script, max_rows=48, max_batch=3, kv_tokens=20 * KV_BLOCK)
    answers = engine.generate_tokens(prompts, SamplingParams(max_tokens=40))
    assert [list(a.token_ids) for a in answers] == [reference_tokens(p, 40, script) for p in prompts]
    assert reference_tokens(prompts[0], 40, script) != reference_tokens(prompts[0], 40)


def test_scripted_answers_come_whatever_the_parameters() -> None:
    script = MockScript(answers=((b"2+2=", b"4"), (b"2+2=4", b"!"), (b"a", (END_TOKEN,))))
    hot = SamplingParams(temperature=5.0, seed=1)
    answers = llm(script).generate(["2+2=", "2+2=4", "a"], hot)
    assert [(a.text, a.finish_reason) for a in answers] == [
        ("4!", "completed"),  # the longest prompt that fits counts
        ("!", "completed"),
        ("", "completed"),
    ]
    assert reference_tokens(b"2+2=4", 9, script) == [ord("!"), END_TOKEN]


def test_the_context_ends_an_answer() -> None:
    script = MockScript(context_length=8, answers=((b"ab", b"0123456789"),))
    answer = llm(script).generate(["ab"], SamplingParams())[0]
    assert (answer.text, answer.finish_reason) == ("012345", "length")
    assert reference_tokens(b"ab", 256, script) == list(answer.token_ids)


@pytest.mark.parametrize("kind", ["nan", "inf", "minus_inf"])
def test_a_bad_row_spoils_its_own_sequence_only(kind: str) -> None:
    script = MockScript(faults=(MockFault(kind=kind, marker=(MARK, 5)),))  # type: ignore[arg-type]
    prompts = [[MARK, 5, 1], [1, 2, 3], [5, MARK, 1], [MARK, 6, 5]]
    answers = llm(script).generate_tokens(prompts, SamplingParams(max_tokens=5))
    assert [a.finish_reason == "failed" for a in answers] == [True, False, False, False]
    assert list(answers[1].token_ids) == reference_tokens(prompts[1], 5)


def test_a_step_raises_or_hangs_when_the_script_says_so() -> None:
    slept: list[float] = []
    faults = (MockFault(kind="raise", at_step=2), MockFault(kind="hang", marker=(MARK,)))
    script = MockScript(step_s=0.5, row_s=0.25, faults=faults)
    mock = MockExecutor(script, num_blocks=2, max_rows=8, max_out_rows=2, sleep=slept.append)
    mock.run(batch_of([1, 2], 0, [0]))
    with pytest.raises(RuntimeError, match="told to fail"):
        mock.run(batch_of([1, 2], 0, [0]))
    assert slept == [1.0, 1.0]
    with pytest.raises(RuntimeError, match="told to fail"):
        mock.run(batch_of([1, MARK], 0, [0]))
    assert slept[3] > 1e8, "virtual time runs far on; a real clock would sleep"


def test_no_mock_answer_contains_a_marker() -> None:
    for last in range(256):
        assert np.argmax(mock_logits([0, last])) < BYTE_VOCAB_SIZE
    assert np.isfinite(mock_logits([1])).all() and len(mock_logits([1])) == MOCK_VOCAB_SIZE


def test_scripts_are_checked() -> None:
    with pytest.raises(UsageError, match="marker"):
        MockFault(kind="nan")
    with pytest.raises(UsageError, match="seed"):
        MockScript(seed=-1)
    with pytest.raises(UsageError, match="vocabulary"):
        MockScript(answers=((b"a", (999,)),))
    with pytest.raises(UsageError, match="context_length"):
        MockScript(context_length=1)
    with pytest.raises(NotFoundError, match="create"):
        MockModel().weights()
    assert MockModel(MockScript(seed=1)).digest != MockModel().digest


def test_the_byte_tokenizer_gives_every_byte_and_text_back() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == BYTE_VOCAB_SIZE
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    text = "h\u00e9llo \U0001f600\n\x00<end>"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<end>", allow_special=True) == [ord("a"), END_TOKEN]
    assert tokenizer.is_special(END_TOKEN) and tokenizer.special_tokens == {"<end>": END_TOKEN}


def test_a_chat_goes_through_the_template() -> None:
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    model = MockModel(MockScript(answers=(((*b"hi", END_TOKEN), b"ho"),)), template=template)
    answer = LLM(model, create=model.create).chat([conversation("hi")], SamplingParams())[0]
    assert answer.text == "ho"
    with pytest.raises(UsageError, match="template"):
        llm(MockScript()).chat([conversation("hi")], SamplingParams())
