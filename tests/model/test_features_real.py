"""Adapters, grammars, log-probabilities and embeddings of the default model, through the offline `LLM`."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fast.adapter_files import adapter_tensors, plain_config, write_adapter
from tests.fast.proposer_fakes import eager_guesses
from tokenmill.core import Grammar, Message, NotFoundError, ResourceError, SamplingParams, UsageError
from tokenmill.engine import LLM, LLMConfig
from tokenmill.models.store.directory import ModelDirectory

PROMPT = "The mill stood where the two streams met, and for most of the year the water was high enough. " * 2
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer"},
        "capital": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["north", "south", "east", "west"]}, "maxItems": 3},
    },
    "required": ["city", "population", "capital", "tags"],
    "additionalProperties": False,
}
AS_SCHEMA = Grammar(kind="json_schema", source=json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ModelDirectory:
    return ModelDirectory.open(model_dir)


@pytest.fixture(scope="module")
def llm(model: ModelDirectory) -> Iterator[LLM]:
    llm = LLM(model, LLMConfig(max_adapters=2, speculation="lookup"))
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def folders(model: ModelDirectory, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [
        write_adapter(
            tmp_path_factory.mktemp(f"adapter{seed}"),
            adapter_tensors(model.architecture, rank=8, seed=seed, strength=0.5),
            plain_config(rank=8),
        )
        for seed in (1, 2)
    ]


def test_adapters_share_steps_and_nothing_else(llm: LLM, folders: list[Path]) -> None:
    """Each alone on a cold engine, then together and again on a warm one: the same tokens."""
    plain = llm.generate([PROMPT], GREEDY)[0]
    for name, folder in zip(("one", "two"), folders, strict=True):
        llm.load_adapter(name, folder)
    first = {name: llm.generate([PROMPT], GREEDY, adapter=name)[0] for name in ("one", "two")}
    assert len({plain.token_ids, *(each.token_ids for each in first.values())}) == 3
    assert all(each.usage.num_cached_tokens == 0 for each in first.values()), "no prefix of another model"
    again = {name: llm.generate([PROMPT], GREEDY, adapter=name)[0] for name in ("one", "", "two")}
    assert {name: each.token_ids for name, each in again.items()} == {
        "": plain.token_ids,
        **{name: each.token_ids for name, each in first.items()},
    }
    assert all(each.usage.num_cached_tokens > 0 for each in again.values())
    with pytest.raises(ResourceError, match="all 2 adapter slots"):
        llm.load_adapter("three", folders[0])
    with pytest.raises(UsageError, match="loaded already"):
        llm.load_adapter("one", folders[0])
    llm.unload_adapter("one")
    with pytest.raises(NotFoundError, match="no adapter named 'one'"):
        llm.generate([PROMPT], GREEDY, adapter="one")
    # The same name for other content: its digest keeps the caches apart.
    llm.load_adapter("one", folders[1])
    assert llm.generate([PROMPT], GREEDY, adapter="one")[0].token_ids == first["two"].token_ids
    for name in ("one", "two"):
        llm.unload_adapter(name)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_fit_their_schema_with_forced_tokens_and_without(
    model: ModelDirectory, llm: LLM, temperature: float
) -> None:
    questions = [f"Describe the city of {name} as JSON." for name in ("Paris", "Lima", "Oslo", "Cairo")]
    chats = [[Message(role="user", content=question)] for question in questions]
    params = SamplingParams(max_tokens=120, temperature=temperature, seed=3, grammar=AS_SCHEMA)
    with eager_guesses():
        answers = llm.chat(chats, params)
    for answer in answers:
        assert answer.finish_reason in ("completed", "length"), answer.error
        if answer.finish_reason == "completed":
            document = json.loads(answer.text)
            assert list(document) == list(SCHEMA["properties"]) and isinstance(document["population"], int)
    assert any(answer.finish_reason == "completed" for answer in answers)
    assert sum(answer.usage.num_accepted_tokens for answer in answers) > 0, "forced tokens were guessed"
    alone = [llm.chat([chat], params)[0].token_ids for chat in chats]
    assert [answer.token_ids for answer in answers] == alone


def test_wrong_grammars_are_refused_at_the_call(llm: LLM) -> None:
    for grammar in (Grammar(kind="json_schema", source="{"), Grammar(kind="regex", source="a(")):
        with pytest.raises(UsageError):
            llm.generate([PROMPT], SamplingParams(grammar=grammar))


def test_logprobs_are_those_that_scoring_gives(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    completion = llm.generate([PROMPT], params)[0]
    assert completion.logprobs is not None and completion.prompt_logprobs is not None
    ids = llm.encode(PROMPT)
    scored = llm.score_tokens([*ids, *completion.token_ids])[0]
    made = [*completion.prompt_logprobs, *completion.logprobs]
    assert [each.token_id for each in made] == list(scored.token_ids)
    assert [each.logprob for each in made] == list(scored.logprobs)
    for each in completion.logprobs:
        assert each.top[0] == (each.token_id, each.logprob), "greedy takes the most likely"
        assert len(each.top) == 3 and math.fsum(math.exp(p) for _, p in each.top) <= 1.0 + 1e-6


def test_embeddings_do_not_depend_on_company_and_tell_topics_apart(llm: LLM) -> None:
    texts = [
        "The central bank raised interest rates to slow inflation.",
        "Higher interest rates are meant to bring inflation down.",
        "She kneaded the dough and left it to rise near the oven.",
    ]
    together = llm.embed(texts)
    alone = np.concatenate([llm.embed([text]) for text in texts])
    assert (together == alone).all() and together.shape == (3, llm.plan.shape.hidden_size)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-6)
    centred = together - together.mean(axis=0)
    assert centred[0] @ centred[1] > max(centred[0] @ centred[2], centred[1] @ centred[2])
    last = llm.embed(texts, pooling="last", normalize=False)
    assert last.shape == together.shape and not np.allclose(last, together)


def test_calibration_undoes_smoothing(model: ModelDirectory, llm: LLM) -> None:
    """The true units: what bf16, which smooths nothing, sees."""
    points = ["blocks.3.mlp.hook_post", "blocks.3.ln2.hook_normalized"]
    windows = [llm.encode(PROMPT)]
    exact = LLM(model, LLMConfig(weights="bf16", max_batch=4)).calibrate(windows, points)
    found = llm.calibrate(windows, points)
    for point in points:
        ratio = np.sqrt(found[point].mean_square_K.mean() / exact[point].mean_square_K.mean())
        assert 0.9 < ratio < 1.1
        peaks = found[point].abs_max_K / exact[point].abs_max_K
        assert 0.7 < float(np.median(peaks)) < 1.4
