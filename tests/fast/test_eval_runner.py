"""Runs of tasks: all items asked once, failures named, a killed run ends with the same figures."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.fast.eval_fakes import FakeModel
from tokenmill.core import Message, SamplingParams, UsageError
from tokenmill.evals.ask import EvaluatedModel
from tokenmill.evals.catalog import find_task
from tokenmill.evals.runner import EvalOptions, evaluate
from tokenmill.evals.task import Answer, Choose, Generate, Question, Read, Task

GREEDY = SamplingParams(max_tokens=8)
DRAWN = SamplingParams(max_tokens=8, temperature=1.0, n=3)


def writes(question: Question, answer: Answer) -> Mapping[str, float]:
    return {"exact": float(all(each.text == question.target for each in answer.completions))}


def task(questions: list[Question], **changes: Any) -> Task:
    def read(path: Path) -> Iterator[Question]:
        yield from questions

    made = Task(
        name="made",
        version=1,
        summary="made up",
        folder="",
        metric="exact",
        chance=0.2,
        questions=read,
        score=writes,
    )
    return replace(made, **changes)


def numbers(count: int, params: SamplingParams = GREEDY) -> list[Question]:
    return [
        Question(
            id=str(i), ask=Generate(prompt=f"<{i}>", params=params), target=str(i % 3), slice="ab"[i % 2]
        )
        for i in range(count)
    ]


def run(
    model: FakeModel,
    questions: list[Question],
    folder: Path,
    options: EvalOptions | None = None,
    **changes: Any,
) -> dict[str, Any]:
    subject = EvaluatedModel(name="fake", about={"digest": "1"}, generator=model, scorer=model, reader=model)
    return evaluate(task(questions, **changes), Path(), subject, folder, options or EvalOptions(window=4))


def third(prompt: str) -> str:
    return str(int(prompt.strip("<>")) % 4 % 3)


@pytest.mark.parametrize(
    ("seconds", "sizes"), [(0.1, [64, 128, 8]), (20.0, [64, 64, 64, 8]), (90.0, [64, 32, 16])]
)
def test_slow_models_are_kept_more_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, sizes: list[int]
) -> None:
    clock = count(step=seconds)
    monkeypatch.setattr("tokenmill.evals.runner.time.perf_counter", lambda: next(clock))
    run(FakeModel(third), numbers(200), tmp_path, EvalOptions())
    asked = [json.loads(line)["num_items"] for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert asked[: len(sizes)] == sizes and sum(asked) == 200


def test_a_database_counts_by_what_it_holds_and_not_by_where_it_lies(tmp_path: Path) -> None:
    row = {"id": "1", "question": "?", "sql": "SELECT 1", "schema": "t", "database": "d.sqlite"}
    digests = []
    for number, content in enumerate((b"", b"", b"other")):
        data = tmp_path / str(number)
        data.mkdir()
        (data / "items.jsonl").write_text(json.dumps(row))
        (data / "d.sqlite").write_bytes(content)
        subject = EvaluatedModel(name="fake", generator=FakeModel(lambda prompt: "SELECT 1"))
        result = evaluate(find_task("sql"), data, subject, data / "out", EvalOptions())
        digests.append(result["questions"])
    assert digests[0] == digests[1] != digests[2]


def test_the_figures_of_a_run(tmp_path: Path) -> None:
    result = run(FakeModel(third), numbers(12), tmp_path)
    assert result["metrics"]["exact"]["estimate"] == pytest.approx(4 / 12)
    low, high = (result["value"][end] for end in ("low", "high"))
    assert 0.1 < low < 4 / 12 < high < 0.7
    assert result["chance_corrected"]["estimate"] == pytest.approx((4 / 12 - 0.2) / 0.8)
    assert (result["num_items"], result["num_answered"], result["num_errors"]) == (12, 12, 0)
    assert result["slices"]["a"]["num_answered"] == 6
    assert result["tokens"]["input"] == 120
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 12


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_a_killed_run_ends_with_the_same_figures(tmp_path: Path, calls: int, params: SamplingParams) -> None:
    whole = run(FakeModel(third), numbers(14, params), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(FakeModel(third, dies_after=calls), numbers(14, params), tmp_path / "killed")
    if calls:
        with (tmp_path / "killed/items.jsonl").open("a") as file:
            file.write('{"id": "9", "sli')
    again = FakeModel(third)
    result = run(again, numbers(14, params), tmp_path / "killed", EvalOptions(window=4, resume=True))
    assert figures(result) == figures(whole)
    assert again.num_calls == 4 - calls, "what was answered is not asked again"
    assert {each.seed is None for each in again.params} == {params.greedy}


def test_what_is_drawn_depends_on_the_question_only(tmp_path: Path) -> None:
    one, two = FakeModel(third), FakeModel(third)
    run(one, numbers(6, DRAWN), tmp_path / "1", EvalOptions(window=6))
    run(two, numbers(6, DRAWN), tmp_path / "2", EvalOptions(window=1))
    assert [each.seed for each in one.params] == [each.seed for each in two.params]
    assert len({each.seed for each in one.params}) == 6


def test_failures_are_items_and_the_others_go_on(tmp_path: Path) -> None:
    result = run(FakeModel(third, refuses="<7>"), numbers(12), tmp_path)
    assert (result["num_answered"], result["num_errors"]) == (11, 1)
    assert result["errors"] == [{"id": "7", "error": "a text is refused; leave it out"}]
    # Asked again, it is answered: errors do not stay.
    healed = run(FakeModel(third), numbers(12), tmp_path, EvalOptions(resume=True))
    assert figures(healed) == figures(run(FakeModel(third), numbers(12), tmp_path / "other"))


def test_a_model_that_answers_nothing_ends_the_run(tmp_path: Path) -> None:
    model = FakeModel(refuses="<")
    with pytest.raises(UsageError, match="refused"):
        run(model, numbers(500), tmp_path)
    assert model.num_calls < 50


def test_a_model_that_cannot_do_what_is_asked(tmp_path: Path) -> None:
    subject = EvaluatedModel(name="remote", generator=FakeModel())
    questions = [Question(id="1", ask=Choose(contexts=("a",), continuations=(" b",)), target=0)]
    with pytest.raises(UsageError, match="remote cannot score"):
        evaluate(task(questions), Path(), subject, tmp_path, EvalOptions())


def test_limits_are_nested_and_spread(tmp_path: Path) -> None:
    chosen = {}
    for limit in (5, 20, 1000):
        run(FakeModel(third), numbers(100), tmp_path / str(limit), EvalOptions(limit=limit))
        lines = (tmp_path / str(limit) / "items.jsonl").read_text().splitlines()
        chosen[limit] = [int(json.loads(line)["id"]) for line in lines]
    assert set(chosen[5]) < set(chosen[20]) < set(chosen[1000]) == set(range(100))
    assert chosen[20] == sorted(chosen[20]), "in the order of the data"
    assert max(chosen[20]) > 60


def test_other_data_or_another_limit_is_another_run(tmp_path: Path) -> None:
    run(FakeModel(third), numbers(9), tmp_path)
    for questions, options in (
        (numbers(10), EvalOptions(resume=True)),
        (numbers(9), EvalOptions(resume=True, limit=3)),
        ([*numbers(8), replace(numbers(9)[8], target="9")], EvalOptions(resume=True)),
    ):
        with pytest.raises(UsageError, match=r"something else: .*questions was"):
            run(FakeModel(third), questions, tmp_path, options)


def test_ids_must_be_unique_and_data_not_empty(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two items have the id '0'"):
        run(FakeModel(third), [*numbers(3), *numbers(1)], tmp_path)
    with pytest.raises(UsageError, match="no items"):
        run(FakeModel(third), [], tmp_path)


def test_white_space_moves_over_the_border(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def weigh(context: str, continuation: str) -> float:
        asked.append((context, continuation))
        return -1.0

    choose = Choose(contexts=("Q: ", "Q", "  "), continuations=(" a", " b", "c"))
    run(
        FakeModel(weigh=weigh),
        [Question(id="1", ask=choose, target=0)],
        tmp_path,
        score=lambda question, answer: {"exact": float(len(answer.scores))},
    )
    assert asked == [("Q:", "  a"), ("Q", " b"), ("  ", "c")]


def test_conversations_and_texts_in_one_task(tmp_path: Path) -> None:
    chat = Generate(prompt=(Message(role="user", content="<1>"),), params=GREEDY)
    questions = [numbers(1)[0], Question(id="chat", ask=chat, target="1"), *numbers(4)[2:]]
    result = run(FakeModel(third), questions, tmp_path)
    assert result["num_answered"] == 4
    assert result["metrics"]["exact"]["estimate"] == 1.0


def test_perplexity_is_over_all_tokens(tmp_path: Path) -> None:
    """Windows of 2048 characters, a token each; texts count by their length, not one by one."""
    texts = {"a" * 50_000: -1.0, "b" * 10_000: -3.0}
    questions = [Question(id=text[0], ask=Read(text=text), target=None) for text in texts]
    result = run(
        FakeModel(weigh=lambda context, window: texts["a" * 50_000] if "a" in window else -3.0),
        questions,
        tmp_path,
        metric="perplexity",
        chance=None,
        aggregate="perplexity",
        score=lambda question, answer: {},
    )
    num_a, num_b = 50_000 - 25, 10_000 - 5
    assert result["value"]["estimate"] == pytest.approx(math.exp((num_a + 3 * num_b) / (num_a + num_b)))
    assert result["value"]["low"] < result["value"]["estimate"] < result["value"]["high"]
    assert result["chance_corrected"] is None
