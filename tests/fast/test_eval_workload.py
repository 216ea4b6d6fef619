"""The tasks of a workload: labels, fields, summaries, SQL, conversations, calls, and the judge."""

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fast.eval_tools import completion, data_folder, prompt_of, written
from tokenmill.core import Completion, Message, SamplingParams, UsageError
from tokenmill.evals.catalog import find_task
from tokenmill.evals.function_calls import Call, parse_calls
from tokenmill.evals.judge import Pair, cohen_kappa, family_of, judge_pairs
from tokenmill.evals.rouge import rouge
from tokenmill.evals.sql import normalised_sql, same_result
from tokenmill.evals.task import Question
from tokenmill.evals.tasks.extraction import field_scores, first_object
from tokenmill.evals.tasks.labels import label_said
from tokenmill.evals.tasks.sql import query_said
from tokenmill.evals.tasks.summaries import unsupported


def own(folder: Path, task: str, *rows: dict[str, Any]) -> list[Question]:
    """The questions of a user's items."""
    (folder / "items.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return list(find_task(task).questions(folder))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("card_arrival", "card_arrival"),
        ("Label: Card arrival.", "card_arrival"),
        ("The label is card arrival, I think.", "card_arrival"),
        ("lost card arrival", "lost_card_arrival"),
        ("card_arrival or top_up", None),
        ("something else", None),
        ("", None),
    ],
)
def test_labels_are_read_from_answers(text: str, label: str | None) -> None:
    assert label_said(text, ["card_arrival", "lost_card_arrival", "top_up"]) == label


def test_own_labels(tmp_path: Path) -> None:
    rows = ({"text": "good", "label": "plus"}, {"text": "bad", "label": "minus", "id": "b"})
    first, second = own(tmp_path, "classify", *rows)
    assert (first.id, second.id) == ("1", "b")
    assert "minus, plus" in prompt_of(first)[0]
    assert find_task("classify").score(first, written("Plus")) == {"accuracy": 1.0, "named_a_label": 1.0}
    (tmp_path / "labels.json").write_text('["plus"]')
    with pytest.raises(UsageError, match=r"items.jsonl:2.*label"):
        list(find_task("classify-scored").questions(tmp_path))


def test_objects_are_found_in_answers() -> None:
    assert first_object('Sure {x} : {"a": {"b": 1}} and {"c": 2}') == {"a": {"b": 1}}
    assert first_object("{" * 10_000) is None
    assert first_object("[1]") is None


def test_fields_are_counted() -> None:
    wanted = {"city": ["Rome"], "days": ["two", "three"]}
    text = "Rome for two or three days"
    assert field_scores(wanted, {"city": "rome ", "days": ["three", "two"]}, text) == {
        "exact": 1.0,
        "field_f1": 1.0,
        "unsupported": 0.0,
    }
    some = field_scores(wanted, {"city": "Paris", "days": ["two"]}, text)
    assert some == {"exact": 0.0, "field_f1": pytest.approx(0.4), "unsupported": 0.5}
    assert field_scores({}, {}, text) == {"exact": 1.0, "field_f1": 1.0}


def test_own_fields(tmp_path: Path) -> None:
    (question,) = own(tmp_path, "extract", {"text": "Rome, 2 days", "fields": {"city": "Rome", "days": 2}})
    scores = find_task("extract").score(question, written('{"city": "Rome", "days": 2}'))
    assert (scores["exact"], scores["valid_json"]) == (1.0, 1.0)
    assert find_task("extract").score(question, written("Rome"))["valid_json"] == 0.0
    with pytest.raises(UsageError, match=r"items.jsonl:1: fields"):
        own(tmp_path, "extract", {"text": "t", "fields": {"a": None}})


def test_rouge() -> None:
    scores = rouge("The cat sat on the mat.", "the cat ran on a mat")
    assert scores == pytest.approx({"rouge1": 4 / 6, "rouge2": 1 / 5, "rougeL": 4 / 6})
    assert rouge("", "a") == rouge("a", "!") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_what_a_summary_makes_up() -> None:
    text = "Anna Smith paid 1,200 euros for two bikes in Rome on Monday."
    assert unsupported(text, "On Monday Anna bought 2 bikes for 1200 euros.") == {
        "unsupported_numbers": 0.0,
        "unsupported_names": 0.0,
    }
    assert unsupported(text, "She met Bob and Anna's aunt, 45.") == {
        "unsupported_numbers": 1.0,
        "unsupported_names": 0.5,
    }
    assert unsupported(text, "nothing to say") == {}


def test_queries_are_found_in_answers() -> None:
    assert query_said("Here:\n```sql\nSELECT a\nFROM t;\n```") == "SELECT a\nFROM t"
    assert query_said("The query is SELECT 1; it works") == "SELECT 1"
    assert query_said("I cannot") == ""


def test_normalised_sql() -> None:
    left = 'select  A.x from T as a where x <> "Mixed Case" ;'
    assert normalised_sql(left) == normalised_sql("SELECT a.x FROM t a WHERE x != 'Mixed Case'")
    assert normalised_sql(left) != normalised_sql(left.replace("Mixed", "mixed"))


@pytest.fixture
def database(tmp_path: Path) -> bytes:
    path = tmp_path / "d.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (a INTEGER, b TEXT)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", [(1, "x"), (2, "y"), (3, None)])
    connection.close()
    return path.read_bytes()


def test_queries_are_compared_by_what_they_give(database: bytes) -> None:
    reference = "SELECT a FROM t"
    assert same_result(database, reference, "SELECT a FROM t ORDER BY a DESC").same
    assert not same_result(database, f"{reference} ORDER BY a", "SELECT a FROM t ORDER BY a DESC").same
    assert not same_result(database, reference, "SELECT a FROM t WHERE a > 1").same
    with pytest.raises(UsageError, match="reference"):
        same_result(database, "SELECT nothing FROM t", "SELECT 1")


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM t",
        "ATTACH DATABASE '/tmp/x' AS x",
        "PRAGMA database_list",
        "SELECT load_extension('x')",
        "SELECT zeroblob(1000000000)",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c",
        "SELECT 1; SELECT 2",
        "nonsense",
    ],
)
def test_hostile_queries_give_nothing(database: bytes, query: str) -> None:
    verdict = same_result(database, "SELECT a FROM t", query)
    assert not verdict.same
    assert verdict.error


def test_geoquery_references_give_the_same_as_themselves() -> None:
    task = find_task("geoquery")
    questions = list(task.questions(data_folder("geoquery_sql")))
    assert len(questions) == 279
    answer = written(f"```sql\n{questions[0].target['sql']}\n```")
    assert task.score(questions[0], answer) == {"exact": 1.0, "execution": 1.0, "runs": 1.0}
    assert "CITY(CITY_NAME varchar(255)" in prompt_of(questions[0])[0]


def test_conversations_are_asked_turn_by_turn(tmp_path: Path) -> None:
    turns = [{"user": "2+2?", "reference": "It is 4."}, {"user": "Twice?", "reference": "Then 8."}]
    first, second = own(tmp_path, "chat", {"turns": turns, "system": "Be brief."})
    assert prompt_of(first) == ["Be brief.", "2+2?"]
    assert prompt_of(second) == ["Be brief.", "2+2?", "It is 4.", "Twice?"]
    assert find_task("chat").score(second, written("That makes 8!"))["same_number"] == 1.0
    with pytest.raises(UsageError, match=r"items.jsonl:1: turns"):
        own(tmp_path, "chat", {"turns": []})


def test_calls_are_read() -> None:
    text = "```python\n[a.b(x=-1, y=[1, 'two'], z={'k': True}), f(t=(1, 2.5))]\n```"
    assert parse_calls(text) == [
        Call("a.b", {"x": -1, "y": [1, "two"], "z": {"k": True}}),
        Call("f", {"t": (1, 2.5)}),
    ]
    assert parse_calls("f(x=2 * 3, y=g(1), z=name)") == [Call("f", {"x": 6, "y": "g(1)", "z": "name"})]
    for bad in ("Sorry, no.", "[1, 2]", "(" * 10_000, "f(x=1) g(y=2)"):
        with pytest.raises(UsageError):
            parse_calls(bad)


@pytest.mark.parametrize(
    ("text", "accuracy"),
    [
        ("[area(base=10, height=5)]", 1.0),
        ("[area(base=10, height=5, unit='Units')]", 1.0),
        ("[area(base=10)]", 0.0),
        ("[area(base='10', height=5)]", 0.0),
        ("[area(base=10, height=5, colour='red')]", 0.0),
        ("[area(base=10, height=5), area(base=10, height=5)]", 0.0),
        ("[volume(base=10, height=5)]", 0.0),
        ("[area(base=10, height=6)]", 0.0),
        ("The area is 25.", 0.0),
    ],
)
def test_calls_are_compared(text: str, accuracy: float) -> None:
    properties = {"base": {"type": "integer"}, "height": {"type": "integer"}, "unit": {"type": "string"}}
    function = {"name": "area", "parameters": {"properties": properties, "required": ["base", "height"]}}
    target = {
        "functions": [function],
        "accepted": [{"area": {"base": [10], "height": [5], "unit": ["units", ""]}}],
    }
    task = find_task("bfcl")
    some = next(iter(task.questions(data_folder("bfcl"))))
    question = Question(id="q", ask=some.ask, target=target)
    assert task.score(question, written(text))["accuracy"] == accuracy


class OneSided:
    """A judge that says what it is told, by which answer is shown first."""

    def __init__(self, *said: str) -> None:
        self._said = said

    def generate(self, prompts: Sequence[str], params: object) -> list[Completion]:
        raise NotImplementedError

    def chat(
        self, conversations: Sequence[Sequence[Message]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        return [completion(self._said[i % len(self._said)]) for i in range(len(conversations))]


PAIRS = [Pair(id=str(i), question="q", first="a", second="b", label="first") for i in range(4)]


def test_a_judge_that_prefers_a_place_says_nothing() -> None:
    report = judge_pairs(OneSided("[[A]]"), "qwen-7b", ("smollm2-135m", "llama-1b"), PAIRS)
    assert set(report.verdicts) == {"tie"}
    assert (report.inconsistent, report.first_place, report.agreement, report.kappa) == (1.0, 1.0, 0.0, 0.0)
    assert "agrees little" in report.warning


def test_a_consistent_judge_is_heard() -> None:
    report = judge_pairs(OneSided("so [[A]]", "so [[B]]"), "qwen-7b", ("smollm2",), PAIRS)
    assert set(report.verdicts) == {"first"}
    assert (report.inconsistent, report.first_place, report.agreement, report.kappa) == (0.0, 0.5, 1.0, 1.0)
    assert not report.warning
    unread = judge_pairs(
        OneSided("hm"), "qwen-7b", ("smollm2",), [Pair(id="1", question="q", first="a", second="b")]
    )
    assert (unread.unread, unread.kappa, unread.first_place) == (1.0, None, None)
    assert "unproven" in unread.warning


def test_a_judge_of_the_family_is_refused() -> None:
    with pytest.raises(UsageError, match="own family"):
        judge_pairs(OneSided("[[A]]"), "Qwen/Qwen2.5-7B", ("org/qwen3-0.6b",), PAIRS)
    assert judge_pairs(OneSided("[[A]]"), "qwen-7b", ("qwen3",), PAIRS, allow_same_family=True).verdicts
    names = {
        "Mixtral-8x7B": "mistral",
        "gpt-4o": "gpt",
        "o3-mini": "gpt",
        "SmolLM2-135M": "smollm",
        "bob-1b": "bob",
    }
    assert {name: family_of(name) for name in names} == names


def test_kappa() -> None:
    assert cohen_kappa("aabb", "aabb") == 1.0
    assert cohen_kappa("aabb", "abab") == 0.0
    assert cohen_kappa(
        ["y"] * 20 + ["n"] * 30, ["y"] * 15 + ["n"] * 5 + ["y"] * 10 + ["n"] * 20
    ) == pytest.approx(0.4)
