"""IFEval: verdicts on hand-written answers, for every kind of instruction; strict, loose, together."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fast.eval_tools import data_folder, written
from tokenmill.core import UsageError
from tokenmill.evals.task import ItemResult
from tokenmill.evals.tasks.ifeval import IFEVAL, instruction_accuracy
from tokenmill.evals.tasks.ifeval.checks import CHECKS, follows
from tokenmill.evals.tasks.ifeval.language import language_of
from tokenmill.evals.tasks.ifeval.sentences import count_sentences, words_of

# Instruction, arguments, an answer that follows it, one that does not.
GOLDEN: list[tuple[str, dict[str, Any], str, str]] = [
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
     "NASA and the UN met.", "NASA met."),
    ("change_case:english_capital", {}, "THIS IS THE END OF IT.", "THIS is the end."),
    ("change_case:english_lowercase", {}, "this is the end of it.", "This is the end."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi. Hi!", "Hi! Say hi."),
    ("combination:two_responses", {}, "One.******Two.", "One.******One."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [address]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."},
     "Bye.\nP.S. Call me.", "Bye.\nPS Call me."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S more", "Bye.\nP.S. more"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:json_format", {}, "```json\n{\"a\": 1}\n```", "{a: 1}"),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     "SECTION 1\na\nSECTION 2\nb", "SECTION 1\na"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and b"),
    ("detectable_format:title", {}, "<<A poem>>\ntext", "<< >>\ntext"),
    ("keywords:existence", {"keywords": ["tea", "milk"]}, "Milk in Tea", "Tea only"),
    ("keywords:forbidden_words", {"forbidden_words": ["tea"]}, "A teapot", "Tea, please"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, "one a", "a a"),
    ("keywords:letter_frequency", {"letter": "L", "let_frequency": 3, "let_relation": "at least"},
     "lull", "lu"),
    ("language:response_language", {"language": "de"},
     "Das ist nicht der Hund, den ich sah.", "This is the dog."),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Well"},
     "One.\n\n\"Well, two.\"", "One.\n\nTwo well."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", "One.\n\nTwo."),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"},
     "One. Two.", "One, two."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"},
     "Two words.", "Now three words."),
    ("punctuation:no_comma", {}, "None here.", "One, here."),
    ("startend:end_checker", {"end_phrase": "The end."}, "So it was. the end.\"", "The end. Really."),
    ("startend:quotation", {}, "\"Quoted.\"", "\"Quoted."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), GOLDEN)
def test_each_instruction(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    assert follows(name, arguments, good)
    assert not follows(name, arguments, bad)
    assert not follows(name, arguments, " \n")


def test_all_25_kinds_are_covered() -> None:
    assert len(CHECKS) == 25
    assert {name for name, *_ in GOLDEN} == set(CHECKS)


def test_the_data_asks_for_nothing_else() -> None:
    questions = list(IFEVAL.questions(data_folder("ifeval")))
    assert len(questions) == 400
    assert {each["name"] for question in questions for each in question.target} == set(CHECKS)


def test_loose_forgives_what_stands_around(tmp_path: Path) -> None:
    row = {
        "key": 7,
        "prompt": "p",
        "instruction_id_list": ["startend:quotation", "punctuation:no_comma"],
        "kwargs": [{}, {}],
    }
    (tmp_path / "input_data.jsonl").write_text(json.dumps(row))
    (question,) = IFEVAL.questions(tmp_path)
    scores = IFEVAL.score(question, written('Sure, here it is:\n"No marks here"'))
    assert (scores["prompt_strict"], scores["prompt_loose"]) == (0.0, 1.0)
    assert (scores["followed_strict"], scores["followed_loose"], scores["instructions"]) == (0.0, 2.0, 2.0)
    item = ItemResult(
        id="",
        slice="",
        metrics=scores,
        answer="",
        num_input_tokens=0,
        num_cached_tokens=0,
        num_output_tokens=0,
    )
    items = [replace(item, id=str(i)) for i in range(2)]
    assert instruction_accuracy(items) == 0.0
    assert instruction_accuracy(items, "loose") == 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"instruction_id_list": ["new:kind"]},
        {"kwargs": []},
        {"kwargs": [{"unknown": 1}]},
        {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["("]}]},
    ],
)
def test_bad_data_is_named_by_line(tmp_path: Path, change: dict[str, Any]) -> None:
    row = {"key": 7, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], **change}
    (tmp_path / "input_data.jsonl").write_text(json.dumps(row))
    with pytest.raises(UsageError, match=r"input_data\.jsonl:1"):
        list(IFEVAL.questions(tmp_path))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One.", 1),
        ("One. Two! Three? Four", 4),
        ("Dr. Smith paid 3.50 at 5 p.m. on Monday. He left.", 2),
        ('He said "Stop." Then he went.', 2),
        ("Wait... what?", 1),
        ("Wait... However, no.", 2),
        ("So he left. then he came, e.g. late.", 3),
        ("**Bold.** 1. one\n2. Two", 3),
        ("He met J. Smith (in the U.S. Senate). The end.", 2),
        ("J. R. R. Tolkien wrote it.", 1),
        ("", 0),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


def test_words() -> None:
    assert words_of("WELL-KNOWN, DON'T it's") == ["WELL-KNOWN", "DO", "N'T", "it", "'s"]


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "This is what you have to know about the city and its people."),
        ("fr", "Le chat est sur la table et il ne veut pas descendre pour vous."),
        ("pt", "O gato não está na mesa, mas você pode ver que ele é feliz."),
        ("ru", "Это то, что вы должны знать о городе и его жителях."),  # noqa: RUF001
        ("uk", "Це те, що ви повинні знати про місто та його мешканців, або ні."),  # noqa: RUF001
        ("ur", "یہ ایک شہر ہے اور اس کے لوگ بھی ہیں"),
        ("hi", "यह एक शहर है और इस के लोग भी हैं"),
        ("mr", "हे एक शहर आहे आणि ते मोठे आहे"),
        ("ja", "これは日本語の文章です。"),
        ("ko", "이것은 한국어 문장입니다."),
        ("th", "นี่คือประโยคภาษาไทย"),
        ("te", "ఇది తెలుగు వాక్యం"),
        ("vi", "Đây là những điều bạn cần biết về thành phố và các người dân."),
        ("pa", "ਇਹ ਇੱਕ ਵਾਕ ਹੈ"),
    ],
)
def test_languages(language: str, text: str) -> None:
    assert language_of(text) == language


def test_no_letters_no_language() -> None:
    assert language_of("123 !?") is None
