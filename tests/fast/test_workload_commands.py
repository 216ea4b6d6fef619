"""`tokenmill init` and `tokenmill workload check`, as their user: what they say, write, and refuse to do."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.fast.cli_tools import Runner, make_runner
from tests.fast.workload_tools import asked, request, response, row, write_lines
from tokenmill.cli.workload import DISAGREEMENTS
from tokenmill.evals.statistics import provable_margin
from tokenmill.workload import Incumbent, Log, Terms, WorkloadConfig, incumbent_cost, split, summarise


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    monkeypatch.chdir(tmp_path)
    return make_runner(monkeypatch, capsys, tmp_path / "home")


def exchange(number: int, created: int = 0) -> dict[str, Any]:
    answer = response(number, created=created or 1_790_000_000 + number)
    return {"request": request(number), "response": answer, "terms": ["OpenAI terms of use"]}


def test_init_and_check_go_from_a_log_to_what_it_can_prove(run: Runner, tmp_path: Path) -> None:
    write_lines(tmp_path / "calls.jsonl", [exchange(n**3, 1_790_000_000 + n * 8640) for n in range(1, 401)])
    result = run("init", "calls.jsonl")
    assert result.code == 0, result.err
    assert "400 calls, read as exchange" in result.out
    text = Path("workload.yaml").read_text()
    assert "price_in: 0.25" in text and '400 rows "OpenAI terms of use": warn' in text
    result = run("workload", "check", "workload.yaml", "--json")
    assert result.code == 0, result.err
    found = result.document
    assert (found["num_rows"], found["split_by"], found["num_certify"]) == (400, "time", 80)
    assert found["input"] == {
        "total": 8000,
        "least": 20,
        "p50": 20,
        "p95": 20,
        "most": 20,
        "num_estimated": 0,
    }
    a_call = (12 * 0.25 + 8 * 0.025 + 3 * 2.0) / 1e6
    assert math.isclose(found["cost"]["total_usd"], 400 * a_call)
    assert math.isclose(found["cost"]["per_month_usd"], 400 * a_call / 39.9 * 30)
    assert found["cost"]["num_estimated"] == 0
    [proof] = found["proofs"]
    assert proof["num_items"] == 80
    wanted = [provable_margin(80, disagreement=each) for each in DISAGREEMENTS]
    assert list(proof["margins"].values()) == wanted
    assert "too small to prove a margin of 0.02" in result.err


def test_check_takes_a_log_and_says_what_it_left_out(run: Runner, tmp_path: Path) -> None:
    lines = [*(json.dumps(exchange(n**3)) for n in range(1, 51)), "{", "[]"]
    write_lines(tmp_path / "calls.jsonl", lines)
    result = run("workload", "check", "calls.jsonl", "--rejected", "calls.rejected.jsonl")
    assert result.code == 0, result.err
    assert "50 calls of 1.4 days, read as exchange; 2 lines are none" in result.out
    assert "line 51: is no JSON" in result.err and "line 52: is a list" in result.err
    kept = [json.loads(line) for line in Path("calls.rejected.jsonl").read_text().splitlines()]
    assert [each["line"] for each in kept] == [51, 52]


def test_init_never_overwrites(run: Runner, tmp_path: Path) -> None:
    write_lines(tmp_path / "calls.jsonl", map(exchange, range(1, 10)))
    Path("mine.yaml").write_text("precious")
    result = run("init", "calls.jsonl", "--out", "mine.yaml")
    assert (result.code, Path("mine.yaml").read_text()) == (2, "precious")
    assert "mine.yaml is there already" in result.error_line


def test_columns_are_named_by_a_flag(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        "q,a\n" + "".join(f"question {n**5},{'xy'[n % 2]}\n" for n in range(40))
    )
    assert "columns" in run("init", "log.csv").error_line
    result = run("init", "log.csv", "--column", "prompt=q", "answer=a")
    assert result.code == 0, result.err
    assert run("workload", "check", "workload.yaml", "--json").document["balance"]["num_answers"] == 2
    assert "means nothing" in run("init", "log.csv", "--out", "b.yaml", "--column", "q").error_line
    assert "no column for question" in run("init", "log.csv", "--out", "b.yaml", "--column", "question=q").err
    assert not Path("b.yaml").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["init", "none.jsonl"], 3, "there is no file none.jsonl"),
        (["workload", "check", "none.yaml"], 3, "there is no file none.yaml"),
        (["workload", "check", "bad.yaml"], 2, "bad.yaml:2: margins is not known"),
        (["workload", "check", "lost.yaml"], 3, "there is no file gone.jsonl"),
        (["workload", "check", "few.jsonl"], 2, "too few to split"),
        (["workload"], 2, "no action"),
    ],
)
def test_errors_are_one_line_with_a_code(
    run: Runner, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    (tmp_path / "bad.yaml").write_text("log: x\nmargins: 1\n")
    (tmp_path / "lost.yaml").write_text("log: gone.jsonl\n")
    write_lines(tmp_path / "few.jsonl", [exchange(1), exchange(2)])
    result = run(*words)
    assert result.code == code
    assert said in result.error_line


def test_tokens_that_nobody_counted_are_estimated_and_said_to_be(run: Runner, tmp_path: Path) -> None:
    chats = [{"messages": [*asked(n**3), {"role": "assistant", "content": f"{n}"}]} for n in range(40)]
    write_lines(tmp_path / "calls.jsonl", chats)
    result = run("workload", "check", "calls.jsonl")
    assert "estimated from the texts of 40 rows" in result.out
    assert "cost today: not known" in result.out


def test_a_summary_counts_duplicates_contradictions_and_unknown_labels() -> None:
    rows = [row(n, answer="yes") for n in range(20)]
    again = [dataclasses.replace(rows[0], id="x"), dataclasses.replace(rows[1], id="y", answer="no ")]
    rows += [*again, row(30, answer="maybe")]
    config = WorkloadConfig(log=Path("x"), labels=("yes", "no"), terms=Terms(unknown="deny"))
    found = summarise(config, Log(tuple(rows), (), "x"), split(rows))
    assert tuple(found.duplicates) == (2, 1, 4)
    assert tuple(found.balance) == (3, "yes", 21 / 23, 1, 1)
    assert [tuple(each) for each in found.terms] == [("deny", "", 23)]
    assert found.cost is None and found.days is None


def test_cached_input_is_charged_as_such_only_where_it_has_a_price() -> None:
    rows = [row(1, num_input_tokens=1000, num_cached_tokens=400, num_output_tokens=100)]
    prices = {"price_in": 1.0, "price_out": 10.0, "price_date": "2026-01-01"}
    plain = incumbent_cost(rows, Incumbent(**prices))  # type: ignore[arg-type]
    cached = incumbent_cost(rows, Incumbent(**prices, price_cached=0.1))  # type: ignore[arg-type]
    assert plain is not None and cached is not None
    assert math.isclose(plain.total_usd, 0.002)
    assert math.isclose(cached.total_usd, 0.002 - 400 * 0.9 / 1e6)
    assert incumbent_cost(rows, Incumbent()) is None
