r"""Whether two answers in LaTeX are the same mathematics: `\frac12`, `0.5` and `2^{-1}` are.

`same_answer` normalises both as the Minerva paper does (Lewkowycz et al. 2022, appendix D, by way of
lm-evaluation-harness), then compares texts, then values: a small parser reads numbers, fractions, roots,
powers, functions and letters, and two expressions are equal if they agree at several fixed points of their
letters. Tuples, sets, intervals and equations are compared part by part. It takes a bounded time whatever
the text is.

Not covered: matrices beyond equal text, inequalities, units, and identities that hold only on a part of the
reals.
"""

import cmath
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Final

__all__ = ["boxed_answer", "normalised", "same_answer"]

_MAX_CHARS: Final = 1000
_MAX_DEPTH: Final = 40
_TOLERANCE: Final = 1e-11
# Values that letters take; no relation between them is likely to hold by chance.
_POINTS: Final[tuple[tuple[float, float], ...]] = (
    (0.7310585, 0.3819660),
    (1.6487213, 0.2078796),
    (2.2360680, 0.5671433),
)

_WORD: Final = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}")
_SIZES: Final = re.compile(r"\\(left|right)(?![a-z])")
_DECIMAL: Final = re.compile(r"-?(\d+(\.\d*)?|\.\d+)")

_REPLACED: Final = (
    *((("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), (r"\ ", ""), (" ", ""), ("mbox", "text"))),
    *((",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")),
)
_REMOVED: Final = (
    *(
        "square",
        "ways",
        "integers",
        "dollars",
        "mph",
        "inches",
        "ft",
        "hours",
        "km",
        "units",
        "\\ldots",
        "sue",
    ),
    *(
        "points",
        "feet",
        "minutes",
        "digits",
        "cents",
        "degrees",
        "cm",
        "gm",
        "pounds",
        "meters",
        "meals",
        "edges",
    ),
    *("students", "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2"),
    *(
        "\\text{}^3",
        "\\text{\n}",
        "\\text{}",
        r"\mathrm{th}",
        r"^\circ",
        r"^{\circ}",
        r"\;",
        r",\!",
        "{,}",
        '"',
    ),
    "\\dots",
)
_UNIT: Final = re.compile(rf"(?<!\\)\b({'|'.join(each for each in _REMOVED if each.isalpha())})\b")
_COMMAND: Final = re.compile(r"(\\[a-zA-Z]+)")
_THOUSANDS: Final = re.compile(r"-?\d{1,3}(,\d{3})+")
_UNWRAPPED: Final = (
    (re.compile(r"(.*?)(\$)(.*?)(\$)(.*)"), r"$\3$"),
    (re.compile(r"(\\text\{)(.*?)(\})"), r"\2"),
    (re.compile(r"(\\textbf\{)(.*?)(\})"), r"\2"),
    (re.compile(r"(\\overline\{)(.*?)(\})"), r"\2"),
    (re.compile(r"(\\boxed\{)(.*)(\})"), r"\2"),
    (re.compile(r"(frac)([^{])(.)"), r"frac{\2}{\3}"),
    (re.compile(r"(sqrt)(\[[^\]]*\])(\w)"), r"\1\2{\3}"),
    (re.compile(r"(sqrt)([^{\[])"), r"sqrt{\2}"),
)


def boxed_answer(text: str) -> str | None:
    r"""What the last `\boxed{...}` (or `\fbox`, or `\boxed x`) of a text holds; None if there is none."""
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].split("$")[0]
    start = max(text.rfind("\\boxed{"), -1)
    start = start if start >= 0 else text.rfind("\\fbox{")
    if start < 0:
        return None
    first = text.index("{", start)
    depth = 0
    for i in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[first + 1 : i]
    return None


def normalised(answer: str) -> str:
    """The answer after Minerva's substitutions: no units, no text, no dollar signs, full `\\frac{}{}`."""
    answer = answer[:_MAX_CHARS].split("=")[-1]
    answer = _UNIT.sub("", answer)
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for piece in _REMOVED:
        answer = _outside_commands(answer, piece) if piece.isalpha() else answer.replace(piece, "")
    for pattern, replacement in _UNWRAPPED:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def _outside_commands(answer: str, word: str) -> str:
    r"""Without a word, which is left where it is a part of a command: `ft` in `\left`."""
    parts = _COMMAND.split(answer)
    return "".join(part if i % 2 else part.replace(word, "") for i, part in enumerate(parts))


def same_answer(left: str, right: str) -> bool:
    """Whether two answers, normalised or not, are equal as text or as mathematics."""
    if left == right and left.strip():
        return True
    left, right = (_plain(normalised(_SIZES.sub("", each))) for each in (left, right))
    if left == right:
        return bool(left)
    lefts, rights = _parts(left), _parts(right)
    if len(lefts) != len(rights) or (len(lefts) > 1 and _fences(left) != _fences(right)):
        return False
    return all(_same_value(a, b) for a, b in zip(lefts, rights, strict=True))


def _plain(text: str) -> str:
    for piece in ("\\left", "\\right", "\\!", "\\,", "\\%", "%", "\\displaystyle", "\\cdot "):
        text = text.replace(piece, "*" if piece == "\\cdot " else "")
    text = re.sub(r"_\{(\w)\}", r"_\1", text.replace("dfrac", "frac").replace("tfrac", "frac"))
    return text.strip().rstrip(".")


def _fences(text: str) -> tuple[str, str]:
    return (text[0] if text[0] in "([" else "", text[-1] if text[-1] in ")]" else "")


def _parts(text: str) -> list[str]:
    """Members of a tuple, interval or set; the text itself if it is none."""
    inner = text
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            inner = text[len(opening) : len(text) - len(closing)]
            break
    parts, depth, current = [], 0, ""
    for char in inner:
        depth += (char in "({[") - (char in ")}]")
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    return [*parts, current] if parts else [text]


def _same_value(left: str, right: str) -> bool:
    if left == right:
        return True
    if _WORD.search(left) or _WORD.search(right):  # a word is no product of its letters
        return False
    if _DECIMAL.fullmatch(left) and _DECIMAL.fullmatch(right):
        return Fraction(left) == Fraction(right)
    try:
        pairs = [(_evaluate(left, point), _evaluate(right, point)) for point in _POINTS]
    except (ValueError, ArithmeticError, IndexError):
        return False
    return all(
        cmath.isfinite(a) and cmath.isfinite(b) and abs(a - b) <= _TOLERANCE * max(1.0, abs(a), abs(b))
        for a, b in pairs
    )


_TOKEN: Final = re.compile(r"\s*(\d+\.\d+|\.\d+|\d+|\\[A-Za-z]+|\\.|[A-Za-z]|.)", re.DOTALL)
_FUNCTIONS: Final[Mapping[str, Callable[[complex], complex]]] = {
    "\\sin": cmath.sin,
    "\\cos": cmath.cos,
    "\\tan": cmath.tan,
    "\\cot": lambda x: 1 / cmath.tan(x),
    "\\sec": lambda x: 1 / cmath.cos(x),
    "\\csc": lambda x: 1 / cmath.sin(x),
    "\\ln": cmath.log,
    "\\log": cmath.log,
    "\\exp": cmath.exp,
    "\\arcsin": cmath.asin,
    "\\arccos": cmath.acos,
    "\\arctan": cmath.atan,
}
_CONSTANTS: Final = {"\\pi": math.pi, "e": math.e, "i": 1j}
_GREEK: Final = re.compile(
    r"\\(alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|varphi|omega|rho|sigma|tau|psi)"
)


def _evaluate(text: str, point: tuple[float, float]) -> complex:
    tokens = [match.group(1) for match in _TOKEN.finditer(text)]
    parser = _Parser(tokens, point)
    value = parser.sum(0)
    if parser.next is not None:
        raise ValueError(f"{parser.next!r} cannot be read")
    return value


class _Parser:
    """Recursive descent over the tokens of one expression, with the values of its letters."""

    def __init__(self, tokens: list[str], point: tuple[float, float]) -> None:
        self._tokens = tokens
        self._point = point
        self._at = 0

    @property
    def next(self) -> str | None:
        """The token that comes next; None at the end."""
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def take(self, expected: str = "") -> str:
        """Go past a token, which must be `expected` if that is given."""
        token = self._tokens[self._at]
        if expected and token != expected:
            raise ValueError(f"{token!r} in place of {expected!r}")
        self._at += 1
        return token

    def sum(self, depth: int) -> complex:
        """Terms with + and - between them."""
        if depth > _MAX_DEPTH:
            raise ValueError("too deep")
        value = 0j
        sign = 1
        while self.next in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        value = sign * self._product(depth)
        while self.next in ("+", "-"):
            sign = -1 if self.take() == "-" else 1
            value += sign * self._product(depth)
        return value

    def _product(self, depth: int) -> complex:
        value = self._power(depth)
        while self.next is not None and self.next not in ("+", "-", ")", "]", "}", "|", ",", "\\}"):
            if self.next in ("*", "\\cdot", "\\times"):
                self.take()
                value *= self._power(depth)
            elif self.next in ("/", "\\div"):
                self.take()
                value /= self._power(depth)
            else:
                value *= self._power(depth)
        return value

    def _power(self, depth: int) -> complex:
        if self.next == "-":
            self.take()
            return -self._power(depth + 1) if depth < _MAX_DEPTH else 0j
        value = self._atom(depth)
        while self.next in ("^", "!"):
            if self.take() == "!":
                value = complex(math.gamma(value.real + 1)) if value.imag == 0 else complex(math.nan)
            else:
                value = complex(value) ** self._argument(depth)
        return value

    def _argument(self, depth: int) -> complex:
        """What follows ^, \\frac or \\sqrt: a group, or one token, of a number one digit."""
        if self.next == "{":
            return self._group("{", "}", depth)
        token = self._tokens[self._at]
        if token[0].isdigit() and len(token) > 1 and "." not in token:
            self._tokens[self._at : self._at + 1] = list(token)
        return self._atom(depth + 1)

    def _group(self, opening: str, closing: str, depth: int) -> complex:
        self.take(opening)
        value = self.sum(depth + 1)
        self.take(closing)
        return value

    def _atom(self, depth: int) -> complex:
        if depth > _MAX_DEPTH:
            raise ValueError("too deep")
        token = self.next or ""
        for opening, closing in (("{", "}"), ("(", ")"), ("[", "]")):
            if token == opening:
                return self._group(opening, closing, depth)
        if token == "|":
            return complex(abs(self._group("|", "|", depth)))
        self.take()
        if token[0].isdigit() or token[0] == ".":
            return complex(float(token))
        if token == "\\frac":
            above = self._argument(depth)
            return above / self._argument(depth)
        if token == "\\sqrt":
            return self._root(depth)
        if token in _FUNCTIONS:
            return self._function(token, depth)
        if token in _CONSTANTS:
            return complex(_CONSTANTS[token])
        if token.isalpha() or _GREEK.fullmatch(token):
            return complex(self._letter(token))
        raise ValueError(f"{token!r} cannot be read")

    def _root(self, depth: int) -> complex:
        degree = 2 + 0j
        if self.next == "[":
            degree = self._group("[", "]", depth)
        value = self._argument(depth)
        if value.imag == 0 and value.real < 0 and degree == 3:
            return -(complex(-value.real) ** (1 / degree))
        return cmath.sqrt(value) if degree == 2 else value ** (1 / degree)

    def _function(self, name: str, depth: int) -> complex:
        base = power = None
        while self.next in ("^", "_"):
            if self.take() == "^":
                power = self._argument(depth)
            else:
                base = self._argument(depth)
        value = _FUNCTIONS[name](self._power(depth + 1))
        value = value / cmath.log(base) if base is not None else value
        return value**power if power is not None else value

    def _letter(self, name: str) -> float:
        """A value that is different for each letter (and index) and each point."""
        if self.next == "_":
            self.take()
            name += self.take() if self.next != "{" else self._index()
        start, step = self._point
        return start + step * float(sum(ord(char) * 31**i for i, char in enumerate(name[:6])) % 97) / 7

    def _index(self) -> str:
        self.take("{")
        name = ""
        while self.next not in ("}", None):
            name += self.take()
        self.take("}")
        return name
