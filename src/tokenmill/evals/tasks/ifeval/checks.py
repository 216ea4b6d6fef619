"""The 25 checks of IFEval: does an answer follow one instruction?

Each has the name and the arguments that the data set gives it, and follows the official checker's rules,
also where these are odd (the text of the function says where), so that figures can be compared. Two rest on
libraries there and on plain rules here: what a sentence is (NLTK's Punkt) and which language a text is in
(langdetect).
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from tokenmill.core import UsageError
from tokenmill.evals.tasks.ifeval.language import language_of
from tokenmill.evals.tasks.ifeval.sentences import count_sentences, words_of

__all__ = ["CHECKS", "check_arguments", "follows"]

_Check = Callable[..., bool]


def follows(instruction: str, arguments: Mapping[str, Any], text: str) -> bool:
    """Whether the text follows the instruction. An empty text follows none."""
    if not text.strip():
        return False
    return CHECKS[instruction](
        text, **{name: value for name, value in arguments.items() if value is not None}
    )


def check_arguments(instruction: str, arguments: Mapping[str, Any]) -> None:
    """Try a check on some text. Raises UsageError for an unknown instruction or arguments that do not fit
    it.
    """
    if instruction not in CHECKS:
        raise UsageError(
            f"the instruction {instruction!r} is unknown", hint=f"use one of {', '.join(CHECKS)}"
        )
    try:
        follows(instruction, arguments, "some text")
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UsageError(
            f"the arguments of {instruction!r} do not fit: {error}", hint="correct the data"
        ) from None


def _compare(count: int, relation: str, bound: int) -> bool:
    if relation not in ("less than", "at least"):
        raise ValueError(f"the relation is {relation!r}")
    return count < bound if relation == "less than" else count >= bound


def _existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(keyword, text, flags=re.IGNORECASE) for keyword in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(keyword.strip(), text, flags=re.IGNORECASE)), relation, frequency)


def _forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, flags=re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _response_language(text: str, language: str) -> bool:
    """A text without letters counts as followed, as in the official checker."""
    return language_of(text) in (language, None)


def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(count_sentences(text), relation, num_sentences)


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are what `***` divides; only the first and the last may be empty."""
    paragraphs = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    if not all(paragraphs[1:-1]):
        return False
    outer = {0, len(paragraphs) - 1}
    return len(paragraphs) - sum(not paragraphs[index] for index in outer) == num_paragraphs


def _number_words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Counts paragraphs that are not empty, but takes the nth of all."""
    paragraphs = text.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if not 1 <= nth_paragraph <= count or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split(r"""[.,?!'"]""", word)[0].lower() == first_word.lower()


def _number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    patterns = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = patterns.get(marker, rf"\s*{marker.lower()}.*$")
    return re.search(pattern, text.lower(), flags=re.MULTILINE) is not None


def _number_bullet_lists(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def _constrained_response(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """Counts `*so*`, and `**so**` apart from that, so a part in bold may count more than once."""
    single = re.findall(r"\*[^\n\*]*\*", text)
    double = re.findall(r"\*\*[^\n\*]*\*\*", text)
    filled = sum(bool(part.strip("*").strip()) for part in single)
    filled += sum(bool(part.removeprefix("**").removesuffix("**").strip()) for part in double)
    return filled >= num_highlights


def _multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) - 1 >= num_sections


def _json_format(text: str) -> bool:
    text = text.strip()
    for prefix in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(prefix)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return False
    filled = [part for part in parts if part]
    return len(filled) == 2 and filled[0] != filled[1]


def _repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(sum(word.isupper() for word in words_of(text)), capital_relation, capital_frequency)


def _english_capital(text: str) -> bool:
    return text.isupper() and language_of(text) in ("en", None)


def _english_lowercase(text: str) -> bool:
    return text.islower() and language_of(text) in ("en", None)


def _no_comma(text: str) -> bool:
    return "," not in text


def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: Final[Mapping[str, _Check]] = {
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "combination:repeat_prompt": _repeat_prompt,
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:json_format": _json_format,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:title": _title,
    "keywords:existence": _existence,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:frequency": _frequency,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_words": _number_words,
    "punctuation:no_comma": _no_comma,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
}
