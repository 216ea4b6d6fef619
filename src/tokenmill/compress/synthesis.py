"""More prompts for a workload that has few: written by a model, let in only if they are new and leak nothing.

A generator (the teacher, or an endpoint) is shown a few requests of the workload and writes others (Wang et
al. 2023). Each passes two gates: it repeats no known prompt and no other new one, to the word or nearly; and
it overlaps with no prompt that certifies, for a student that was trained on these would be certified on what
it has seen. Who answers the prompts is for the caller: usually the teacher.
"""

import random
import re
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple

from tokenmill.core import Generator, Message, SamplingParams, UsageError
from tokenmill.evals.decontamination import Decontaminator, TextRow

__all__ = ["PromptGate", "Synthesis", "Verdict", "synthesise"]

Verdict = Literal["new", "duplicate", "leak", "unusable"]

_SHOWN: Final = 6
_ASKED: Final = 4
_AT_ONCE: Final = 16
_MARK: Final = re.compile(r"^\s*(?:[-*•]|\(?\d+[.):])\s*")
_INSTRUCTION: Final = """\
Here are requests that people sent to one program, one a line:

{shown}

Write {asked} more requests of the same kind with other words, names and values, one a line, nothing else."""


class Synthesis(NamedTuple):
    """The prompts that passed, and how many did not."""

    prompts: tuple[str, ...]
    num_duplicates: int
    num_leaks: int
    num_unusable: int


class PromptGate:
    """What is known already, and what must not be seen. `near` is the likeness at which two texts are one."""

    def __init__(
        self, known: Iterable[str], certify: Iterable[str], *, near: float = 0.7, longest: int = 2000
    ) -> None:
        """Raises UsageError if there is nothing that is known."""
        known = list(known)
        if not known:
            raise UsageError("there are no prompts to begin from", hint="give some of the workload's")
        self._near, self._longest = near, longest
        self._known = Decontaminator(_rows(known), near=near)
        hidden = list(certify)
        self._hidden = Decontaminator(_rows(hidden), near=near) if hidden else None
        self._new: list[_Known] = []

    def __call__(self, prompt: str) -> Verdict:
        """What becomes of a prompt; one that is new is known from now on."""
        row = TextRow("", prompt)
        if not re.search(r"\w", prompt) or len(prompt) > self._longest:
            return "unusable"
        if self._hidden is not None and self._hidden.find(row):
            return "leak"
        if any(_is_repeated(each, row) for each in (self._known, *(known.finder for known in self._new))):
            return "duplicate"
        self._remember(prompt)
        return "new"

    def _remember(self, prompt: str) -> None:
        """Add a prompt. Indexes cannot grow, so there are several, each of twice the texts of the next."""
        texts = [prompt]
        while self._new and len(self._new[-1].texts) <= len(texts):
            texts = [*self._new.pop().texts, *texts]
        self._new.append(_Known(texts, Decontaminator(_rows(texts), near=self._near)))


class _Known(NamedTuple):
    """Some texts, ready to be compared with."""

    texts: list[str]
    finder: Decontaminator


def synthesise(
    generator: Generator,
    known: Sequence[str],
    gate: PromptGate,
    count: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    most_asked: int | None = None,
) -> Synthesis:
    """Up to `count` new prompts in the manner of `known`. Ends after `most_asked` questions to the generator
    (by default as many as would do if one line in four were new).
    """
    draw = random.Random(seed)
    asked, limit = 0, count if most_asked is None else most_asked
    found: list[str] = []
    refused = {"duplicate": 0, "leak": 0, "unusable": 0}
    while len(found) < count and asked < limit:
        number = min(_AT_ONCE, limit - asked)
        questions = [[_question(draw.sample(list(known), min(_SHOWN, len(known))))] for _ in range(number)]
        params = [
            SamplingParams(temperature=temperature, max_tokens=256, seed=draw.getrandbits(31))
            for _ in questions
        ]
        asked += number
        for answer in generator.chat(questions, params):
            for line in _lines(answer.text):
                verdict = gate(line)
                if verdict == "new":
                    found.append(line)
                else:
                    refused[verdict] += 1
    return Synthesis(tuple(found[:count]), refused["duplicate"], refused["leak"], refused["unusable"])


def _question(shown: Sequence[str]) -> Message:
    lines = "\n".join(" ".join(text.split()) for text in shown)
    return Message(role="user", content=_INSTRUCTION.format(shown=lines, asked=_ASKED))


def _lines(answer: str) -> list[str]:
    """The lines of an answer, without numbers and bullets in front."""
    return [text for line in answer.splitlines() if (text := _MARK.sub("", line).strip().strip('"').strip())]


def _is_repeated(texts: Decontaminator, row: TextRow) -> bool:
    """Whether the same words are among the texts, or nearly; runs of words in common are no repetition."""
    return any(each.kind != "ngram" for each in texts.find(row))


def _rows(texts: Iterable[str]) -> list[TextRow]:
    return [TextRow(str(number), text) for number, text in enumerate(texts)]
