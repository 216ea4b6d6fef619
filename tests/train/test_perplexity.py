"""Perplexity of WikiText-2 through the engine against the torch twin in float32.

Two windows of 2,048 tokens of the tokenised test text, nothing put in front. Bounds: bf16 within 0.3 %,
w8a8 and w4a8 (on the file's own grid) at most 3 % above.
"""

import gzip
import math
from pathlib import Path

import pytest
import torch

from tokenmill.engine import LLM, LLMConfig
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder

TEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext2" / "wiki.test.tokens.txt.gz"
WINDOW = 2048


@pytest.fixture(scope="module")
def tokens(model_dir: Path) -> list[int]:
    with gzip.open(TEXT, "rt", encoding="utf-8") as file:
        text = file.read(40_000)
    return ModelDirectory.open(model_dir).tokenizer().encode(text)[: 2 * WINDOW]


@pytest.fixture(scope="module")
def reference(model_dir: Path, tokens: list[int]) -> float:
    model = ModelDirectory.open(model_dir)
    twin = TorchDecoder.load(model.architecture, model.weights())
    with torch.inference_mode():
        means = [twin.logprobs(window[None]).mean() for window in torch.tensor(tokens).view(2, WINDOW)]
    return math.exp(-float(sum(means)) / 2)


@pytest.mark.parametrize(("weights", "low", "high"), [("bf16", -0.3, 0.3), ("w8a8", -1, 3), ("w4a8", -1, 3)])
def test_perplexity(
    model_dir: Path, tokens: list[int], reference: float, weights: WeightFormat, low: float, high: float
) -> None:
    llm = LLM(ModelDirectory.open(model_dir), LLMConfig(weights=weights, kv_tokens=2 * WINDOW))
    scores = llm.score_tokens(tokens, window=WINDOW)
    logprobs = [logprob for score in scores for logprob in score.logprobs]
    perplexity = math.exp(-math.fsum(logprobs) / len(logprobs))
    change = 100 * (perplexity / reference - 1)
    print(f"{weights}: perplexity {perplexity:.3f}, {change:+.2f} % of float32 {reference:.3f}")
    assert len(logprobs) == 2 * (WINDOW - 1)
    assert low <= change <= high
