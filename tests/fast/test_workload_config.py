"""A workload file is read strictly: what is wrong has file, line and field. What init writes is read back."""

import dataclasses
from pathlib import Path

import pytest

from tests.fast.workload_tools import asked, request, response, write_lines
from tokenmill.core import NotFoundError, UsageError
from tokenmill.costs import Price
from tokenmill.workload import (
    Incumbent,
    Quality,
    Row,
    Terms,
    WorkloadConfig,
    count_terms,
    infer_log,
    infer_workload,
    read_rows,
    read_workload,
    write_workload,
)
from tokenmill.workload.inference import model_price
from tokenmill.workload.write import workload_text

EXAMPLES = Path(__file__).parents[2] / "examples"

WRONG = {
    "log: x\nfoo: 1": "2: foo is not known",
    "log: x\nquality:\n  confidense: 1": "3: quality.confidense is not known",
    "log: x\nquality:\n  margin: 3": "3: margin is 3",
    "log: x\nquality: {margin: .nan}": "2: margin is nan",
    "log: x\nquality:\n  bar: 2": "3: bar is 2",
    "log: x\nquality:\n  bar: best": "3: quality.bar: Invalid enum value 'best', expected incumbent",
    "log: x\nquality:\n\n  scorer: bleu": "4: quality.scorer: Invalid enum value 'bleu', expected exact",
    "log: x\nquality: {scorer: label}": "2: scorer is label, and there are no labels",
    "log: x\nincumbent:\n  price_in: 1": "3: price_in is there and price_out is not",
    "log: x\nincumbent:\n  price_in: 1\n  price_out: 2": "3: price_in has no date",
    "log: x\nincumbent:\n  price_in: .inf": "3: price_in is inf",
    "log: x\nincumbent:\n  price_in: '1'": "3: incumbent.price_in: Expected",
    "log: x\nincumbent: {kind: endpoint}": "2: kind is endpoint without a url",
    "log: x\nincumbent: {kind: model}": "2: kind is model without a name",
    "log: x\nslo: {e2e_ms: -1}": "2: e2e_ms is -1",
    "log: x\nslo:": "2: slo is no mapping",
    "log: x\nsplit: {train: 0.5}": "2: train, select and certify are 0.5, 0.1 and 0.2",
    "log: x\nsplit: {by: hash}": "2: split.by: Invalid enum value 'hash', expected auto, time, cluster",
    "log: x\nterms: {rules: {MIT: perhaps}}": "2: terms.rules: Invalid enum value 'perhaps', expected allow",
    "log: x\nlabels: [yes, no]": "2: labels[0]: Expected `str`",
    "log: x\nlabels: [a, a]": "2: labels has one twice",
    "log: x\ncolumns: {question: text}": "2: columns.question is not known",
    "log: x\nslice_by: intent": "2: slice_by is 'intent'",
    "log: x\nbudget_s: 0": "2: budget_s is 0",
    "log: x\nlog: y": "2: log is there twice",
    "log: 3": "1: log: expected the name of a file",
    "log: x\n  y: z": "2: is no YAML",
    "- a": " the file is no mapping",
    "": " the file is no mapping",
    "quality: {}": " Object missing required field `log`",
    "log: !!python/object:os.system x": "no YAML",
    "&a [*a]": "no YAML",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named_with_file_and_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "workload.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_workload(path)
    assert error.value.message.startswith(str(path))
    assert WRONG[text] in error.value.message
    assert error.value.hint


def test_a_file_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="tokenmill init"):
        read_workload(tmp_path / "none.yaml")


def test_only_the_log_must_be_given_and_paths_are_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text("log: a/b.jsonl\nincumbent: {price_in: 1, price_out: 2, price_date: 2026-08-05}")
    config = read_workload(path)
    incumbent = Incumbent(price_in=1, price_out=2, price_date="2026-08-05")
    assert config == WorkloadConfig(log=tmp_path / "a/b.jsonl", incumbent=incumbent)


def test_the_example_of_the_page_is_one(tmp_path: Path) -> None:
    page = (EXAMPLES.parent / "docs" / "workload.md").read_text(encoding="utf-8")
    path = tmp_path / "workload.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0])
    config = read_workload(path)
    named = {each.name for each in dataclasses.fields(WorkloadConfig)}
    assert all(f"\n{name}:" in "\n" + path.read_text() for name in named)
    assert config.split == WorkloadConfig(log=Path("x")).split


@pytest.mark.parametrize("name", ["slots", "banking77"])
def test_the_examples_are_read(name: str) -> None:
    config = read_workload(EXAMPLES / name / "workload.yaml")
    rows = read_rows(config).rows
    assert len(rows) == {"slots": 13434, "banking77": 11543}[name]
    assert {row.target for row in rows} == set(config.labels) or not config.labels
    assert {each.action for each in count_terms(rows, config.terms)} == {"allow"}
    assert len({row.slice for row in rows}) == {"slots": 7, "banking77": 1}[name]


def chats(answers: list[str]) -> list[dict[str, object]]:
    return [
        {"messages": [*asked(number), {"role": "assistant", "content": answer}]}
        for number, answer in enumerate(answers)
    ]


GUESSED: dict[str, tuple[list[str], str, str]] = {
    "json": ([f'{{"intent": "{"ab"[n % 2]}", "n": {n}}}' for n in range(80)], "json", "json:intent"),
    "label": (["yes", "no", "perhaps"] * 20, "label", "answer"),
    "sql": ([f"SELECT a FROM t WHERE b = {n}" for n in range(30)], "sql", "log"),
    "short": ([f"It is {n}" for n in range(30)], "exact", "log"),
    "free": ([f"{n} " * 60 for n in range(30)], "rouge", "log"),
    "few": (["yes", "no"], "exact", "log"),
}


@pytest.mark.parametrize("name", GUESSED)
def test_the_kind_of_answers_is_seen(name: str, tmp_path: Path) -> None:
    answers, scorer, slice_by = GUESSED[name]
    config = infer_workload(write_lines(tmp_path / "log.jsonl", chats(answers)))
    assert (config.quality.scorer, config.slice_by) == (scorer, slice_by)
    assert config.labels == (tuple(sorted(set(answers))) if scorer == "label" else ())


@pytest.mark.parametrize("name", GUESSED)
def test_what_init_writes_is_what_was_guessed(name: str, tmp_path: Path) -> None:
    answers, _, _ = GUESSED[name]
    odd = [f'{each}: # "\u2028' if name == "free" else each for each in answers]
    (tmp_path / "logs").mkdir()
    found = infer_log(write_lines(tmp_path / "logs" / "log.jsonl", chats(odd)))
    path = tmp_path / "workload.yaml"
    write_workload(found, path)
    assert read_workload(path) == found.config
    assert 'log: "logs/log.jsonl"' in path.read_text()
    with pytest.raises(UsageError, match="is there already"):
        write_workload(found, path)


def test_labels_that_yaml_would_read_as_something_else_stay_texts(tmp_path: Path) -> None:
    answers = ["yes", "no", "null", "1", "2026-01-01", "a: b", "- x", "# y", "é"] * 10
    found = infer_log(write_lines(tmp_path / "log.jsonl", chats(answers)))
    path = tmp_path / "w.yaml"
    path.write_text(workload_text(found, tmp_path))
    assert read_workload(path).labels == tuple(sorted(set(answers)))


def price(provider: str, model: str, date: str = "2026-01-01", tier: str = "standard") -> Price:
    return Price(
        provider=provider,
        model=model,
        tier=tier,
        input_usd=1,
        output_usd=2,
        cached_usd=0.5,
        date=date,
        source="s",
    )


def test_the_incumbent_has_the_newest_price_of_its_model(tmp_path: Path) -> None:
    lines = [{"request": request(n), "response": response(n)} for n in range(3)]
    log = write_lines(tmp_path / "log.jsonl", lines)
    prices = [
        price("openai", "gpt-5-mini"),
        price("openai", "gpt-5-mini", "2026-08-05"),
        price("openai", "gpt-5"),
    ]
    found = infer_log(log, prices=prices).config.incumbent
    assert (found.name, found.price_date, found.price_cached) == ("gpt-5-mini-2025-08-07", "2026-08-05", 0.5)
    assert "openai gpt-5-mini" in found.price_source
    assert infer_log(log, prices=[price("openai", "gpt-5")]).config.incumbent.price_in is None


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        ("gpt-5-mini", "openai"),
        ("openai/gpt-5-mini", "openai"),
        ("azure/GPT-5-mini-2025-08-07", "openai"),
        ("groq/llama", "groq"),
        ("gpt-5-mini-ft:me", ""),
        ("mini", ""),
    ],
)
def test_a_price_is_of_that_model_and_no_other(name: str, provider: str) -> None:
    prices = [price("openai", "gpt-5-mini"), price("cerebras", "llama", "2026-09-09"), price("groq", "llama")]
    found = model_price(name, prices)
    assert (found.provider if found else "") == provider


def answered(*terms: str, origin: str = "") -> Row:
    return Row(id="0", number=1, request={"messages": []}, answer="a", terms=terms, origin=origin)


@pytest.mark.parametrize(
    ("row", "action"),
    [
        (answered("Apache-2.0"), "allow"),
        (answered("cc-by-4.0"), "allow"),
        (answered("CC-BY-NC-4.0"), "warn"),
        (answered("CC-BY-SA-4.0"), "warn"),
        (answered("MIT", "OpenAI terms of use"), "warn"),
        (answered("MIT", "Secret Licence"), "deny"),
        (answered(), "warn"),
        (answered(origin="gpt-5"), "deny"),
        (answered("MIT", origin="gpt-5"), "deny"),
        (answered(origin="our-own-7b"), "allow"),
        (answered("OpenAI terms of use", origin="our-own-7b"), "warn"),
    ],
)
def test_the_strictest_of_all_terms_holds(row: Row, action: str) -> None:
    rules = {"secret*": "deny", "origin:gpt-*": "deny", "origin:our-*": "allow"}
    assert Terms(rules=rules).ruling(row).action == action  # type: ignore[arg-type]


def test_the_file_says_what_rows_without_terms_are_under() -> None:
    assert Terms(answers=("own",)).ruling(answered()).action == "allow"
    assert Terms(unknown="deny").ruling(answered()).action == "deny"
    assert Terms(rules={"mit": "deny"}).ruling(answered("MIT")) == ("deny", "MIT")
    counts = count_terms([answered("MIT"), answered(), answered()], Terms())
    assert [tuple(each) for each in counts] == [("warn", "", 2), ("allow", "MIT", 1)]


def test_a_bar_is_relative_or_a_score() -> None:
    assert Quality().bar == "incumbent"
    assert Quality(bar=0.9).bar == 0.9
