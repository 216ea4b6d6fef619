"""Extraction: a text in, a JSON object with the named fields out.

`exact` is all fields right and none over. `field_f1` counts values: right are those of the reference,
without regard to case and spaces at their ends. `unsupported` is the share of the values that were given
which do not even occur in the text: made up. Own data: `items.jsonl` with `text` and `fields`, an object
whose values are texts, numbers or lists of them; every field that occurs anywhere in the file is asked for.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenmill.core import NotFoundError
from tokenmill.evals.data import DataRow, Place, find_file, read_json, read_lines
from tokenmill.evals.task import Answer, Question, Task
from tokenmill.evals.tasks.items import item_id, items, said, user_ask

__all__ = ["TASKS", "field_scores", "first_object"]

_MAX_TOKENS: Final = 256
_Values = Mapping[str, Sequence[str]]


class _Item(NamedTuple):
    id: str
    text: str
    fields: _Values
    slice: str = ""


_Reader = Callable[[Path], Iterator[tuple[Sequence[str], _Item]]]


def first_object(text: str) -> Mapping[str, Any] | None:
    """The first JSON object in an answer, whatever stands around it; None if there is none."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    for _ in range(100):
        if start < 0:
            break
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
            continue
        return value if isinstance(value, dict) else None
    return None


def field_scores(wanted: _Values, given: Mapping[str, Any], text: str) -> dict[str, float]:
    """`exact`, `field_f1` and, if any value was given, `unsupported`."""
    right = _pairs(wanted)
    found = _pairs({str(name): _texts(value) for name, value in given.items()})
    common = (right & found).total()
    scores = {
        "exact": float(right == found),
        "field_f1": 2 * common / (right.total() + found.total()) if right or found else 1.0,
    }
    if found:
        source = _plain(text)
        made_up = sum(count for (_, value), count in found.items() if value not in source)
        scores["unsupported"] = made_up / found.total()
    return scores


def _pairs(values: _Values) -> Counter[tuple[str, str]]:
    pairs = ((_plain(name), _plain(each)) for name, several in values.items() for each in several)
    return Counter(pair for pair in pairs if pair[1])


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _texts(value: Any) -> list[str]:
    """A value as texts: a list's members; nothing for null; other things as JSON writes them."""
    if value is None:
        return []
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [value if isinstance(value, str) else json.dumps(value)]


def _task(name: str, folder: str, what: str, read: _Reader) -> Task:
    return Task(
        name=name,
        version=1,
        summary=f"{what}, as JSON",
        folder=folder,
        metric="exact",
        chance=0.0,
        questions=partial(_questions, read=read),
        score=_score,
    )


def _questions(path: Path, *, read: _Reader) -> Iterator[Question]:
    for names, item in read(path):
        content = (
            f"Extract these fields from the text as one JSON object: {', '.join(names)}.\n"
            "Copy the values from the text; a field with several values has a list; leave out a field that "
            f"the text does not have.\n\nText: {item.text}\n\nAnswer with the JSON object only."
        )
        target = {"fields": {name: list(values) for name, values in item.fields.items()}, "text": item.text}
        yield Question(id=item.id, ask=user_ask(content, _MAX_TOKENS), target=target, slice=item.slice)


def _score(question: Question, answer: Answer) -> Mapping[str, float]:
    given = first_object(said(answer))
    if given is None:
        return {"exact": 0.0, "field_f1": 0.0, "valid_json": 0.0}
    return {**field_scores(question.target["fields"], given, question.target["text"]), "valid_json": 1.0}


def _own(path: Path) -> Iterator[tuple[Sequence[str], _Item]]:
    rows = [(row, _own_fields(row)) for row in items(path)]
    names = sorted({name for _, fields in rows for name in fields})
    for row, fields in rows:
        yield names, _Item(item_id(row), row.text("text"), fields)


def _own_fields(row: DataRow) -> _Values:
    fields = row.fields.get("fields")
    if not isinstance(fields, dict) or not all(
        isinstance(v, str | int | float | list) for v in fields.values()
    ):
        row.place.refuse("fields is no object of texts, numbers or lists")
    return {name: _texts(value) for name, value in fields.items()}


def _snips(path: Path) -> Iterator[tuple[Sequence[str], _Item]]:
    """Slots of each intent's `validate_INTENT.json`; the slice is the intent."""
    files = sorted(path.glob("validate_*.json*"))
    if not files:
        raise NotFoundError(
            f"{path} has no validate_INTENT.json", hint="give the folder of SNIPS with --data"
        )
    for file in files:
        intent = file.name.removeprefix("validate_").partition(".")[0]
        try:
            parsed = [[(str(p["text"]), p.get("entity")) for p in u["data"]] for u in read_json(file)[intent]]
        except (KeyError, TypeError, AttributeError):
            Place(file).refuse(f"is no list of utterances of {intent!r}")
        names = sorted({str(entity) for parts in parsed for _, entity in parts if entity})
        for number, parts in enumerate(parsed, start=1):
            fields: dict[str, list[str]] = {}
            for text, entity in parts:
                if entity:
                    fields.setdefault(str(entity), []).append(text)
            yield names, _Item(f"{intent}-{number}", "".join(text for text, _ in parts), fields, intent)


def _wnut17(path: Path) -> Iterator[tuple[Sequence[str], _Item]]:
    """Entities by kind, from `TOKEN TAB TAG` lines with BIO tags."""
    sentences = list(_bio_sentences(find_file(path, "emerging.test.annotated")))
    names = sorted({tag[2:] for sentence in sentences for _, tag in sentence if tag != "O"})
    for number, sentence in enumerate(sentences, start=1):
        fields: dict[str, list[str]] = {}
        for token, tag in sentence:
            if tag.startswith("I-") and fields.get(tag[2:]):
                fields[tag[2:]][-1] += f" {token}"
            elif tag != "O":
                fields.setdefault(tag[2:], []).append(token)
        yield names, _Item(str(number), " ".join(token for token, _ in sentence), fields)


def _bio_sentences(path: Path) -> Iterator[list[tuple[str, str]]]:
    sentence: list[tuple[str, str]] = []
    for place, line in read_lines(path):
        token, _, tag = line.partition("\t")
        if line.strip():
            if tag != "O" and tag[:2] not in ("B-", "I-"):
                place.refuse(f"has the tag {tag!r}, expected O, B-KIND or I-KIND")
            sentence.append((token, tag))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


TASKS: Final = (
    _task("extract", "items", "fields of own texts", _own),
    _task("snips", "snips", "slots of spoken requests, by intent", _snips),
    _task("wnut17", "wnut17", "rare and new names in posts, by kind", _wnut17),
)
