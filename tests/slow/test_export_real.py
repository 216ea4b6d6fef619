"""Exports in the programs they are for: llama.cpp and transformers compute what the engine computes.

llama.cpp is the one in the Python of TOKENMILL_LLAMA_CPP (a path), or of the tests; where there is none,
its tests are skipped. Text: the start of WikiText-2's test part, four windows of 512 tokens.
"""

import functools
import gzip
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.families import zoo
from scripts.families.runners import measure, twin_logits
from scripts.families.zoo import Specimen, make_model, save_model
from tests.fast.export_tools import write_tokenizer
from tokenmill.engine import LLM, LLMConfig
from tokenmill.models.formats.bfloat16 import F32Array
from tokenmill.models.formats.convert import GgufWeights
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.export import GGUF_TYPES, GgufType, export_gguf, export_hf
from tokenmill.models.store.library import Library
from tokenmill.models.store.pull import import_model
from tokenmill.models.torch_twin import TorchDecoder

TEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext2" / "wiki.test.tokens.txt.gz"
CHILD = Path(__file__).with_name("llama_cpp_child.py")
WINDOWS, WINDOW = 4, 512
Runner = Callable[[Path, list[list[int]]], F32Array]


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Logits [windows, tokens, vocabulary] of a GGUF file."""
    python = os.environ.get("TOKENMILL_LLAMA_CPP", "")
    if not python and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama_cpp is not installed; set TOKENMILL_LLAMA_CPP to a Python that has it")
    folder = tmp_path_factory.mktemp("llama_cpp")

    def run(path: Path, windows: list[list[int]]) -> F32Array:
        (folder / "ids.json").write_text(json.dumps(windows))
        words = [
            python or sys.executable,
            str(CHILD),
            str(path),
            str(folder / "ids.json"),
            str(folder / "out.npy"),
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        logits: F32Array = np.load(folder / "out.npy")
        return logits

    return run


@pytest.fixture(scope="module")
def windows(model_dir: Path) -> list[list[int]]:
    with gzip.open(TEXT, "rt", encoding="utf-8") as file:
        ids = ModelDirectory.open(model_dir).tokenizer().encode(file.read(20_000))
    return [ids[first : first + WINDOW] for first in range(0, WINDOWS * WINDOW, WINDOW)]


def perplexity(logprobs: npt.ArrayLike) -> float:
    return float(np.exp(-np.mean(np.asarray(logprobs, np.float64))))


def of_logits(logits_WTV: F32Array, windows: list[list[int]]) -> float:
    logprobs = torch.from_numpy(logits_WTV).log_softmax(-1)[:, :-1]
    return perplexity(logprobs.gather(-1, torch.tensor(windows)[:, 1:, None]).numpy())


def of_engine(model: ModelDirectory, weights: WeightFormat, windows: list[list[int]]) -> float:
    llm = LLM(model, LLMConfig(weights=weights, kv_tokens=2 * WINDOW, num_threads=1))
    try:
        scores = llm.score_tokens([each for window in windows for each in window], window=WINDOW)
    finally:
        llm.close()
    return perplexity([logprob for score in scores for logprob in score.logprobs])


def of_twin(model: ModelDirectory, weights: Any, windows: list[list[int]]) -> float:
    twin = TorchDecoder.load(model.architecture, weights)
    with torch.inference_mode():
        return perplexity([twin.logprobs(torch.tensor([window]))[0].numpy() for window in windows])


@pytest.mark.parametrize("gguf_type", GGUF_TYPES)
def test_llama_cpp_has_the_same_perplexity(
    model_dir: Path, tmp_path: Path, llama_cpp: Runner, windows: list[list[int]], gguf_type: GgufType
) -> None:
    """Against the twin on the file's exact weights, and the engine on the file pulled back."""
    exported = export_gguf(ModelDirectory.open(model_dir), tmp_path / f"{gguf_type}.gguf", gguf_type)
    theirs = of_logits(llama_cpp(exported.path, windows), windows)
    back = import_model(exported.path, Library(tmp_path / "home"))
    with GgufFile.open(exported.path) as file:
        twin = of_twin(back, GgufWeights(file, back.architecture), windows)
    bf16, w4a8 = (of_engine(back, each, windows) for each in ("bf16", "w4a8"))
    print(f"{gguf_type}: llama.cpp {theirs:.4f}, twin {twin:.4f}, engine bf16 {bf16:.4f}, w4a8 {w4a8:.4f}")
    # With quantised weights llama.cpp rounds activations to 8 bits, as w4a8 does, and the twin does not.
    is_quantised = gguf_type in ("q8_0", "q4_0")
    assert abs(theirs / twin - 1) < (0.015 if is_quantised else 0.003)
    assert abs(theirs / bf16 - 1) < (0.015 if is_quantised else 0.003)
    if is_quantised:
        assert abs(theirs / w4a8 - 1) < 0.01


def test_transformers_has_the_same_perplexity(
    model_dir: Path, tmp_path: Path, windows: list[list[int]]
) -> None:
    model = ModelDirectory.open(model_dir)
    exported = export_hf(model, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(exported.path, dtype=torch.float32)
    with torch.inference_mode():
        logits = np.stack([theirs(torch.tensor([window])).logits[0].numpy() for window in windows])
    found, twin = of_logits(logits, windows), of_twin(model, model.weights(), windows)
    print(
        f"hf: transformers {found:.5f}, twin {twin:.5f}, engine bf16 {of_engine(model, 'bf16', windows):.5f}"
    )
    assert abs(found / twin - 1) < 1e-4
    text = "The tower is 330 m tall.\n\n  Été 2024"
    tokenizer = AutoTokenizer.from_pretrained(exported.path)
    assert tokenizer.encode(text, add_special_tokens=False) == model.tokenizer().encode(text)


_MORE = {
    "Qwen2, YaRN by 1.5": Specimen(
        model_type="qwen2", options={"rope_parameters": {**zoo._YARN, "attention_factor": 1.5}}
    ),
}
_UNSAYABLE = {"Llama, GeGLU", "Llama, ReGLU", "Qwen3-MoE, one layer dense", "OLMoE, renormalised"}
"""Refused with an error: a test of the fast group says why each is."""

_TOLERANCE = 4e-3
"""Root mean square over the logits' spread: llama.cpp rounds activations to float16 in some products."""


@functools.cache
def tokens(num_tokens: int = 100) -> list[int]:
    return [int(each) for each in np.random.default_rng(3).integers(3, 150, num_tokens)]


@pytest.mark.parametrize("name", [*(each for each in zoo.ZOO if each not in _UNSAYABLE), *_MORE])
def test_llama_cpp_computes_every_family(
    name: str, tmp_path: Path, llama_cpp: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of an F16 export against transformers; where there is a window, as far as it reaches."""
    if name in _MORE:
        monkeypatch.setitem(zoo.ZOO, name, _MORE[name])
    model = make_model(name)
    save_model(model, tmp_path / "model")
    write_tokenizer(tmp_path / "model", 160)
    directory = ModelDirectory.open(tmp_path / "model")
    exported = export_gguf(directory, tmp_path / "model.gguf", "f16")
    reach = min([layer.window for layer in directory.architecture.layers if layer.window] or [len(tokens())])
    found = llama_cpp(exported.path, [tokens()])[0]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens()])).logits[0].numpy()
    distance = measure(found[:reach], expected[:reach])
    back = import_model(exported.path, Library(tmp_path / "home"))
    again = measure(twin_logits(back, tokens()), expected)
    print(
        f"{name}: llama.cpp worst {distance.worst:.1e}, relative {distance.relative:.1e}, agreement "
        f"{distance.agreement:.2f}; pulled back, twin: worst {again.worst:.1e}"
    )
    assert distance.relative < _TOLERANCE and distance.decided == 1.0
    assert again.worst < 1e-3
