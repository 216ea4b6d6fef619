"""Hostile context-free grammars, made by hand in families."""

from collections.abc import Iterator
from typing import Final

__all__ = ["hostile_lark"]

_FIXED: Final[dict[str, tuple[str, ...]]] = {
    "ambiguous": (
        *('start: start start | "a"', "start: start*", 'start: (start | "a")*', 'start: ("a" | "a")*'),
        'start: ("a"* "a"*)* "b"',
    ),
    "left recursion": (
        *('start: start "a"', 'start: start "a" | "b"', "start: start", 'start: e start "a" | "b"\ne:'),
        'start: a\na: b "x"\nb: a "y" | c\nc: a',
    ),
    "special tokens": (
        *("start: <[0]>", "start: <[999999]>", "start: <[*]>", 'start: "a" <[256]> "b"', "start: <nobody>"),
        *("start: <|im_end|>", "start: <[^*]>", "start: <[5-1]>", "start: <>"),
    ),
    "options": (
        *(
            '%llguidance {"no_forcing": true}\nstart: /a*/',
            "%llguidance []\nstart:",
            "start[capture, lazy]: /.*/",
        ),
        *('%llguidance {"allow_invalid_utf8": true}\nstart: /./', "start[max_tokens=0]: /a*/"),
        *('start[temperature="x"]: /a*/', 'start[stop=""]: /a*/', "start[suffix=/(.*a){30}/]: /.*/"),
    ),
    "embedded": (
        *(
            'start: %json {"$ref": "#"}',
            "start: %json {",
            'start: %json {"type":"integer","multipleOf":999983}',
        ),
        *(
            'start: %regex {"substring_chars": "' + "ab" * 9000 + '"}',
            'start: %regex {"x":1}',
            "start: @nobody",
        ),
        *("start: %lark { start: start }", "%import common.NOBODY\nstart: A", "%import os.system\nstart: A"),
        *("%ignore /(.*a){30}/\nstart: /b/", "%ignore //\nstart: /b/"),
    ),
    "broken": (
        *("", "\0", "start", "start:", "start: ", ":", "start: missing", 'start: "a', "start: /a", 'a: "b"'),
        *('start: "a"\nstart: "b"', "start: %", "é: é", "start: \ud800", 'start: "\\q"', "#", "start: | |"),
        *('start: "a" ->', "start::_", "x" * 60000, "start: a\n" * 6000, "start: " + '"a" ' * 12000),
    ),
    "repetition": (
        'start: x{100}\nx: y{100}\ny: z{100}\nz: "q" | "r"',
        "start: A{0,500}\nA: /[a-z]{1,50}/",
    ),
}
_COUNTS: Final = (
    *("{1000}", "{1000000}", "{0,99999999}", "{3,2}", "~5..1", "{99999999999999999999}", "+" * 50),
)


def hostile_lark() -> Iterator[tuple[str, str]]:
    """Family and text of each."""
    for family, grammars in _FIXED.items():
        yield from ((family, text) for text in grammars)
    for count in _COUNTS:
        yield "repetition", f'start: "a"{count}'
        yield "repetition", f"start: A\nA: /[a-z]/{count}"
    for n in (5, 40, 900, 3500):
        yield from _of_rules(n)
    for n in (4, 10, 26):
        yield from _of_terminals([chr(97 + i) for i in range(n)])


def _of_rules(n: int) -> Iterator[tuple[str, str]]:
    chain = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(n))
    double = "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(n))
    terminals = "\n".join(f"T{i}: /a*{i}/" for i in range(n))
    yield "chain", f'{chain}\nr{n}: "a"'
    yield "cycle", f"{chain}\nr{n}: r0"
    yield "doubling", f'{double}\nr{n}: "a"'
    yield "empty doubling", f"{double}\nr{n}:"
    yield "choices", "start: " + " | ".join(f'"{i}" r' for i in range(n)) + '\nr: "x" | start'
    yield "terminals", "start: (" + " | ".join(f"T{i}" for i in range(n)) + ")*\n" + terminals
    yield "nested groups", f'start: {"(" * n}"a"{")" * n}'
    yield "nested groups", f'start: {"[" * n}"a"{"]" * n}'


def _of_terminals(letters: list[str]) -> Iterator[tuple[str, str]]:
    n = len(letters)
    yield "and", "start: A\nA: " + " & ".join(f"/(.*{c}){{2}}.*/" for c in letters)
    yield "not", "start: A\nA: ~(" + " | ".join(f"/(.*{c}){{2}}.*/" for c in letters) + ")"
    yield "not", "start: A\nA: " + "~" * n + "/a*/"
    lexemes = "\n".join(f"{c.upper()}: /{c}.*/ /.*{c}/" for c in letters)
    yield "lexemes", "start: (" + " | ".join(letters).upper() + ")*\n" + lexemes
    yield "lazy", "start: a*\na[lazy]: " + " | ".join(f"/.*{c}/" for c in letters)
