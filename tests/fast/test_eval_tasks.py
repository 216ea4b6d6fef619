"""Loaders and scorers of tasks: the layouts, and bad data named by file and line."""

import bz2
import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fast.eval_fakes import completion
from tokenmill.core import NotFoundError, Score, TokenmillError, UsageError
from tokenmill.evals.catalog import TASKS, find_task
from tokenmill.evals.data import read_rows
from tokenmill.evals.task import Answer, Choose, Generate, Question, Read

LETTERS = ("A", "B", "C", "D")


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_jsonl(path: Path, *docs: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return path


def ask(name: str, path: Path) -> list[Question]:
    return list(TASKS[name].questions(path))


def mmlu_folder(root: Path, num_shots: int = 5) -> Path:
    shots = [[f"Shot {i}?", "w", "x", "y", "z", "B"] for i in range(num_shots)]
    write_csv(root / "dev/world_history_dev.csv", shots)
    rows = [[' Who said "no"?\nIn full. ', "a, b", "c", "d", "e", "D"], ["Second?", "1", "2", "3", "4", "A"]]
    write_csv(root / "test/world_history_test.csv", rows)
    return root


def test_mmlu_by_letter(tmp_path: Path) -> None:
    first, second = ask("mmlu", mmlu_folder(tmp_path))
    assert (first.id, first.slice, first.target) == ("world_history/1", "world_history", 3)
    assert isinstance(first.ask, Choose)
    about = "The following are multiple choice questions (with answers) about world history.\n\n"
    shots = "".join(f"Shot {i}?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n" for i in range(5))
    own = 'Who said "no"?\nIn full.\nA. a, b\nB. c\nC. d\nD. e\nAnswer:'
    assert first.ask.contexts == (about + shots + own,) * 4
    assert first.ask.continuations == (" A", " B", " C", " D")
    (plain, _) = ask("mmlu-0shot", tmp_path)
    assert isinstance(plain.ask, Choose)
    assert plain.ask.contexts[0] == about + own
    assert second.target == 0


def test_mmlu_cloze(tmp_path: Path) -> None:
    first = ask("mmlu-cloze", mmlu_folder(tmp_path))[0]
    assert isinstance(first.ask, Choose)
    assert first.ask.contexts[0].endswith(
        'Question: Shot 4?\nAnswer: x\n\nQuestion: Who said "no"?\nIn full.\nAnswer:'
    )
    assert first.ask.continuations == (" a, b", " c", " d", " e")


def test_mmlu_of_ones_own(tmp_path: Path) -> None:
    doc = {"question": "Own?", "choices": ["k", "l", "m", "n"], "subject": "own_one"}
    file = write_jsonl(tmp_path / "test.jsonl", {**doc, "answer": 2}, {**doc, "answer": "B"})
    assert [each.target for each in ask("mmlu-0shot", file)] == [2, 1]
    with pytest.raises(NotFoundError, match=r"dev\.jsonl"):
        ask("mmlu", file)
    write_jsonl(tmp_path / "dev.jsonl", *[{**doc, "answer": 0}] * 5)
    assert [each.id for each in ask("mmlu", file)] == ["own_one/1", "own_one/2"]


def test_accuracy_with_and_without_length() -> None:
    question = Question(
        id="1", ask=Choose(contexts=("q",) * 3, continuations=(" a", " bbbb", " cc")), target=1
    )
    scores = [Score(token_ids=(1,), logprobs=(each,)) for each in (-2.0, -4.0, -9.0)]
    assert TASKS["arc-easy"].score(question, Answer(scores=tuple(scores))) == {"acc": 0.0, "acc_norm": 1.0}
    ties = tuple(Score(token_ids=(1,), logprobs=(-1.0,)) for _ in range(3))
    assert TASKS["mmlu"].score(question, Answer(scores=ties)) == {"acc": 0.0}


ARC = {"choices": {"text": ["one", "two", "three"], "label": ["1", "2", "3"]}, "answerKey": "3"}


def test_arc_in_three_layouts(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "hub.jsonl", {"question": "Which?", **ARC})
    listed = [{"text": "one", "label": "1"}, {"text": "two", "label": "2"}, {"text": "three", "label": "3"}]
    inner = {"question": {"stem": "Which?", "choices": listed}, "answerKey": "3"}
    text = (
        "Please choose the correct answer to the question: Which?\n\nAnswer1: one Answer2: two Answer3: three"
    )
    rewritten = {"instruction": f"{text}\n\nAnswer format: answer1/answer2/answer3", "answer": "answer3"}
    (tmp_path / "list.json").write_text(json.dumps([rewritten], indent=2))
    files = [plain, write_jsonl(tmp_path / "ai2.jsonl", inner), tmp_path / "list.json"]
    asked = [ask("arc-challenge", file) for file in files]
    assert asked[0] == asked[1] == asked[2]
    (question,) = asked[0]
    assert isinstance(question.ask, Choose)
    assert question.ask.contexts[0] == "Question: Which?\nAnswer:"
    assert question.ask.continuations == (" one", " two", " three")
    assert question.target == 2


def test_hellaswag_in_both_layouts(tmp_path: Path) -> None:
    text = "Baking: He bakes. he\n2\ngoes.\nsits.\neats.\nruns.\n"
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(text.encode()))
    (question,) = ask("hellaswag", tmp_path)
    assert isinstance(question.ask, Choose)
    assert question.ask.contexts[0] == "Baking: He bakes. he"
    assert question.ask.continuations == (" goes.", " sits.", " eats.", " runs.")
    assert question.target == 2
    doc = {"activity_label": "Baking", "ctx_a": "He bakes [a] it. [title]  So", "ctx_b": "hE GOES"}
    file = write_jsonl(tmp_path / "own.jsonl", {**doc, "endings": ["a. [b] c", "d"], "label": "1"})
    (question,) = ask("hellaswag", file)
    assert isinstance(question.ask, Choose)
    assert question.ask.contexts[0] == "Baking: He bakes it..  So He goes"
    assert question.ask.continuations == (" a. c", " d")


def test_gsm8k(tmp_path: Path) -> None:
    items = [{"question": f"How many {i}?", "answer": f"Count.\n#### {i},000"} for i in range(9)]
    train = "".join(json.dumps(item) + "\n" for item in items).encode()
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(train))
    write_jsonl(tmp_path / "test.jsonl", items[8])
    (question,) = ask("gsm8k", tmp_path)
    assert isinstance(question.ask, Generate) and isinstance(question.ask.prompt, str)
    assert question.ask.prompt.count("Question:") == 9
    assert question.ask.prompt.endswith("#### 7,000\n\nQuestion: How many 8?\nAnswer:")
    assert question.ask.params.stop == ("Question:", "</s>", "<|im_end|>")
    score = TASKS["gsm8k"].score
    for text, strict, flexible in (
        ("#### 8000", 1.0, 1.0),
        ("#### $8,000.", 0.0, 1.0),  # the strict pattern wants a digit first
        ("So 8000 it is, or 7", 0.0, 0.0),
        ("It is $8,000.", 0.0, 1.0),
        ("nothing", 0.0, 0.0),
    ):
        found = score(question, Answer(completions=(completion(text),)))
        assert found == {"strict_match": strict, "flexible_extract": flexible}, text


def test_a_text_keeps_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"a\r\nb\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"z"))
    questions = ask("perplexity", tmp_path)
    assert [(each.id, each.ask) for each in questions] == [
        ("a.txt.gz", Read(text="z")),
        ("b.txt", Read(text="a\r\nb\n")),
    ]


BAD = [
    ("arc-easy", "x.jsonl", '{"question": "a"}\n', ":1: choices is no object"),
    ("arc-easy", "x.jsonl", '\n{"question": \n', ":2: is no JSON"),
    ("arc-easy", "x.jsonl", json.dumps({"question": " ", **ARC}), ':1: question is " ", expected text'),
    (
        "arc-easy",
        "x.jsonl",
        json.dumps({"question": "a", **ARC, "answerKey": "4"}),
        "expected one of 1, 2, 3",
    ),
    ("arc-easy", "x.json", '[\n{"a": 1},\n  7\n]', ":2: choices"),
    ("arc-easy", "x.json", '[\n{"instruction": "Which?", "answer": "answer1"}\n]', ":2: instruction has no"),
    ("arc-easy", "x.json", '{"a": 1}', ":1: is no JSON list"),
    ("arc-easy", "x.json", "[]", "has no items"),
    ("arc-easy", "x.jsonl", "", "has no items"),
    ("arc-easy", "x.txt", "a", "is a .txt file"),
    (
        "piqa",
        "x.jsonl",
        '{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}',
        "label is 2, expected a number",
    ),
    ("piqa", "x.jsonl", '{"goal": "a", "sol1": "b", "sol2": "c", "label": true}', "label is true"),
    ("hellaswag", "x.txt", "a: b\n1\n2\n", ":1: begins an item of 3 lines"),
    ("hellaswag", "x.txt", "a: b\nx\n2\n3\n4\n5\n", ':2: label is "x"'),
    ("gsm8k-cot", "x.jsonl", '{"question": "a", "answer": "3"}', ":1: answer has no number after ####"),
    ("mmlu-0shot", "x.csv", 'a,b,c\n"q",1,2,3,4,A\n', ":1: has 3 fields, expected 6"),
    ("mmlu-0shot", "x.csv", "q,1,2,3,4,A\nq,1,2,3,4,E\n", ':2: answer is "E"'),
    ("mmlu-0shot", "x.csv", 'q,1,2,3,4,"A\n', "is no CSV"),
    ("mmlu-0shot", "x.jsonl", '{"question": "q", "A": "1", "answer": "A"}\n', ":1: has neither choices nor"),
]


@pytest.mark.parametrize(("task", "name", "text", "told"), BAD)
def test_bad_data_is_named(tmp_path: Path, task: str, name: str, text: str, told: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        ask(task, file)
    assert f"{file}" in error.value.message
    assert told in error.value.message


@pytest.mark.parametrize(
    ("name", "data"),
    [("x.jsonl.gz", b"no gzip"), ("x.jsonl.bz2", b"no bzip2"), ("x.jsonl.gz", gzip.compress(b"a" * 99)[:-9])],
    ids=["no gzip", "no bzip2", "cut"],
)
def test_damaged_compression_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match="damaged compressed data"):
        list(read_rows(tmp_path / name))


def test_text_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"fine\nb\xffad")
    with pytest.raises(UsageError, match=r"x\.txt:2: is not UTF-8"):
        ask("perplexity", tmp_path)


@pytest.mark.parametrize("name", list(TASKS))
def test_missing_data_is_told(tmp_path: Path, name: str) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(TokenmillError, match=f"{path}") as error:
            ask(name, path)
        assert "--data" in error.value.hint


def test_names_of_tasks() -> None:
    assert find_task("arc_easy") is TASKS["arc-easy"]
    with pytest.raises(NotFoundError) as error:
        find_task("mmlu-letters")
    assert "mmlu-cloze" in error.value.hint
