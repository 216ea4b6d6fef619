"""Text to SQL: a question and a schema in, a query out; right if it gives what the reference query gives.

With a database both queries are run (`tokenmill.evals.sql`); without one `exact` compares their texts,
which counts many right queries as wrong. Own data: `items.jsonl` with `question`, `sql`, `schema` (text for
the prompt) and optionally `database`, a SQLite file beside it.
"""

import csv
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenmill.evals.data import Place, find_file, read_bytes, read_json, read_lines
from tokenmill.evals.sql import normalised_sql, same_result
from tokenmill.evals.task import Answer, Question, Task
from tokenmill.evals.tasks.items import item_id, items, said, user_ask

__all__ = ["TASKS", "query_said"]

_MAX_TOKENS: Final = 256
_FENCED: Final = re.compile(r"```(?:\w+)?\s*\n?(.*?)```", re.DOTALL)
_START: Final = re.compile(r"(?i)\b(select|with)\b")


class _Item(NamedTuple):
    id: str
    question: str
    schema: str
    sql: str
    database: Path | None = None


_Reader = Callable[[Path], Iterator[_Item]]


def query_said(text: str) -> str:
    """The query of an answer: a fenced block if there is one, from SELECT or WITH up to a semicolon or
    empty line.
    """
    fenced = _FENCED.search(text)
    text = fenced.group(1) if fenced else text
    start = _START.search(text)
    return re.split(r";|\n\s*\n", text[start.start() :])[0].strip() if start else ""


def _questions(path: Path, *, read: _Reader) -> Iterator[Question]:
    digests: dict[Path | None, str] = {None: ""}
    for item in read(path):
        if item.database is not None and item.database not in digests:
            digests[item.database] = hashlib.sha256(read_bytes(item.database)).hexdigest()
        content = (
            f"Write one SQLite query that answers the question.\n\nTables:\n{item.schema}\n\n"
            f"Question: {item.question}\n\nAnswer with the query only."
        )
        target = {"sql": item.sql, "database": item.database, "digest": digests[item.database]}
        yield Question(id=item.id, ask=user_ask(content, _MAX_TOKENS), target=target)


def _score(question: Question, answer: Answer) -> Mapping[str, float]:
    query, reference = query_said(said(answer)), question.target["sql"]
    scores = {"exact": float(normalised_sql(query) == normalised_sql(reference))}
    if question.target["database"] is not None:
        verdict = same_result(read_bytes(question.target["database"]), reference, query or "-")
        scores |= {"execution": float(verdict.same), "runs": float(not verdict.error)}
    return scores


def _own(path: Path) -> Iterator[_Item]:
    for row in items(path):
        database = None
        if "database" in row.fields:
            database = row.place.path.parent / row.text("database")
            if not database.is_file():
                row.place.refuse(f"the database {database} does not exist")
        yield _Item(item_id(row), row.text("question"), row.text("schema"), row.text("sql"), database)


def _geoquery(path: Path) -> Iterator[_Item]:
    """The questions of the split `test`; a template's variables are put into question and query."""
    file, schema = find_file(path, "geography.json"), _schema(find_file(path, "geography-schema.csv"))
    database = find_file(path, "geography-db.sqlite")
    number = 0
    for entry in _json_list(file):
        try:
            reference, sentences = str(entry["sql"][0]), list(entry["sentences"])
            tests = [s for s in sentences if s["question-split"] == "test"]
            filled = [(_fill(s["text"], s["variables"]), _fill(reference, s["variables"])) for s in tests]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            Place(file).refuse(f"has an entry that is no question with its query ({error!r})")
        for question, sql in filled:
            number += 1
            yield _Item(str(number), question, schema, sql, database)


def _fill(text: str, variables: Mapping[str, str]) -> str:
    for name, value in variables.items():
        text = text.replace(name, str(value))
    return text


def _schema(path: Path) -> str:
    """`TABLE(COLUMN type, ...)`, a table a line, from rows of table, column, two flags and type."""
    tables: dict[str, list[str]] = {}
    for place, line in read_lines(path):
        cells = next(csv.reader([line], skipinitialspace=True), [])
        if place.line == 1 or not cells or cells[0] == "-":
            continue
        if len(cells) != 5:
            place.refuse(f"has {len(cells)} fields, expected 5")
        tables.setdefault(cells[0], []).append(f"{cells[1]} {cells[4]}")
    return "\n".join(f"{name}({', '.join(columns)})" for name, columns in tables.items())


def _spider(path: Path) -> Iterator[_Item]:
    """The development set; its databases cannot be had, so only texts are compared."""
    schemas = {str(each.get("db_id")): each for each in _json_list(find_file(path, "tables.json"))}
    file = find_file(path, "dev.json")
    for number, entry in enumerate(_json_list(file), start=1):
        try:
            schema = _spider_schema(schemas[entry["db_id"]])
            yield _Item(str(number), str(entry["question"]), schema, str(entry["query"]))
        except (KeyError, IndexError, TypeError) as error:
            Place(file).refuse(f"entry {number} is no question with its query and schema ({error!r})")


def _spider_schema(tables: Mapping[str, Any]) -> str:
    columns: dict[int, list[str]] = {}
    for (table, name), kind in zip(tables["column_names_original"], tables["column_types"], strict=True):
        columns.setdefault(table, []).append(f"{name} {kind}")
    names = enumerate(tables["table_names_original"])
    return "\n".join(f"{name}({', '.join(columns.get(index, []))})" for index, name in names)


def _json_list(path: Path) -> list[Mapping[str, Any]]:
    values = read_json(path)
    if not isinstance(values, list) or not all(isinstance(each, dict) for each in values):
        Place(path).refuse("is no list of JSON objects")
    return values


def _task(name: str, folder: str, what: str, metric: str, read: _Reader) -> Task:
    return Task(
        name=name,
        version=1,
        summary=what,
        folder=folder,
        metric=metric,
        chance=0.0,
        questions=partial(_questions, read=read),
        score=_score,
    )


TASKS: Final = (
    _task("sql", "items", "own questions to SQL, run on a database where one is given", "execution", _own),
    _task(
        "geoquery", "geoquery_sql", "questions on US geography to SQL, run on SQLite", "execution", _geoquery
    ),
    _task("spider", "spider", "questions on 20 schemas to SQL, compared as text", "exact", _spider),
)
