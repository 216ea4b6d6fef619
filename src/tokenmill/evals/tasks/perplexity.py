"""Perplexity of text: how many tokens the model hesitates between, on average.

A text is read in windows that do not overlap, each on its own, nothing in front; the first token of a window
is not scored. So the window is part of the figure, and so is the vocabulary: figures of models with different
tokenizers are not comparable.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from tokenmill.core import NotFoundError
from tokenmill.evals.data import find_file, read_text
from tokenmill.evals.task import Answer, Question, Read, Task

__all__ = ["TASKS"]

_SUFFIXES: Final = (".txt", ".raw", ".md", ".gz", ".bz2")


def _questions(names: tuple[str, ...], path: Path) -> Iterator[Question]:
    """A question a file: the named one, else all of the folder."""
    if path.is_file() or names:
        paths = [find_file(path, *names)]
    else:
        paths = sorted(each for each in path.glob("*") if each.suffix in _SUFFIXES and each.is_file())
    if not paths:
        raise NotFoundError(
            f"{path} has no text file", hint="give a text file or a folder of them with --data"
        )
    for file in paths:
        yield Question(id=file.name, ask=Read(text=read_text(file)), target=None, slice=file.name)


def _score(question: Question, answer: Answer) -> Mapping[str, float]:
    num_scored = sum(len(score.logprobs) for score in answer.scores)
    total = sum(score.total for score in answer.scores)
    return {"logprob_per_token": total / num_scored} if num_scored else {}


def _task(name: str, summary: str, folder: str, names: tuple[str, ...]) -> Task:
    return Task(
        name=name,
        version=1,
        summary=summary,
        folder=folder,
        metric="perplexity",
        chance=None,
        questions=partial(_questions, names),
        score=_score,
        aggregate="perplexity",
    )


TASKS: Final = (
    _task("perplexity", "of your own text: --data FILE or a folder of texts", "", ()),
    _task("wikitext2", "perplexity of the WikiText-2 test text", "wikitext2", ("wiki.test.raw", "test.txt")),
)
"""`perplexity` and `wikitext2`."""
