"""What the tasks of a user's own workload share: the file of items, the question in a conversation, the
answer.

A workload's items are the lines of `items.jsonl`, each with an `id` or else its line's number as one. Which
other fields they have is in each task's module.
"""

from collections.abc import Iterator
from pathlib import Path

from tokenmill.core import Message, SamplingParams
from tokenmill.evals.data import DataRow, find_file, read_rows
from tokenmill.evals.task import Answer, Generate

__all__ = ["item_id", "items", "said", "user_ask"]


def items(path: Path) -> Iterator[DataRow]:
    """The rows of `items.jsonl`."""
    return read_rows(find_file(path, "items.jsonl"))


def item_id(row: DataRow) -> str:
    """The row's `id`, or its line's number."""
    given = row.fields.get("id", row.place.line)
    if isinstance(given, bool) or not isinstance(given, str | int):
        row.place.refuse("id is neither text nor a number")
    return str(given)


def user_ask(content: str, max_tokens: int) -> Generate:
    """A conversation of one message, answered greedily."""
    message = Message(role="user", content=content)
    return Generate(prompt=(message,), params=SamplingParams(max_tokens=max_tokens))


def said(answer: Answer) -> str:
    """The text of the first completion."""
    return answer.completions[0].text
