"""`run`, `chat` and `score` on a tiny random model: what goes in, what comes out, and on which stream."""

import gzip
import math
from pathlib import Path

import pytest

from tests.fast.cli_tools import Runner, Terminal, make_home, make_runner
from tokenmill.cli import inputs
from tokenmill.cli.chat import Conversation
from tokenmill.cli.output import Output
from tokenmill.core import SamplingParams, UsageError
from tokenmill.engine import LLM
from tokenmill.models.store.library import Library

SHORT = ("--max-tokens", "8")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with `tiny`, and `base`, which has no chat template."""
    folder = tmp_path_factory.mktemp("cli")
    make_home(folder)
    (home := make_home(folder, "base")).joinpath("models/base/chat_template.jinja").unlink()
    return home


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> Runner:
    return make_runner(monkeypatch, capsys, home)


def test_run_streams_what_the_document_says(run: Runner) -> None:
    plain, as_json = run("run", "tiny", "hello", *SHORT), run("run", "tiny", "hello", *SHORT, "--json")
    document = as_json.document
    assert plain.code == as_json.code == 0 and plain.err == ""
    assert plain.out == as_json.err and plain.out.rstrip("\n") == document["text"].rstrip("\n")
    assert document["model"] == "tiny" and document["weights"] == "w8a8" and document["template"] is True
    assert document["usage"]["num_output_tokens"] == len(document["token_ids"]) <= 8
    assert document["finish_reason"] in ("completed", "length")
    assert 0 < document["ttft_s"] <= document["total_s"]


def test_raw_and_a_base_model_skip_the_template(run: Runner) -> None:
    raw = run("run", "tiny", "hello", "--raw", *SHORT, "--json").document
    assert raw["template"] is False
    assert (
        raw["usage"]["num_prompt_tokens"]
        < run("run", "tiny", "hello", *SHORT, "--json").document["usage"]["num_prompt_tokens"]
    )
    assert run("run", "base", "hello", *SHORT, "--json").document["template"] is False


def test_a_prompt_through_a_pipe_is_the_same_prompt(run: Runner) -> None:
    def num_tokens(*prompt: str, stdin: bytes = b"") -> int:
        document = run("run", "tiny", *prompt, *SHORT, "--json", stdin=stdin).document
        return int(document["usage"]["num_prompt_tokens"])

    given = num_tokens("hello")
    assert num_tokens("-", stdin=b"hello\n") == num_tokens(stdin=b"hello") == given
    assert num_tokens(stdin=b"hello\n\n") == given + 1, "only one newline is dropped"


def test_a_seed_makes_sampling_reproducible(run: Runner) -> None:
    words = ("run", "tiny", "hello", "--temperature", "60", "--max-tokens", "20", "--seed")
    assert run(*words, "1").out == run(*words, "1").out != run(*words, "2").out


def test_a_model_is_also_found_by_its_path(run: Runner, home: Path) -> None:
    by_path = run("run", str(home / "models/tiny"), "hello", *SHORT)
    assert by_path.out == run("run", "tiny", "hello", *SHORT).out


@pytest.mark.parametrize(
    ("words", "stdin", "code", "says"),
    [
        (("run", "tiny", ""), b"", 2, "the prompt is empty"),
        (("run", "tiny", " \n"), b"", 2, "the prompt is empty"),
        (("run", "tiny"), b"", 2, "the prompt is empty"),
        (("run", "tiny"), b"a\0b", 2, "standard input is binary"),
        (("run", "tiny"), b"caf\xe9", 2, "standard input is not UTF-8 (byte 3)"),
        (("run", "tiny", "word " * 300), b"", 2, "the model's context is 256"),
        (("run", "tin", "hello"), b"", 3, "did you mean tiny"),
        (("run", "smollm2-135m", "hello"), b"", 3, "tokenmill pull smollm2-135m"),
        (("run", "./nothing", "hello"), b"", 3, "`tokenmill models` lists"),
        (("chat", "base"), b"hello\n", 2, "base has no chat template"),
        (("chat", "tiny"), b"\xff\n", 2, "standard input is not UTF-8"),
        (("chat", "tiny"), b"word " * 300, 2, "the model's context is 256"),
        (("score", "tiny"), b"", 2, "the text is empty"),
        (("score", "tiny", "--text", "x"), b"", 2, "nothing was scored"),
        (("score", "tiny", "--text", "some text", "--window", "257"), b"", 2, "window is 257"),
        (("score", "tiny", "--file", "nothing.txt"), b"", 3, "nothing.txt does not exist"),
        (("score", "tiny", "--file", "."), b"", 5, "Is a directory"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    run: Runner, words: tuple[str, ...], stdin: bytes, code: int, says: str
) -> None:
    plain, as_json = run(*words, stdin=stdin), run(*words, "--json", stdin=stdin)
    assert says in plain.error_line and plain.out == ""
    assert plain.code == as_json.code == code == as_json.document["error"]["exit_code"]


def test_a_file_as_model_is_told_to_be_pulled(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    result = run("run", str(tmp_path / "some.gguf"), "hello")
    assert result.code == 2 and "tokenmill pull" in result.error_line


def test_chat_through_a_pipe_remembers_forgets_and_ends(run: Runner) -> None:
    stdin = b"hello\n\nhello\n/new\nhello\n/exit\nnot read\n"
    document = run("chat", "tiny", *SHORT, "--json", stdin=stdin).document
    first, second, third = document["turns"]
    assert [turn["prompt"] for turn in document["turns"]] == ["hello"] * 3
    assert first["usage"]["num_prompt_tokens"] < second["usage"]["num_prompt_tokens"]
    assert third["token_ids"] == first["token_ids"]
    assert run("chat", "tiny", *SHORT, stdin=b"hello").out == run("run", "tiny", "hello", *SHORT).out


def conversation(home: Path, out: Output, max_tokens: int = 8) -> Conversation:
    return Conversation(LLM(Library(home).find("tiny")), SamplingParams(max_tokens=max_tokens), out)


def test_a_long_chat_leaves_out_its_oldest_turns(home: Path) -> None:
    out = Output(stdout=Terminal(), stderr=Terminal())
    chat = conversation(home, out)
    for _ in range(6):
        chat.say("hello " * 12)
    assert "the oldest" in str(out.stderr.getvalue() if isinstance(out.stderr, Terminal) else "")
    assert chat.messages[0].role == "user" and len(chat.messages) < 12
    before = list(chat.messages)
    with pytest.raises(UsageError, match="context is 256"):
        chat.say("hello " * 300)
    assert len(chat.messages) <= len(before) and all(m.content != "hello " * 300 for m in chat.messages)


def test_an_interrupt_stops_the_answer_and_not_the_chat(home: Path) -> None:
    class Impatient(Terminal):
        def write(self, text: str) -> int:
            if self.tell() > 0:
                raise KeyboardInterrupt
            return super().write(text)

    out = Output(stdout=Impatient(), stderr=Terminal())
    chat = conversation(home, out, max_tokens=100)
    chat.say("hello")
    assert chat.turns[-1]["finish_reason"] == "cancelled"
    assert chat.messages[-1].role == "assistant"
    out.stdout = Terminal()
    chat.say("hello")
    assert chat.turns[-1]["finish_reason"] in ("completed", "length")


def test_score_of_text_file_gzip_and_pipe_are_the_same(run: Runner, tmp_path: Path) -> None:
    text = "the hell of the hill. " * 9
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    expected = run("score", "tiny", "--text", text, "--window", "50", "--json").document
    for words, stdin in (
        (("--file", str(tmp_path / "a.txt")), b""),
        (("--file", str(tmp_path / "a.txt.gz")), b""),
        (("--file", "-"), text.encode()),
        ((), text.encode()),
    ):
        assert run("score", "tiny", *words, "--window", "50", "--json", stdin=stdin).document == expected


def test_score_adds_up_over_windows(run: Runner) -> None:
    text = "the hell of the hill. " * 9
    result = run("score", "tiny", "--text", text, "--window", "50", "--windows", "2", "--json")
    document = result.document
    assert document["num_tokens"] == 100 and document["num_scored"] == 98
    assert [window["num_scored"] for window in document["windows"]] == [49, 49]
    total = sum(window["logprob"] for window in document["windows"])
    assert document["logprob"] == pytest.approx(total)
    assert document["perplexity"] == pytest.approx(math.exp(-total / 98))
    assert "window" in result.err and f"perplexity {document['perplexity']:.4f}" in result.err


def test_score_with_a_context_is_the_engine_s(run: Runner, home: Path) -> None:
    document = run("score", "tiny", "--context", "the", "--text", " hell", "--json").document
    score = LLM(Library(home).find("tiny")).score(["the"], [" hell"])[0]
    assert (document["logprob"], document["num_scored"]) == (score.total, len(score.token_ids))


def test_texts_are_bounded(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_TEXT_BYTES", 1 << 20)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"a" * (1 << 21)))
    assert "is larger than 1 MiB" in run("score", "tiny", "--file", str(tmp_path / "bomb.gz")).error_line


@pytest.mark.parametrize("damage", [slice(0, 20), slice(0, -4)])
def test_damaged_gzip_is_one_line(run: Runner, tmp_path: Path, damage: slice) -> None:
    (tmp_path / "bad.gz").write_bytes(gzip.compress(b"some text " * 50)[damage])
    assert "damaged gzip" in run("score", "tiny", "--file", str(tmp_path / "bad.gz")).error_line
