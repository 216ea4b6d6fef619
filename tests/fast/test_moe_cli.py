"""Mixtures of experts from the command line: who is sent where, and a cache of experts within a budget."""

from pathlib import Path

import pytest

from tests.fast.cli_tools import Runner, make_home, make_runner
from tests.fast.export_tools import random_folder
from tokenmill.models.hf_config import read_architecture

CONFIG = {
    "model_type": "olmoe",
    "vocab_size": 270,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
TEXT = "A text that is long enough to go to several experts."


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    random_folder(tmp_path / "mixture", read_architecture(CONFIG, "config.json"))
    return make_runner(monkeypatch, capsys, make_home(tmp_path))


def test_who_is_sent_where(run: Runner, tmp_path: Path) -> None:
    result = run("score", str(tmp_path / "mixture"), "--text", TEXT, "--routing", "--json")
    layers = result.document["routing"]
    assert result.code == 0 and list(layers) == ["0", "1"]
    for layer in layers.values():
        assert layer["num_tokens"] == result.document["num_tokens"]
        assert sum(layer["load"]) == pytest.approx(1) and 0 < layer["entropy"] <= 1
        assert layer["max_violation"] == pytest.approx(4 * max(layer["load"]) - 1)
    table = run("score", str(tmp_path / "mixture"), "--text", TEXT, "--routing").out
    assert "entropy of load" in table and "MaxVio" in table


def test_a_model_without_experts_says_so(run: Runner) -> None:
    assert "no experts" in run("score", "tiny", "--text", TEXT, "--routing").error_line
    assert "--context" in run("score", "tiny", "--text", TEXT, "--context", "a", "--routing").error_line


def test_a_budget_for_experts_changes_no_answer_and_is_reported(run: Runner, tmp_path: Path) -> None:
    words = ("run", str(tmp_path / "mixture"), TEXT, "--raw", "--max-tokens", "12", "--json")
    whole, short = run(*words), run(*words, "--expert-cache", "1kB")
    assert short.document["text"] == whole.document["text"] and "expert_cache" not in whole.document
    cache = short.document["expert_cache"]
    assert cache["num_misses"] > 0 and cache["bytes_read"] > 0 and "experts:" in short.err
    assert 0 <= cache["hit_rate"] <= 1
