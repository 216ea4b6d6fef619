"""Prompts and scores are those of lm-evaluation-harness on identical items, whatever model is asked."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.fast.eval_fakes import FakeModel
from tests.model.harness import Item, Model, harness_items, write_lines
from tokenmill.engine import LLM
from tokenmill.evals.ask import Asker, EvaluatedModel
from tokenmill.evals.catalog import TASKS
from tokenmill.evals.data import read_rows
from tokenmill.evals.task import Choose, Generate, ItemResult, Question
from tokenmill.models.store.directory import ModelDirectory

DATA = Path(__file__).parents[3] / "shared/data"
LETTERS = ("A", "B", "C", "D")

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there")

Docs = Sequence[Mapping[str, Any]]


@pytest.fixture
def fake() -> FakeModel:
    """A model with an opinion on every text, and no sense."""

    def weigh(context: str, continuation: str) -> float:
        digest = hashlib.sha256(f"{context}|{continuation}".encode()).digest()
        return -int.from_bytes(digest[:4], "big") / 2**28 - 0.2 * len(continuation)

    return FakeModel(weigh=weigh)


@pytest.fixture(scope="module")
def real(model_dir: Path) -> LLM:
    return LLM(ModelDirectory.open(model_dir))


def ask(llm: Model, name: str, questions: Sequence[Question]) -> list[ItemResult]:
    model = EvaluatedModel(name="it", generator=llm, scorer=llm)
    return Asker(model, TASKS[name]).ask(questions)


def check(
    llm: Model, name: str, questions: Sequence[Question], items: Sequence[Item], names: Mapping[str, str]
) -> None:
    """Prompts to the character, metrics exactly."""
    assert len(questions) == len(items) > 0
    for question, item in zip(questions, items, strict=True):
        if isinstance(question.ask, Choose):
            assert set(question.ask.contexts) == {item.prompt}
            assert question.ask.continuations == item.continuations
        else:
            assert isinstance(question.ask, Generate)
            assert question.ask.prompt == item.prompt
    results = ask(llm, name, questions)
    ours = [{theirs: result.metrics[own] for own, theirs in names.items()} for result in results]
    assert ours == [{theirs: item.metrics[theirs] for theirs in names.values()} for item in items]


def take(name: str, path: Path, num: int) -> list[Question]:
    return list(islice(TASKS[name].questions(path), num))


BOTH = {"acc": "acc", "acc_norm": "acc_norm"}
EXACT = {
    "strict_match": "strict-match exact_match",
    "flexible_extract": "flexible-extract exact_match",
}


def mmlu_docs(subject: str, split: str, num: int) -> Docs:
    columns = ("question", *LETTERS, "answer")
    rows = islice(read_rows(DATA / f"mmlu/{split}/{subject}_{split}.csv", columns), num)
    return [
        {
            "question": row.fields["question"],
            "choices": [row.fields[letter] for letter in LETTERS],
            "answer": LETTERS.index(row.fields["answer"]),
            "subject": subject,
        }
        for row in rows
    ]


def of_subject(name: str, subject: str, num: int) -> list[Question]:
    own = (each for each in TASKS[name].questions(DATA / "mmlu") if each.slice == subject)
    return list(islice(own, num))


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("subject", ["abstract_algebra", "high_school_us_history"])
def test_mmlu_by_letter(fake: FakeModel, subject: str, shots: int) -> None:
    name = "mmlu" if shots else "mmlu-0shot"
    docs = {"test": mmlu_docs(subject, "test", 12), "dev": mmlu_docs(subject, "dev", 5)}
    items = harness_items(f"mmlu/default/mmlu_{subject}.yaml", docs, fake, num_shots=shots)
    check(fake, name, of_subject(name, subject, 12), items, {"acc": "acc"})


@pytest.mark.parametrize("shots", [0, 5])
def test_mmlu_cloze(fake: FakeModel, shots: int) -> None:
    name, subject = "mmlu-cloze" if shots else "mmlu-cloze-0shot", "anatomy"
    docs = {"test": mmlu_docs(subject, "test", 12), "dev": mmlu_docs(subject, "dev", 5)}
    items = harness_items(f"mmlu/continuation/mmlu_{subject}.yaml", docs, fake, num_shots=shots)
    check(fake, name, of_subject(name, subject, 12), items, BOTH)


def choice_docs(name: str, folder: str, num: int) -> Iterator[dict[str, Any]]:
    """Documents in the original fields, from our questions about the rewritten data."""
    for question in take(name, DATA / folder, num):
        assert isinstance(question.ask, Choose)
        texts = [each[1:] for each in question.ask.continuations]
        labels = list("ABCDE"[: len(texts)])
        yield {
            "prompt": question.ask.contexts[0],
            "choices": {"text": texts, "label": labels},
            "answerKey": labels[question.target],
        }


@pytest.mark.parametrize("name", ["arc-easy", "arc-challenge"])
def test_arc(fake: FakeModel, tmp_path: Path, name: str) -> None:
    docs = [
        {**doc, "question": doc["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")}
        for doc in choice_docs(name, "arc", 24)
    ]
    file = write_lines(tmp_path / "test.jsonl", docs)
    items = harness_items(f"arc/{name.replace('-', '_')}.yaml", {"test": docs}, fake)
    check(fake, name, take(name, file, 24), items, BOTH)
    assert take(name, file, 24) == take(name, DATA / "arc", 24), "both layouts give the same questions"


def test_openbookqa(fake: FakeModel, tmp_path: Path) -> None:
    docs = [{**doc, "question_stem": doc["prompt"]} for doc in choice_docs("openbookqa", "openbookqa", 24)]
    file = write_lines(tmp_path / "test.jsonl", docs)
    items = harness_items("openbookqa/openbookqa.yaml", {"test": docs}, fake)
    check(fake, "openbookqa", take("openbookqa", file, 24), items, BOTH)
    assert take("openbookqa", file, 24) == take("openbookqa", DATA / "openbookqa", 24)


def test_piqa(fake: FakeModel, tmp_path: Path) -> None:
    docs = [
        {
            "goal": doc["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "sol1": doc["choices"]["text"][0],
            "sol2": doc["choices"]["text"][1],
            "label": "AB".index(doc["answerKey"]),
        }
        for doc in choice_docs("piqa", "piqa", 24)
    ]
    file = write_lines(tmp_path / "valid.jsonl", docs)
    items = harness_items("piqa/piqa.yaml", {"validation": docs}, fake)
    check(fake, "piqa", take("piqa", file, 24), items, BOTH)
    assert take("piqa", file, 24) == take("piqa", DATA / "piqa", 24)


def hellaswag_docs(num: int) -> list[dict[str, Any]]:
    """From the local text: before the first colon is the activity, and all of the context is `ctx_a`."""
    docs = []
    for question in take("hellaswag", DATA / "hellaswag", num):
        assert isinstance(question.ask, Choose)
        activity, _, context = question.ask.contexts[0].partition(": ")
        endings = [each[1:] for each in question.ask.continuations]
        docs.append(
            {
                "activity_label": activity,
                "ctx_a": context,
                "ctx_b": "",
                "endings": endings,
                "label": str(question.target),
            }
        )
    return docs


def test_hellaswag(fake: FakeModel, tmp_path: Path) -> None:
    docs = hellaswag_docs(24)
    docs.append(
        {
            "activity_label": "Baking  bread",
            "ctx_a": "How to bake [title] Warm it. [step] Take a bowl.",
            "ctx_b": "the COOK",
            "endings": ["stirs [substeps] it  well. ", "[title]", "goes [a] home.", " sleeps"],
            "label": "2",
        }
    )
    file = write_lines(tmp_path / "hellaswag_val.jsonl", docs)
    items = harness_items("hellaswag/hellaswag.yaml", {"validation": docs}, fake)
    check(fake, "hellaswag", take("hellaswag", file, 25), items, BOTH)
    assert take("hellaswag", file, 24) == take("hellaswag", DATA / "hellaswag", 24)


def gsm8k_docs(file: str, num: int) -> Docs:
    return [dict(row.fields) for row in islice(read_rows(DATA / "gsm8k" / file), num)]


FIRST_N = {"fewshot_config": {"sampler": "first_n"}}


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k-cot"])
def test_gsm8k_prompts_and_extraction(name: str) -> None:
    answers = (
        "18 dollars.\n#### 18",
        "#### $1,800.",
        "The answer is 18.",
        "So 3+4 = 7. The answer is 7 dollars. The answer is 18.",
        "It is -5, 1,234 or $12.50 and then",
        "no number",
        "#### x 12",
        "The answer is 70,000. And",
        "",
        "The answer is -3.",
        "#### 540",
        "20 .",
    )
    texts: dict[str, str] = {}

    def say(prompt: str) -> str:
        return texts.setdefault(prompt, answers[len(texts) % len(answers)])

    check(*_gsm8k(FakeModel(say), name, 24))


def _gsm8k(
    llm: Model, name: str, num: int
) -> tuple[Model, str, Sequence[Question], Sequence[Item], Mapping[str, str]]:
    docs = {"test": gsm8k_docs("test.jsonl", num), "train": gsm8k_docs("train.jsonl.gz", 8)}
    changes = FIRST_N if name == "gsm8k" else {}
    items = harness_items(f"gsm8k/{name}.yaml", docs, llm, changes, num_shots=8)
    return llm, name, take(name, DATA / "gsm8k", num), items, EXACT


class CodeEval:
    """In place of a download: no program runs, prompts are what is compared."""

    def compute(self, **_: Any) -> tuple[dict[str, float], dict[str, Any]]:
        return {"pass@1": 0.0}, {}


@pytest.mark.parametrize(("name", "file"), [("humaneval", "HumanEval.jsonl.gz"), ("mbpp", "mbpp.jsonl.gz")])
def test_prompts_for_code(fake: FakeModel, monkeypatch: pytest.MonkeyPatch, name: str, file: str) -> None:
    monkeypatch.setattr("evaluate.load", lambda _: CodeEval())
    asked = list(TASKS[name].questions(DATA / name))
    rows = {str(row.fields["task_id"]): dict(row.fields) for row in read_rows(DATA / name / file)}
    docs = {"test": [rows[question.id] for question in asked]}
    shots = 3 if name == "mbpp" else 0
    items = harness_items(f"{name}/{name}.yaml", docs, fake, {"unsafe_code": False}, num_shots=shots)
    assert [question.ask.prompt for question in asked if isinstance(question.ask, Generate)] == [
        item.prompt for item in items
    ]


def test_prompts_and_answers_in_mathematics() -> None:
    pytest.importorskip("math_verify")
    asked = take("math", DATA / "math", 40)
    end = "Final Answer: The final answer is "
    answers = {
        question.ask.prompt: f"So.\n{end}${question.target}${' + 1' * (i % 2)}. I hope it is correct."
        for i, question in enumerate(asked)
        if isinstance(question.ask, Generate) and isinstance(question.ask.prompt, str)
    }
    model = FakeModel(answers.__getitem__)
    docs = {"test": [dict(row.fields) for row in islice(read_rows(DATA / "math/test.jsonl.gz"), 40)]}
    items = harness_items("minerva_math/minerva_math_algebra.yaml", docs, model, num_shots=4)
    check(model, "math", asked, items, {"exact_match": "exact_match"})


def test_the_real_model_by_letter(real: LLM) -> None:
    subject = "miscellaneous"
    docs = {"test": mmlu_docs(subject, "test", 24), "dev": mmlu_docs(subject, "dev", 5)}
    items = harness_items(f"mmlu/default/mmlu_{subject}.yaml", docs, real, num_shots=5)
    check(real, "mmlu", of_subject("mmlu", subject, 24), items, {"acc": "acc"})


def test_the_real_model_by_endings(real: LLM) -> None:
    docs = hellaswag_docs(16)
    items = harness_items("hellaswag/hellaswag.yaml", {"validation": docs}, real)
    check(real, "hellaswag", take("hellaswag", DATA / "hellaswag", 16), items, BOTH)


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k-cot"])
def test_the_real_model_writes(real: LLM, name: str) -> None:
    check(*_gsm8k(real, name, 3))


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mmlu-0shot", "mmlu"),
        ("mmlu-cloze-0shot", "mmlu"),
        ("arc-easy", "arc"),
        ("hellaswag", "hellaswag"),
        ("openbookqa", "openbookqa"),
        ("piqa", "piqa"),
    ],
)
def test_a_border_between_tokens(model_dir: Path, name: str, folder: str) -> None:
    """The harness encodes context and continuation in one piece and splits; that is where the border is."""
    tokenizer = ModelDirectory.open(model_dir).tokenizer()
    for question in take(name, DATA / folder, 400):
        assert isinstance(question.ask, Choose)
        for context, continuation in set(zip(question.ask.contexts, question.ask.continuations, strict=True)):
            kept = context.rstrip()
            apart = [*tokenizer.encode(kept), *tokenizer.encode_after(context[len(kept) :] + continuation)]
            assert apart == tokenizer.encode(context + continuation), question.id
