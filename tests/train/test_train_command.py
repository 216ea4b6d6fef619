"""`tokenmill train`, as its user."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fast.cli_tools import Runner, make_home, make_runner
from tokenmill.core import Message, UsageError
from tokenmill.models.adapter import read_adapter
from tokenmill.models.store.library import Library
from tokenmill.train import ConversationEncoder

ANSWERS = {"hi": "hell", "tell": "he", "who": "the"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return make_runner(monkeypatch, capsys, home)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(line(question, answer) for question, answer in ANSWERS.items()))
    return path


def line(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, "id": "kept aside"}) + "\n"


def test_what_was_trained_answers_as_it_was_taught(run: Runner, data: Path, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    flags = ["--epochs", "120", "--learning-rate", "0.02", "--licence", "CC0-1.0"]
    result = run(
        "train", "tiny", str(data), "--validation", str(data), "--output", str(place), *flags, "--json"
    )
    assert result.code == 0, result.err
    document = result.document
    assert document["num_steps"] == 120 and document["loss"] < 0.05 and document["num_examples"] == 3
    assert min(each["loss"] for each in document["validation_losses"]) < 0.1
    assert not list(Path(document["run"]).glob("*.safetensors"))
    for question, answer in ANSWERS.items():
        words = ["run", str(place), question, "--weights", "bf16", "--max-tokens", "8", "--json"]
        assert run(*words).document["text"] == answer


def test_an_adapter_alone_is_written(run: Runner, data: Path, tmp_path: Path, home: Path) -> None:
    place = tmp_path / "adapter"
    result = run("train", "tiny", str(data), "--output", str(place), "--lora", "4", "--adapter")
    assert result.code == 0, result.err
    assert str(place) in result.out
    adapter = read_adapter(place, Library(home).find("tiny").architecture)
    assert len(adapter.pairs) == 14 and adapter.scale == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no items"),
        ("{\n", "train.jsonl:1: "),
        (line("a", "b") + '{"prompt": "x"}\n', "train.jsonl:2: there is no messages"),
        (
            '{"messages": [{"role": "user", "content": "x"}]}\n',
            "train.jsonl:1: .*does not end with",
        ),
        ('{"messages": [{"role": "boss", "content": "x"}]}\n', r"train.jsonl:1: .*messages\[0\]"),
    ],
)
def test_wrong_data_is_one_line_with_its_place(
    run: Runner, data: Path, tmp_path: Path, text: str, message: str
) -> None:
    data.write_text(text)
    result = run("train", "tiny", str(data), "--output", str(tmp_path / "mine"))
    assert result.code == 2
    assert re.search(message, result.error_line), result.error_line


def test_wrong_flags_are_refused_before_anything_is_read(run: Runner, data: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "mine")
    for words, message in (
        (["--output", str(tmp_path)], "exists already"),
        (["--output", str(tmp_path / "no" / "mine")], "is no folder"),
        (["--output", place, "--adapter"], "--adapter is for --lora"),
        (["--output", place, "--alpha", "3"], "are for --lora"),
        (["--output", place, "--patience", "2"], "--patience is for --validation"),
        (["--output", place, "--learning-rate", "-1"], "learning_rate is -1.0"),
        (["--output", place, "--lora", "4", "--targets", "x"], "no matrix is named 'x'"),
    ):
        result = run("train", "tiny", str(data), *words)
        assert result.code in (2, 3) and message in result.error_line, result.error_line


def test_another_run_in_the_folder_is_not_gone_on_with(run: Runner, data: Path, tmp_path: Path) -> None:
    words = ["train", "tiny", str(data), "--run", str(tmp_path / "run"), "--epochs", "1"]
    assert run(*words, "--output", str(tmp_path / "one")).code == 0
    result = run(*words, "--output", str(tmp_path / "two"))
    assert result.code == 2 and "--resume goes on with it" in result.error_line
    result = run(*words, "--output", str(tmp_path / "two"), "--seed", "1", "--resume")
    assert result.code == 2 and "a run of something else" in result.error_line


def test_long_conversations_are_left_out_and_named(run: Runner, data: Path, tmp_path: Path) -> None:
    data.write_text(line("x" * 400, "he") + line("hi", "he"))
    result = run("train", "tiny", str(data), "--output", str(tmp_path / "mine"), "--epochs", "1", "--json")
    assert result.document["num_examples"] == 1
    assert "1 conversations have more than 256 tokens" in result.err and "train.jsonl:1" in result.err


def test_the_prompt_is_the_server_s_and_control_words_stay_text(home: Path) -> None:
    model = Library(home).find("tiny")
    encoder, tokenizer = ConversationEncoder(model), model.tokenizer()
    example = encoder.example(
        [Message(role="user", content="<|im_end|>"), Message(role="assistant", content="he")]
    )
    learnt = [token for token, is_target in zip(example.tokens, example.is_target, strict=True) if is_target]
    assert learnt == [*tokenizer.encode("he"), tokenizer.special_tokens["<|im_end|>"]]
    prompt = [*example.tokens][: -len(learnt)]
    assert prompt == encoder.prompt([Message(role="user", content="<|im_end|>")])
    assert prompt.count(tokenizer.special_tokens["<|im_end|>"]) == 1
    with pytest.raises(UsageError, match="does not end with an answer"):
        encoder.example([Message(role="user", content="hi")])
