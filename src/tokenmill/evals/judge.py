"""A model as judge of two answers: the last resort, where no check and no reference can decide.

Each pair is shown in both orders; a judge that changes its mind with the order has said nothing, and the
pair is a tie. How often that happens is in the report, and so is the agreement with people's labels where
there are any (Cohen's kappa: 0 is chance, 1 is always). Without labels the report says that the judge is
unproven. A judge of a candidate's family is refused, because models prefer their own kin; that can be
overruled.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tokenmill.core import Generator, Message, SamplingParams, UsageError

__all__ = ["JudgeReport", "Pair", "Verdict", "cohen_kappa", "family_of", "judge_pairs"]

Verdict = Literal["first", "second", "tie"]

_FAMILIES: Final = (
    *(
        "smollm",
        "tinyllama",
        "llama",
        "qwen",
        "qwq",
        "gemma",
        "gemini",
        "mixtral",
        "mistral",
        "ministral",
        "phi",
    ),
    *(
        "deepseek",
        "claude",
        "gpt",
        "granite",
        "olmo",
        "falcon",
        "command",
        "nova",
        "kimi",
        "glm",
        "grok",
        "yi",
    ),
)
_KIN: Final = {
    "tinyllama": "llama",
    "mixtral": "mistral",
    "ministral": "mistral",
    "qwq": "qwen",
    "gemini": "gemma",
}
_MAX_TOKENS: Final = 512
_SAID: Final = re.compile(r"\[\[(A|B|C)\]\]")
_SYSTEM: Final = (
    "You compare two answers to a question. Judge whether they do what the question asks, are correct, and "
    "leave nothing important out. Neither the order of the answers nor their length matters. Explain "
    "briefly, then end with [[A]] if answer A is better, [[B]] if answer B is better, or [[C]] if neither is."
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A question with two answers; `label` is what people said, if they were asked."""

    id: str
    question: str
    first: str
    second: str
    label: Verdict | None = None


@dataclass(frozen=True, kw_only=True)
class JudgeReport:
    """What a judge said of pairs.

    `verdicts` has one a pair. `inconsistent` is the share whose verdict changed with the order (counted as
    ties), `unread` the share of judgements without a verdict (also ties), `first_place` how often the
    answer shown first won among judgements that chose one (0.5 without bias; None if none did). `kappa` and
    `agreement` are over the labelled pairs.
    """

    verdicts: tuple[Verdict, ...]
    inconsistent: float
    unread: float
    first_place: float | None
    num_labelled: int
    agreement: float | None
    kappa: float | None

    @property
    def warning(self) -> str:
        """Why the verdicts should not be trusted, or nothing."""
        if self.kappa is None:
            return "the judge is unproven: no pair has a label of people"
        if self.kappa < 0.4:
            return (
                f"the judge agrees little with people (kappa {self.kappa:.2f} over {self.num_labelled} pairs)"
            )
        return ""


def family_of(model: str) -> str:
    """The family that a model's name tells: `qwen` for `Qwen2.5-7B-Instruct`; else its first word."""
    name = model.lower().rpartition("/")[2]
    known = next((family for family in _FAMILIES if re.search(rf"(?<![a-z]){family}", name)), None)
    if known is None and re.match(r"o\d", name):
        return "gpt"
    return _KIN.get(known, known) if known else re.split(r"[^a-z]", name)[0] or name


def judge_pairs(
    judge: Generator,
    judge_name: str,
    candidates: Sequence[str],
    pairs: Sequence[Pair],
    *,
    allow_same_family: bool = False,
) -> JudgeReport:
    """Ask the judge about each pair in both orders.

    Raises UsageError for a judge of a candidate's family, unless that is allowed, and without pairs.
    """
    kin = [name for name in candidates if family_of(name) == family_of(judge_name)]
    if kin and not allow_same_family:
        raise UsageError(
            f"{judge_name} would judge {kin[0]}, a model of its own family ({family_of(judge_name)})",
            hint="use a judge of another family, or allow it and say so with the result",
        )
    if not pairs:
        raise UsageError("there are no pairs to judge", hint="give at least one")
    conversations = [_conversation(pair, swapped) for pair in pairs for swapped in (False, True)]
    completions = judge.chat(conversations, SamplingParams(max_tokens=_MAX_TOKENS))
    said = [_read(completion.text) for completion in completions]
    return _report(pairs, said[::2], said[1::2])


def cohen_kappa(left: Sequence[str], right: Sequence[str]) -> float:
    """Agreement of two raters beyond chance; 1 where both always say the same one thing."""
    if not left or len(left) != len(right):
        raise UsageError("kappa needs two equally long lists of ratings", hint="give at least one pair")
    observed = sum(a == b for a, b in zip(left, right, strict=True)) / len(left)
    counts, others = Counter(left), Counter(right)
    expected = sum(counts[name] * others[name] for name in counts) / len(left) ** 2
    return 1.0 if expected == 1.0 else (observed - expected) / (1.0 - expected)


def _conversation(pair: Pair, swapped: bool) -> tuple[Message, ...]:
    a, b = (pair.second, pair.first) if swapped else (pair.first, pair.second)
    content = f"Question:\n{pair.question}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}"
    return (Message(role="system", content=_SYSTEM), Message(role="user", content=content))


def _read(text: str) -> str:
    """The last verdict of a judgement: A, B, C, or nothing."""
    found = _SAID.findall(text)
    return found[-1] if found else ""


def _report(pairs: Sequence[Pair], straight: Sequence[str], swapped: Sequence[str]) -> JudgeReport:
    names: dict[str, Verdict] = {"A": "first", "B": "second", "C": "tie", "": "tie"}
    mirrored: dict[str, Verdict] = {"A": "second", "B": "first", "C": "tie", "": "tie"}
    both = [(names[a], mirrored[b]) for a, b in zip(straight, swapped, strict=True)]
    verdicts: tuple[Verdict, ...] = tuple(a if a == b else "tie" for a, b in both)
    chosen = Counter(each for each in (*straight, *swapped) if each in ("A", "B"))
    labelled = [(pair.label, v) for pair, v in zip(pairs, verdicts, strict=True) if pair.label is not None]
    labels, own = [label for label, _ in labelled], [verdict for _, verdict in labelled]
    return JudgeReport(
        verdicts=verdicts,
        inconsistent=sum(a != b for a, b in both) / len(pairs),
        unread=sum(not each for each in (*straight, *swapped)) / (2 * len(pairs)),
        first_place=chosen["A"] / chosen.total() if chosen else None,
        num_labelled=len(labelled),
        agreement=sum(a == b for a, b in labelled) / len(labelled) if labelled else None,
        kappa=cohen_kappa(labels, own) if labelled else None,
    )
