"""What is taken out of captured text before it is written: addresses, numbers and secrets of people.

Patterns find what has a form: e-mail addresses, phone numbers, cards (Luhn's check), bank accounts (IBAN,
check digits), keys and tokens. They do not find names or postal addresses, nor what is spelt out: for that
the operator gives a function of their own. Runs in the thread that writes captures. No match of a pattern is
longer than a line or two, so long texts are taken in parts, and the event loop gets its turn between them.
"""

import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

from tokenmill.core import UsageError

__all__ = ["PATTERNS", "Pattern", "Redactor", "load_redactor"]

Pattern: TypeAlias = Literal["email", "phone", "card", "iban", "secret"]
"""What the patterns find."""

PATTERNS: Final[tuple[Pattern, ...]] = get_args(Pattern)

_PART: Final = 1 << 15
_SEARCH: Final = 1 << 11
_EMAIL: Final = re.compile(r"[\w.%+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_CARD: Final = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.]\d)")
_IBAN: Final = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_PHONE: Final = re.compile(
    r"(?<![\w.+-])(?:(?:\+|00)[1-9](?:[ ()./-]{0,2}\d){6,14}"  # with the country
    r"|\(?0\d{1,5}\)?[ /.-]{1,3}\d(?:[ -]?\d){4,10}"  # with the area
    r"|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4})(?![\w-]|\.\d)"  # North America
)
_SECRET: Final = re.compile(
    r"\b(?:sk|pk|rk|tm|hf|ghp|gho|ghs|ghu|glpat|npm|github_pat|xox[abeoprs])[-_][\w-]{12,512}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{35}"
    r"|\beyJ[\w-]{8,4096}\.[\w-]{8,4096}\.[\w-]{0,4096}"
    r"|(?i:\bbearer +)[\w.~+/=-]{16,4096}"
    r"|(?i:\b(?:api[_-]?key|access[_-]?token|secret|password|passwd|pwd) ?[:=] ?[\"']?)[^\s\"',;]{4,512}"
)
_SHAPE: Final = frozenset(
    {"role", "type", "id", "object", "model", "name", "tool_call_id", "finish_reason", "system_fingerprint"}
)
"""Fields of requests and answers whose texts are not what people wrote."""
_PEM: Final = ("-----BEGIN ", "PRIVATE KEY-----", "-----END ")


class Redactor:
    """Puts `[EMAIL]` and the like in the place of what it finds; then asks the operator's function.

    `function` takes a text and gives one. What it raises goes to the caller, who must not write the text.
    """

    def __init__(
        self, patterns: Sequence[Pattern] = PATTERNS, function: Callable[[str], str] | None = None
    ) -> None:
        self._patterns = frozenset(patterns)
        self._function = function

    def text(self, text: str) -> str:
        """A text without what was found in it. Raises what the operator's function does."""
        text = self._patterned(text)
        if self._function is not None:
            text = self._function(text)
            if not isinstance(text, str):
                raise UsageError(f"the redactor gave {type(text).__name__}, no text")
        return text

    def value(self, value: Any) -> Any:
        """A request or answer in which every text of people is redacted; what gives it its shape stays.

        Arguments of calls stay JSON, and metadata are searched with their names.
        """
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(each) for each in value]
        if not isinstance(value, dict):
            return value
        return {name: self._field(name, inner) for name, inner in value.items()}

    def _field(self, name: str, value: Any) -> Any:
        if name == "arguments" and isinstance(value, str):
            return self._arguments(value)
        if name == "metadata":
            return self._everything(value)
        return value if name in _SHAPE and isinstance(value, str) else self.value(value)

    def _everything(self, value: Any) -> Any:
        """Each text of a value, names and numbers too: a card's number may stand there as a number."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self._everything(each) for each in value]
        if isinstance(value, dict):
            return {self._patterned(name): self._everything(inner) for name, inner in value.items()}
        if isinstance(value, int) and not isinstance(value, bool):
            shown = str(value)
            return value if (redacted := self._patterned(shown)) == shown else redacted
        return value

    def _arguments(self, text: str) -> str:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return self.text(text)
        return json.dumps(self._everything(value), ensure_ascii=False)

    def _patterned(self, text: str) -> str:
        if "secret" in self._patterns:
            text = _without_private_keys(text)
        return "".join(self._part(part) for part in _parts(text)) if self._patterns else text

    def _part(self, text: str) -> str:
        if "secret" in self._patterns:
            text = _SECRET.sub("[SECRET]", text)
        if "email" in self._patterns:
            text = _EMAIL.sub("[EMAIL]", text)
        if "iban" in self._patterns:
            text = _IBAN.sub(lambda found: "[IBAN]" if _is_iban(found[0]) else found[0], text)
        if "card" in self._patterns:
            text = _CARD.sub(lambda found: "[CARD]" if _has_luhn(found[0]) else found[0], text)
        if "phone" in self._patterns:
            text = _PHONE.sub("[PHONE]", text)
        return text


def load_redactor(name: str) -> Callable[[str], str] | None:
    """The function `module:function`; None for an empty name. Raises UsageError."""
    if not name:
        return None
    module, colon, attribute = name.partition(":")
    hint = "give module:function, of a module that Python finds (PYTHONPATH)"
    if not colon or not attribute.isidentifier():
        raise UsageError(f"redact is {name!r}", hint=hint)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise UsageError(
            f"redact: {name} cannot be had ({type(error).__name__}: {error})", hint=hint
        ) from None
    if not callable(function):
        raise UsageError(f"redact: {name} is no function", hint=hint)
    found: Callable[[str], str] = function
    return found


def _parts(text: str) -> Iterator[str]:
    """A text in parts, cut between words of letters, where no pattern goes across."""
    start = 0
    while len(text) - start > _PART:
        stop = start + _PART
        for at in range(stop, stop - _SEARCH, -1):
            if text[at].isspace() and text[at - 1].islower() and text[at + 1 : at + 2].islower():
                stop = at
                break
        yield text[start:stop]
        start = stop
    yield text[start:]


def _without_private_keys(text: str) -> str:
    begin, kind, end = _PEM
    parts, at = [], 0
    while (start := text.find(begin, at)) >= 0:
        if kind not in text[start : start + 64]:
            parts.append(text[at : start + len(begin)])
            at = start + len(begin)
            continue
        parts += [text[at:start], "[SECRET]"]
        stop = text.find(end, start)
        line = text.find("-----", stop + len(end)) if stop >= 0 else -1
        at = line + 5 if line >= 0 else len(text)
    return "".join([*parts, text[at:]])


def _has_luhn(text: str) -> bool:
    """Luhn's check of a card's number."""
    digits = [int(each) for each in reversed(text) if each.isdigit()]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return any(digits) and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """The check digits of ISO 13616."""
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1
