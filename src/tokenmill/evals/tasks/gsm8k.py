"""GSM8K: word problems of school maths, answered with the steps written out, then a number.

Two prompts. `gsm8k` shows the first eight problems of the training split with their solutions, which end in
"#### 18"; `gsm8k-cot` shows the eight worked examples of Wei et al. (2022, "Chain-of-Thought Prompting"),
which end in "The answer is 18.". The number is taken strictly, from that phrase, or flexibly, as the last
number of the text. Files: `test.jsonl`, for `gsm8k` also `train.jsonl` beside it, with `question` and
`answer`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Final

from tokenmill.core import SamplingParams
from tokenmill.evals.data import DataRow, find_file, read_rows
from tokenmill.evals.task import Answer, Generate, Question, Task

__all__ = ["TASKS"]

_NUM_SHOTS: Final = 8
_FLEXIBLE: Final = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_STRICT: Final = {
    "gsm8k": re.compile(r"#### (\-?[0-9\.\,]+)"),
    "gsm8k-cot": re.compile(r"The answer is (\-?[0-9\.\,]+)."),
}
# What does not count in a comparison: commas, dollar signs, what comes before the number, a full stop.
_IGNORED: Final = [re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$")]
_STOPS: Final = ("</s>", "<|im_end|>")
_MAX_TOKENS: Final = 256


def _questions(path: Path) -> Iterator[Question]:
    test = find_file(path, "test.jsonl")
    train = find_file(path.parent if path.is_file() else path, "train.jsonl")
    shots = [(row.text("question"), row.text("answer")) for row in islice(read_rows(train), _NUM_SHOTS)]
    before = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in shots)
    params = _params("Question:")
    for number, row in enumerate(read_rows(test), start=1):
        yield _question(number, row, f"{before}Question: {row.text('question')}\nAnswer:", params)


def _cot_questions(path: Path) -> Iterator[Question]:
    before = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in _worked_examples())
    params = _params("Q:")
    for number, row in enumerate(read_rows(find_file(path, "test.jsonl")), start=1):
        yield _question(number, row, f"{before}Q: {row.text('question')}\nA:", params)


def _worked_examples() -> Sequence[tuple[str, str]]:
    text = files("tokenmill.evals.tasks").joinpath("gsm8k_cot.json").read_text("utf-8")
    return [(entry["question"], entry["answer"]) for entry in json.loads(text)]


def _params(stop: str) -> SamplingParams:
    return SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.0, stop=(stop, *_STOPS))


def _question(number: int, row: DataRow, prompt: str, params: SamplingParams) -> Question:
    _, mark, target = row.text("answer").rpartition("####")
    if not mark or not target.strip():
        row.place.refuse("answer has no number after ####")
    return Question(id=str(number), ask=Generate(prompt=prompt, params=params), target=target.strip())


def _score(strict: re.Pattern[str], question: Question, answer: Answer) -> Mapping[str, float]:
    text, target = answer.completions[0].text, _plain(question.target)
    return {
        "strict_match": float(_plain(_found(strict, text, 0)) == target),
        "flexible_extract": float(_plain(_found(_FLEXIBLE, text, -1)) == target),
    }


def _found(pattern: re.Pattern[str], text: str, which: int) -> str:
    """What the pattern's first group that matched holds, in the first or the last match."""
    matches = list(pattern.finditer(text))
    return next((group for group in matches[which].groups() if group), "").strip() if matches else "[invalid]"


def _plain(text: str) -> str:
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def _task(name: str, summary: str, questions: Callable[[Path], Iterator[Question]]) -> Task:
    return Task(
        name=name,
        version=1,
        summary=summary,
        folder="gsm8k",
        metric="strict_match",
        chance=0.0,
        questions=questions,
        score=partial(_score, _STRICT[name]),
    )


TASKS: Final = (
    _task("gsm8k", "school maths, 8 shots of the training split", _questions),
    _task("gsm8k-cot", "school maths, the 8 worked examples of the chain-of-thought paper", _cot_questions),
)
"""`gsm8k` and `gsm8k-cot`."""
