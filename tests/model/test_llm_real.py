"""The default model through the offline engine: however a request is computed, the same token ids."""

from pathlib import Path

import pytest

from tokenmill.core import Completion, Message, SamplingParams, UsageError
from tokenmill.engine import LLM, LLMConfig, Progress
from tokenmill.kernels import KV_BLOCK
from tokenmill.models.store.directory import ModelDirectory

TOPICS = ["the sea", "bread", "a violin", "two friends and a map", "rain", "the number seven"]
PROMPTS = [
    f"{'A note. ' * (9 * index)}Write about {topic}. The first thing to say is"
    for index, topic in enumerate(TOPICS)
]
GREEDY = SamplingParams(max_tokens=24)
SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, top_k=200, seed=11)


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ModelDirectory:
    return ModelDirectory.open(model_dir)


@pytest.fixture(scope="module")
def llm(model: ModelDirectory) -> LLM:
    return LLM(model)


def answers(llm: LLM, params: SamplingParams) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in llm.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def expected(llm: LLM) -> dict[str, list[tuple[int, ...]]]:
    """Each prompt alone."""
    return {
        name: [llm.generate([prompt], params)[0].token_ids for prompt in PROMPTS]
        for name, params in (("greedy", GREEDY), ("sampled", SAMPLED))
    }


@pytest.mark.parametrize(("name", "params"), [("greedy", GREEDY), ("sampled", SAMPLED)])
def test_batched_equals_single(
    llm: LLM, expected: dict[str, list[tuple[int, ...]]], name: str, params: SamplingParams
) -> None:
    assert answers(llm, params) == expected[name]


@pytest.mark.parametrize("config", [LLMConfig(max_rows=17, max_batch=4), LLMConfig(num_threads=1)])
def test_chunking_and_threads_change_nothing(
    model: ModelDirectory, expected: dict[str, list[tuple[int, ...]]], config: LLMConfig
) -> None:
    other = LLM(model, config)
    assert answers(other, GREEDY) == expected["greedy"]
    assert answers(other, SAMPLED) == expected["sampled"]


def test_preempted_equals_undisturbed(model: ModelDirectory, llm: LLM) -> None:
    """Answers outgrow a cache that has room for all of their beginnings; more in test_identity_real.py."""
    params = SamplingParams(max_tokens=80, ignore_eos=True)
    tight = LLM(model, LLMConfig(kv_tokens=8 * KV_BLOCK))
    steps: list[Progress] = []
    completions = tight.generate(PROMPTS, params, on_progress=steps.append)
    assert sum(progress.step.num_preempted for progress in steps) > 0, "the test needs preemptions"
    assert [completion.token_ids for completion in completions] == answers(llm, params)


@pytest.mark.parametrize("weights", ["w4a8", "bf16"])
def test_batched_equals_single_in_every_format(model: ModelDirectory, weights: str) -> None:
    other = LLM(model, LLMConfig(weights="w4a8" if weights == "w4a8" else "bf16", max_rows=48))
    assert answers(other, GREEDY) == [other.generate([prompt], GREEDY)[0].token_ids for prompt in PROMPTS]


def test_a_chat_is_answered_and_stops_by_itself(llm: LLM) -> None:
    question = [Message(role="user", content="What is the capital of France? Answer in one sentence.")]
    completion = llm.chat([question], SamplingParams(max_tokens=60))[0]
    assert "Paris" in completion.text and completion.finish_reason == "completed"
    assert "<|im_end|>" not in completion.text
    *pieces, last = llm.stream(llm.encode_chat(question), SamplingParams(max_tokens=60))
    assert isinstance(last, Completion) and last.token_ids == completion.token_ids
    assert "".join(map(str, pieces)) == completion.text


def test_stop_strings_end_a_real_answer(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, stop=(" 6",))
    completion = llm.generate(["Count: 1 2 3 4"], params)[0]
    assert completion.text.startswith(" 5") and " 6" not in completion.text
    assert completion.finish_reason == "stopped"


def test_scores_prefer_the_truth_and_do_not_depend_on_company(llm: LLM) -> None:
    contexts = ["The capital of France is", "The capital of France is", "Water freezes at zero"]
    continuations = [" Paris.", " a violin.", " degrees Celsius."]
    together = llm.score(contexts, continuations)
    alone = [llm.score([a], [b])[0] for a, b in zip(contexts, continuations, strict=True)]
    assert together == alone
    assert together[0].total > together[1].total + 5


def test_windows_scored_in_chunks_are_the_same_numbers(model: ModelDirectory, llm: LLM) -> None:
    tokens = model.tokenizer().encode(" ".join(PROMPTS) * 2)[:300]
    whole = llm.score_tokens(tokens, window=150)
    assert whole == LLM(model, LLMConfig(max_rows=37, max_batch=5)).score_tokens(tokens, window=150)
    assert [len(score.logprobs) for score in whole] == [149, 149]
    assert 1 < whole[0].perplexity < 100


def test_a_prompt_longer_than_the_context_is_refused(llm: LLM) -> None:
    with pytest.raises(UsageError, match="the model's context is"):
        llm.generate(["word " * (llm.context_length + 1)], GREEDY)
