"""Summaries: ROUGE against references, and what a summary says that its text does not.

`unsupported_numbers` and `unsupported_names` are the shares of a summary's numbers and names that the text
does not have. Names are capitalised words inside of a sentence, and capitalised words with others at its
start; so they measure English best. A summary without any has no such figure. Own data: `items.jsonl` with
`text` and `summary`, or a list `summaries`, of which the best match counts.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from tokenmill.evals.data import find_file, read_rows
from tokenmill.evals.rouge import best_rouge
from tokenmill.evals.task import Answer, Question, Task
from tokenmill.evals.tasks.items import item_id, items, said, user_ask

__all__ = ["TASKS", "unsupported"]

_MAX_TOKENS: Final = 128
_NUMBER: Final = re.compile(r"\d+(?:[.,]\d+)*")
_NAME: Final = re.compile(r"[A-Z][\w\u2019'&-]*(?:\s+[A-Z][\w\u2019'&-]*)*")
_SENTENCE_END: Final = re.compile(r"(?:^|[.!?:\n#\"\u201c*-])\s*$")
_SMALL: Final = dict(
    one=1, two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, eleven=11, twelve=12
)


class _Item(NamedTuple):
    id: str
    text: str
    summaries: Sequence[str]


_Reader = Callable[[Path], Iterator[_Item]]


def unsupported(text: str, summary: str) -> dict[str, float]:
    """The shares of a summary's numbers and names that its text does not have; each only if there are any."""
    known = {_number(each) for each in _NUMBER.findall(text)}
    known |= {str(value) for word, value in _SMALL.items() if re.search(rf"(?i)\b{word}\b", text)}
    words = set(re.findall(r"\w+", text.lower()))
    shares = {
        "unsupported_numbers": [_number(each) not in known for each in _NUMBER.findall(summary)],
        "unsupported_names": [
            not set(re.findall(r"\w+", re.sub(r"['\u2019]s\b", "", name.lower()))) <= words
            for name in _names(summary)
        ],
    }
    return {name: sum(found) / len(found) for name, found in shares.items() if found}


def _number(text: str) -> str:
    """The number without commas between thousands and without zeros at the end."""
    text = text.replace(",", "")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _names(text: str) -> Iterator[str]:
    """Runs of capitalised words; the first word of a sentence counts only with others after it."""
    for match in _NAME.finditer(text):
        words = match.group().split()
        if _SENTENCE_END.search(text[: match.start()]):
            words = words[1:]
        if words and words != ["I"]:
            yield " ".join(words)


def _task(name: str, folder: str, what: str, read: _Reader) -> Task:
    return Task(
        name=name,
        version=1,
        summary=f"{what}: ROUGE, and numbers and names that the text does not have",
        folder=folder,
        metric="rougeL",
        chance=None,
        questions=partial(_questions, read=read),
        score=_score,
    )


def _questions(path: Path, *, read: _Reader) -> Iterator[Question]:
    for item in read(path):
        content = f"Summarise the following text in one or two sentences.\n\n{item.text}"
        target = {"summaries": list(item.summaries), "text": item.text}
        yield Question(id=item.id, ask=user_ask(content, _MAX_TOKENS), target=target)


def _score(question: Question, answer: Answer) -> Mapping[str, float]:
    summary = said(answer)
    return {
        **best_rouge(question.target["summaries"], summary),
        **unsupported(question.target["text"], summary),
    }


def _own(path: Path) -> Iterator[_Item]:
    for row in items(path):
        several = row.texts("summaries", least=1) if "summaries" in row.fields else (row.text("summary"),)
        yield _Item(item_id(row), row.text("text"), several)


def _dialogsum(path: Path) -> Iterator[_Item]:
    for row in read_rows(find_file(path, "dialogsum.test.jsonl")):
        summaries = [row.text(f"summary{number}") for number in (1, 2, 3)]
        yield _Item(row.text("fname"), row.text("dialogue"), summaries)


def _xsum(path: Path) -> Iterator[_Item]:
    for row in read_rows(find_file(path, "xsum_DOC_tldr.jsonl")):
        text = row.text("prompt").removesuffix("\n\nTL;DR:\n")
        yield _Item(str(row.place.line), text, [row.text("completion").removesuffix("<|endoftext|>")])


TASKS: Final = (
    _task("summarise", "items", "summaries of own texts", _own),
    _task("dialogsum", "dialogsum", "summaries of dialogues, three references", _dialogsum),
    _task("xsum", "news_summaries", "one sentence about a piece of news", _xsum),
)
