"""Evaluation rows in training data: each search, nothing missed, templates, the command."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fast.cli_tools import Runner, make_runner
from tokenmill.core import UsageError
from tokenmill.evals.decontamination import Decontaminator, TextRow, decontaminate

LONG = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)


def rows(*texts: str) -> list[TextRow]:
    return [TextRow(f"row {at}", text) for at, text in enumerate(texts)]


def pieces(text: str) -> set[str]:
    return {text[at : at + 5] for at in range(max(1, len(text) - 4))}


def test_exact_is_without_case_and_marks() -> None:
    found = decontaminate(rows("other", "WHAT is, two plus two"), rows("What is two plus two?"))
    [overlap] = found.overlaps
    assert (overlap.kind, overlap.eval_row, overlap.train_row) == ("exact", "row 0", "row 1")
    assert (found.num_train_rows, found.num_train_rows_found) == (2, 1)


def test_thirteen_words_in_a_long_text_are_found_and_twelve_are_not() -> None:
    words = LONG.split()
    around = "some quite different story about a mill and a river "
    inside = around * 5 + " ".join(words[4:17]) + " " + around * 5
    found = decontaminate(rows(inside), rows(LONG))
    [overlap] = found.overlaps
    assert overlap.kind == "ngram"
    assert overlap.share == pytest.approx(1 / (len(words) - 12))
    assert overlap.excerpt == "48 of her friends in april and then she sold half as many"
    inside = around * 5 + " ".join(words[4:16]) + " " + around * 5
    assert decontaminate(rows(inside), rows(LONG)).overlaps == ()


def test_a_changed_word_is_near() -> None:
    [overlap] = decontaminate(
        rows("i have lost my card, can you help me with it"),
        rows("I have lost my card, can you help me with that"),
    ).overlaps
    assert overlap.kind == "near"
    assert 0.7 <= overlap.share < 1
    assert not decontaminate(rows("where is the bank"), rows("I lost my card, will you help me")).overlaps


def test_the_worst_overlap_of_a_row_is_kept() -> None:
    found = decontaminate(rows(LONG + " and more", LONG, LONG + " or less"), rows(LONG, "another one"))
    [overlap] = found.overlaps
    assert (overlap.kind, overlap.train_row) == ("exact", "row 1")
    assert found.num_train_rows_found == 3


def test_equal_evaluation_rows_are_all_found() -> None:
    found = decontaminate(rows("two of a kind"), rows("Two of a kind", "two of a kind!"))
    assert [(each.kind, each.eval_row) for each in found.overlaps] == [("exact", "row 0"), ("exact", "row 1")]


def test_a_template_is_no_evidence() -> None:
    template = "below is an instruction that describes a task write a response that completes the request "
    endings = (" ".join(f"w{at}x{word}" for word in range(60)) for at in range(12))
    evaluation = rows(*(template + ending for ending in endings))
    found = decontaminate(rows(template + "something else entirely " * 20), evaluation)
    assert found.overlaps == ()
    assert found.num_template_grams == 3
    few = decontaminate(rows(template + "something else entirely " * 20), evaluation[:10])
    assert {each.kind for each in few.overlaps} == {"ngram"}


@given(
    st.lists(st.text("ab ", min_size=1, max_size=30), min_size=1, max_size=8),
    st.lists(st.text("ab ", min_size=1, max_size=30), min_size=1, max_size=8),
    st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_near_rows_are_those_of_a_search_of_all_pairs(
    train: list[str], other: list[str], near: float
) -> None:
    index = Decontaminator(rows(*other), near=near)
    for row in rows(*train):
        seen = " ".join(row.text.split())
        expected = set()
        for candidate in rows(*other):
            text = " ".join(candidate.text.split())
            if not seen or not text:
                continue
            common = len(pieces(seen) & pieces(text))
            if common / len(pieces(seen) | pieces(text)) >= near:
                expected.add(candidate.name)
        assert {each.eval_row for each in index.find(row) if each.kind != "ngram"} == expected


@given(st.text("aß\ud800\u0300 \n1é", max_size=40), st.text("aß\ud800\u0300 \n1é", max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_is_taken(first: str, second: str) -> None:
    decontaminate(rows(first), rows(second, first))


def test_bad_bounds_are_refused() -> None:
    with pytest.raises(UsageError, match="no evaluation rows"):
        decontaminate(rows("a"), [])
    with pytest.raises(UsageError, match="ngram 1"):
        Decontaminator(rows("a"), ngram=1)
    with pytest.raises(UsageError, match="near 0"):
        Decontaminator(rows("a"), near=0.0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    return make_runner(monkeypatch, capsys, tmp_path / "home")


def test_the_command_names_rows(tmp_path: Path, run: Runner) -> None:
    train, evaluation = tmp_path / "train.jsonl", tmp_path / "eval.csv"
    train.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Nothing of the kind"}]})
        + "\n"
        + json.dumps({"messages": [{"role": "user", "content": LONG}]})
        + "\n"
    )
    evaluation.write_text(f'question,answer\n"{LONG}",72\nHow many apples are there?,3\n')
    ran = run("decontaminate", str(train), str(evaluation), "--json")
    assert ran.code == 1
    [overlap] = ran.document["overlaps"]
    assert overlap["eval_row"] == f"{evaluation}:2"
    assert overlap["train_row"] == f"{train}:2"
    assert "1 of 2 evaluation rows are in the training data: 0 exact, 1 by 13 words" in ran.err
    clean = tmp_path / "clean.txt"
    clean.write_text("one\n\ntwo\n")
    assert run("decontaminate", str(clean), str(evaluation), "--field", "question").code == 0
    assert run("decontaminate", str(clean), str(evaluation)).code == 0
    ran = run("decontaminate", str(train), str(evaluation), "--field", "prompt")
    assert ran.code == 2
    assert f"{evaluation}:2: there is no prompt; its fields are question, answer" in ran.err
