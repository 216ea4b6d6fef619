"""What the engine offers, from the command line: several answers, log-probabilities, grammars, guesses,
adapters, embeddings; answers that fail; and that nothing stays behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fast.adapter_files import adapter_tensors, plain_config, write_adapter
from tests.fast.cli_tools import Runner, Terminal, make_home, make_runner
from tokenmill.cli.answers import summary
from tokenmill.cli.chat import Conversation
from tokenmill.cli.output import Output
from tokenmill.core import Completion, SamplingParams, TokenmillError, Usage
from tokenmill.engine import LLM, core
from tokenmill.models.store.library import Library

WARM = ("--temperature", "60", "--max-tokens", "6", "--seed", "3")
CITY = {"enum": ["Ulm"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> Runner:
    return make_runner(monkeypatch, capsys, home)


@pytest.fixture
def adapter(tmp_path: Path, home: Path) -> Path:
    """An adapter that is strong enough to change every answer."""
    architecture = Library(home).find("tiny").architecture
    return write_adapter(tmp_path / "strong", adapter_tensors(architecture, strength=30.0), plain_config())


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of every step raises."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("oh no")

    monkeypatch.setattr(core, "take_logits", fail)


def test_several_answers_of_which_the_first_is_the_only_one_s(run: Runner) -> None:
    alone = run("run", "tiny", "hello", *WARM, "--json").document
    plain, as_json = (
        run("run", "tiny", "hello", *WARM, "--n", "3"),
        run("run", "tiny", "hello", *WARM, "--n", "3", "--json"),
    )
    document = as_json.document
    assert [each["index"] for each in document["completions"]] == [0, 1, 2]
    assert document["completions"][0]["token_ids"] == alone["token_ids"]
    assert len({tuple(each["token_ids"]) for each in document["completions"]}) == 3
    shown = "".join(f"--- {i + 1} of 3\n{each['text']}\n" for i, each in enumerate(document["completions"]))
    assert plain.out == as_json.err == shown


def test_log_probabilities_as_table_and_as_fields(run: Runner, home: Path) -> None:
    words = ("run", "tiny", "hello", "--max-tokens", "4", "--logprobs", "2")
    document = run(*words, "--json").document
    ids = LLM(Library(home).find("tiny")).encode("hello")
    assert ids
    assert [each["token_id"] for each in document["logprobs"]] == document["token_ids"]
    for each in document["logprobs"]:
        assert each["top"][0] == {key: each[key] for key in ("token_id", "logprob", "text")}, "greedy"
        assert len(each["top"]) == 2
    header, *rows = run(*words).out.splitlines()[-len(document["token_ids"]) - 1 :]
    assert header.split() == ["token", "log-prob", "likeliest"]
    for row, each in zip(rows, document["logprobs"], strict=True):
        assert row.startswith(repr(each["text"])) and f"{each['logprob']:.4f}" in row


def test_the_document_has_what_is_set_and_nothing_else(run: Runner) -> None:
    document = run("run", "tiny", "hello", "--max-tokens", "3", "--json").document
    assert not {"logprobs", "prompt_logprobs", "error", "request_id"} & set(document)
    usage = {"num_prompt_tokens", "num_cached_tokens", "num_output_tokens", "num_draft_tokens"}
    assert set(document["usage"]) == usage | {"num_accepted_tokens"}


def test_an_answer_matches_its_grammar(run: Runner, tmp_path: Path) -> None:
    document = run("run", "tiny", "hello", "--regex", "hell[a-c]", "--json").document
    assert document["text"] in ("hella", "hellb", "hellc") and document["finish_reason"] == "completed"
    schema = json.dumps(CITY).encode()
    assert json.loads(run("run", "tiny", "hello", "--json-schema", "-", stdin=schema).out) == "Ulm"
    (tmp_path / "a.lark").write_text('start: "h" "i"')
    assert run("run", "tiny", "hello", "--grammar", str(tmp_path / "a.lark")).out == "hi\n"
    bad = run("run", "tiny", "hello", "--regex", "(")
    assert bad.code == 2 and "the grammar (regex)" in bad.error_line and bad.out == ""


TOOL_CHAT = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% for t in tools or [] %}{{ t.function.name }}"
    "{% endfor %}"
)


def test_tools_are_in_the_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = make_runner(monkeypatch, capsys, make_home(tmp_path, **{"tokenizer.chat_template": TOOL_CHAT}))
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([{"type": "function", "function": {"name": "hello"}}]))
    tools, short = ("--tools", str(path)), ("--max-tokens", "2", "--json")
    expected = run("run", "tiny", "hellohello", *short).document
    assert run("run", "tiny", "hello", *tools, *short).document["token_ids"] == expected["token_ids"]
    assert run("run", "tiny", "hello", *tools, *short).document["usage"] == expected["usage"]
    [turn] = run("chat", "tiny", *tools, *short, stdin=b"hello").document["turns"]
    assert turn["token_ids"] == expected["token_ids"]
    assert "a raw prompt has no place" in run("run", "tiny", "hello", "--raw", *tools).error_line
    (tmp_path / "home" / "models" / "tiny" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "the chat template of tiny has no place" in run("run", "tiny", "hello", *tools).error_line
    for content, says in (
        ("[", f"{path} is not JSON"),
        ("{}", f"{path}: is no list"),
        ('[{"type": "function"}]', f"{path}: tools[0] names no function"),
    ):
        path.write_text(content)
        for words in (("run", "tiny", "hello"), ("chat", "tiny")):
            result = run(*words, *tools)
            assert result.code == 2 and says in result.error_line and result.out == ""


@pytest.mark.parametrize(
    ("words", "stdin", "code", "says"),
    [
        (("run", "none", "hello", "--n", "9"), b"", 2, "n is 9"),
        (("run", "none", "hello", "--logprobs", "21"), b"", 2, "logprobs is 21"),
        (("run", "none", "hello", "--min-p", "nan"), b"", 2, "min_p is nan"),
        (("run", "none", "hello", "--min-tokens", "300"), b"", 2, "min_tokens is 300"),
        (("run", "none", "hello", "--regex", "a", "--grammar", "x"), b"", 2, "not allowed with"),
        (("run", "none", "hello", "--regex", ""), b"", 2, "is empty"),
        (("run", "none", "hello", "--grammar", "x.lark"), b"", 3, "x.lark does not exist"),
        (("run", "none", "hello", "--json-schema", "-"), b"{", 2, "standard input is not JSON"),
        (("run", "none", "hello", "--json-schema", "-"), b"[" * 60000, 2, "standard input is not JSON"),
        (("run", "none", "--json-schema", "-"), b"{}", 2, "standard input is the grammar"),
        (("run", "none", "-", "--grammar", "-"), b"{}", 2, "standard input is the grammar"),
        (("run", "tiny", "hello", "--draft", "none"), b"", 3, "no model named 'none'"),
        (("run", "tiny", "hello", "--adapter", "none"), b"", 3, "none is no folder"),
        (("run", "tiny", "hello", "--adapter", "."), b"", 3, "is no adapter"),
        (("chat", "tiny", "--kv", "int4"), b"", 2, "invalid choice: 'int4'"),
        (("chat", "tiny", "--tools", "-"), b"", 2, "tools do not come from standard input"),
        (("chat", "tiny", "--tools", "none.json"), b"", 3, "none.json does not exist"),
        (("embed", "none"), b"", 2, "standard input is empty"),
        (("embed", "none"), b"a\n\nb\n", 2, "line 2 of standard input is empty"),
        (("embed", "none", ""), b"", 2, "a text is empty"),
        (("embed", "none", "-", "-"), b"a\n", 2, "named twice"),
        (("embed", "tiny", "word " * 300), b"", 2, "the model's context is 256"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    run: Runner, words: tuple[str, ...], stdin: bytes, code: int, says: str
) -> None:
    """Before the model is looked for, where no model is needed to know."""
    result = run(*words, stdin=stdin)
    assert says in result.error_line and result.code == code and result.out == ""


def test_an_adapter_answers_under_its_folder_s_name(run: Runner, home: Path, adapter: Path) -> None:
    words = ("run", "tiny", "hello", "--max-tokens", "8", "--json", "--raw")
    plain, adapted = run(*words).document, run(*words, "--adapter", str(adapter)).document
    assert adapted["token_ids"] != plain["token_ids"]
    talk = run("chat", "tiny", "--max-tokens", "8", "--json", "--adapter", str(adapter), stdin=b"hello")
    templated = run("run", "tiny", "hello", "--max-tokens", "8", "--json", "--adapter", str(adapter)).document
    assert talk.document["turns"][0]["token_ids"] == templated["token_ids"]


@pytest.mark.parametrize("flags", [("--speculation", "lookup"), ("--draft", "tiny")])
def test_guesses_change_no_answer(run: Runner, flags: tuple[str, ...]) -> None:
    words = ("run", "tiny", "the hell of the hill. " * 5, "--max-tokens", "60", "--json")
    plain, guessed = run(*words).document, run(*words, *flags).document
    assert guessed["token_ids"] == plain["token_ids"]
    assert guessed["usage"]["num_draft_tokens"] > 0 == plain["usage"]["num_draft_tokens"]


def test_an_answer_that_fails_is_shown_and_ends_with_1(run: Runner, broken: None) -> None:
    plain, as_json = run("run", "tiny", "hello"), run("run", "tiny", "hello", "--json")
    assert plain.code == as_json.code == 1 and plain.out == ""
    assert plain.error_line == as_json.error_line == "error: the answer failed: ZeroDivisionError: oh no"
    assert as_json.document["finish_reason"] == "failed"
    assert as_json.document["error"] == "ZeroDivisionError: oh no"
    several = run("run", "tiny", "hello", "--n", "2", "--json")
    assert several.code == 1
    assert [each["finish_reason"] for each in several.document["completions"]] == ["failed"] * 2
    assert run("chat", "tiny", stdin=b"hello").code == 1


def test_a_chat_forgets_a_turn_that_failed(home: Path, broken: None) -> None:
    out = Output(stdout=Terminal(), stderr=Terminal())
    chat = Conversation(LLM(Library(home).find("tiny")), SamplingParams(), out)
    with pytest.raises(TokenmillError, match="oh no"):
        chat.say("hello")
    assert chat.messages == [] and chat.turns[0]["finish_reason"] == "failed"


def test_embeddings_are_the_engine_s(run: Runner, home: Path) -> None:
    texts = ["the hell", "of the hill"]
    expected = LLM(Library(home).find("tiny")).embed(texts)
    document = run("embed", "tiny", *texts, "--json").document
    assert document["pooling"] == "mean" and [each["text"] for each in document["embeddings"]] == texts
    rows = np.array([each["embedding"] for each in document["embeddings"]], np.float32)
    assert np.array_equal(rows, expected)
    lines = [json.loads(line) for line in run("embed", "tiny", *texts).out.splitlines()]
    assert lines == document["embeddings"]


def test_embed_reads_lines_in_their_place_and_pools(run: Runner) -> None:
    def texts(*words: str, stdin: bytes = b"") -> list[Any]:
        return [json.loads(line) for line in run("embed", "tiny", *words, stdin=stdin).out.splitlines()]

    given = texts("a", "b c", "d")
    assert texts("a", "-", stdin=b"b c\nd\n") == texts(stdin=b"a\nb c\nd") == given
    last = texts("b c", "--pooling", "last")
    assert last[0]["text"] == "b c" and last[0]["embedding"] != given[1]["embedding"]


@pytest.mark.parametrize(
    "words",
    [
        ("run", "tiny", "hello", "--max-tokens", "2"),
        ("run", "tiny", "hello", "--regex", "("),
        ("run", "tiny", "hello", "--adapter", "."),
        ("chat", "tiny", "--max-tokens", "2"),
        ("score", "tiny", "--text", "the hell"),
        ("score", "tiny", "--text", "the hell", "--window", "1000"),
        ("embed", "tiny", "hello"),
    ],
)
def test_the_model_is_closed_whatever_happens(
    run: Runner, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    closed = []
    close: Callable[[LLM], None] = LLM.close

    def recorded(llm: LLM) -> None:
        closed.append(llm)
        close(llm)

    monkeypatch.setattr(LLM, "close", recorded)
    run(*words, stdin=b"hello")
    assert len(closed) == 1


def test_the_summary_counts_what_was_cached_and_guessed() -> None:
    usage = Usage(
        num_prompt_tokens=40,
        num_cached_tokens=32,
        num_output_tokens=5,
        num_draft_tokens=4,
        num_accepted_tokens=3,
    )
    each = Completion(
        request_id="a",
        text="b",
        token_ids=(1,) * 5,
        finish_reason="length",
        usage=usage,
        ttft_s=0.1,
        total_s=0.3,
    )
    assert summary(each) == (
        "[40 tokens in (32 from the cache), 5 out, 20 tokens/s, first after 100 ms, 3 of 4 guesses right, "
        "ended by --max-tokens or the model's context]"
    )
    assert "10 out, 40 tokens/s" in summary(each, each) and "6 of 8" in summary(each, each)
