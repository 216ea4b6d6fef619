"""Hostile grammars, made by hand in families, and random changes of harmless schemas."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from scripts.scorecard.hostile_lark import hostile_lark
from tokenmill.core.sampling import GrammarKind

__all__ = ["Hostile", "hostile_grammars", "mutated"]


class Hostile(NamedTuple):
    """The text of a grammar, and the family that it is of."""

    family: str
    kind: GrammarKind
    source: str


PATTERNS = (
    *("(a|a)*", "(a*)*", "((a*)*)*b", "(x+x+)+y", "(a|b|ab)*c", "(.*)*", "(.*a){30}", "a?" * 60 + "a" * 60),
    *(
        "(a|b)*a(a|b){12}",
        "(a|b)*a(a|b){30}",
        "(a|b)*a(a|b){300}",
        ".*" * 300,
        "(.*,){50}x",
        "(a{0,99}){0,99}",
    ),
    *("(a{1000}){1000}", "((a{100}){100}){100}", "a{99999999}", "a{0,4294967295}", "a{5,2}", "(){1000000}"),
    *(
        r"\p{L}{0,500}\p{N}{3,900}",
        r"[\p{L}--\p{N}]{99}",
        r"\w{1,2000}",
        r"(\w+\s?)*$",
        "(?i)\u017f{200}",
        r"\X",
    ),
    *("(?=a)b", "(?<!a)b", r"(a)\1", "(?P<x>a)(?P<x>b)", "(?>a)", "a**", "[z-a]", "[", "(", ")", "*", "\\"),
    *(
        r"\p{Nobody}",
        r"\x{110000}",
        r"\ud800",
        r"[^\x00-\U0010FFFF]",
        "^$",
        "$^",
        "^",
        "a^b",
        r"\bab\b",
        r"\Aab\z",
    ),
    *("|".join("abcdefghij"[i % 10] * (i + 1) for i in range(300)), "(" * 249 + "a" + ")" * 249),
    *(
        "(" * 251 + "a" + ")" * 251,
        "(" * 30000 + ")" * 30000,
        "[" * 500,
        "(?:" * 9999,
        "a" * 60000,
        "é" * 20000,
    ),
    *(
        "|" * 20000,
        "|".join(f"{i:04}" for i in range(9999)),
        "[a-z]{50}" * 200,
        "(?s:.){1,100000}",
        "(?:a|){5000}",
    ),
)


def hostile_grammars() -> list[Hostile]:
    """More than 300, the same every time."""
    schemas = [(family, json.dumps(schema)) for family, schema in _schemas()]
    texts = [*schemas, *_broken_json()]
    found = [Hostile(family, "json_schema", text) for family, text in texts]
    found += [
        Hostile("pattern of a string", "json_schema", json.dumps({"pattern": each})) for each in PATTERNS
    ]
    found += [Hostile("regex", "regex", pattern) for pattern in PATTERNS]
    return found + [Hostile(family, "lark", text) for family, text in hostile_lark()]


def _nested(depth: int, wrap: str) -> Any:
    value: Any = {"type": "string"}
    for _ in range(depth):
        value = (
            {"items": value}
            if wrap == "items"
            else {wrap: [value]}
            if wrap == "anyOf"
            else {wrap: {"a": value}}
        )
    return value


def _schemas() -> Iterator[tuple[str, Any]]:
    yield from (("nested", _nested(n, w)) for n in (9, 31, 33, 100) for w in ("items", "properties", "anyOf"))
    yield from _enums()
    yield from _combinations()
    yield from _references()
    yield from _sizes()
    yield from _numbers()
    yield from _contradictions()
    yield from _wrong_types()
    yield from _objects()
    for name in ("date-time", "email", "uuid", "ipv6", "uri", "regex", "nobody", "", "json-pointer", "iri"):
        yield "format", {"type": "string", "format": name, "minLength": 40, "maxLength": 41}
    for pattern in ("(a|b)*a(a|b){30}", "", "(", "[^a]", "x{100000}"):
        yield "x-guidance", {"x-guidance": {"whitespace_pattern": pattern}, "type": "object"}
    yield "x-guidance", {"x-guidance": {"item_separator": "(", "key_separator": ")"}, "type": "object"}
    yield "x-guidance", {"x-guidance": {"nobody": 1}}
    yield "x-guidance", {"x-guidance": []}


def _enums() -> Iterator[tuple[str, Any]]:
    for n in (100, 1000, 5000):
        yield "enum", {"enum": [f"v{i}" for i in range(n)]}
        yield "enum", {"enum": ["a" * (i % 50) + str(i) for i in range(n // 3)]}
        yield "enum", {"enum": list(range(-n, n))}
    yield "enum", {"enum": []}
    yield "enum", {"enum": [None, True, 1.5, [], {}, [[1]], {"a": {"b": 2}}]}
    yield "enum", {"enum": ["a"] * 9000}
    yield from (("const", {"const": text * n}) for text in ("a", "a b", "é\n\0") for n in (1000, 7000))
    yield "const", {"const": "a b " * 16000}
    yield "const", {"const": _nested(60, "items")}


def _combinations() -> Iterator[tuple[str, Any]]:
    for n in (20, 100, 200, 400, 700):
        yield "anyOf of objects", {"anyOf": [{"properties": {"a": {}, f"b{i}": {}}} for i in range(n)]}
    for word in ("anyOf", "oneOf", "allOf"):
        for n in (2, 40, 900):
            yield word, {word: [{"type": "object", "required": [f"p{i}"]} for i in range(n)]}
        yield word, {word: []}
    for n in (4, 12, 24):
        parts: list[Any] = [{"properties": {f"a{i}{j}": {}}} for i in range(n) for j in range(4)]
        yield "allOf of anyOf", {"allOf": [{"anyOf": parts[4 * i : 4 * i + 4]} for i in range(n)]}
        yield "anyOf of allOf", {"anyOf": [{"allOf": parts[i:]} for i in range(n)]}
        patterns = [{"pattern": f"(.*[{chr(97 + i)}]){{3}}"} for i in range(n)]
        yield "allOf of patterns", {"type": "string", "allOf": patterns}
        yield "not", {"type": "string", "not": {"anyOf": patterns}}
    yield "if", {"if": {"type": "string"}, "then": {"minLength": 3}, "else": False}


def _references() -> Iterator[tuple[str, Any]]:
    yield "reference", {"$ref": "#"}
    yield "reference", {"allOf": [{"$ref": "#"}, {"type": "object"}]}
    yield "reference", {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}
    yield "reference", {"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}
    yield "reference", {"type": "array", "items": {"$ref": "#"}, "minItems": 1}
    for n in (2, 50, 900):
        cycle = {f"d{i}": {"$ref": f"#/$defs/d{(i + 1) % n}"} for i in range(n)}
        yield "reference cycle", {"$defs": cycle, "$ref": "#/$defs/d0"}
        chain = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(n)} | {
            f"d{n}": {"type": "null"}
        }
        yield "reference chain", {"$defs": chain, "$ref": "#/$defs/d0"}
        tree = {
            f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}, "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}]}
            for i in range(n)
        }
        yield "reference tree", {"$defs": tree | {f"d{n}": {"type": "null"}}, "$ref": "#/$defs/d0"}
        double = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(n)} | {
            f"d{n}": {"type": "null"}
        }
        yield "reference doubling", {"$defs": double, "$ref": "#/$defs/d0"}
    for target in (
        "http://example.org/x",
        "#/a/b/c",
        "file:///etc/passwd",
        "#/%00",
        "#" * 5000,
        "",
        "\0",
        "#/$ref",
    ):
        yield "reference target", {"$ref": target}
    yield "reference target", {"$id": "http://a/" + "../" * 5000, "$ref": "b"}


def _sizes() -> Iterator[tuple[str, Any]]:
    words = [("string", "minLength"), ("string", "maxLength"), ("array", "minItems"), ("array", "maxItems")]
    words += [("object", "minProperties"), ("object", "maxProperties")]
    for kind, word in words:
        for size in (1000, 10**6, 2**31, 2**64, 10**30, -1, 1.5):
            yield "size", {"type": kind, word: size}
    yield "size", {"type": "array", "items": _sized(5, 300)}
    yield "size", {"type": "array", "uniqueItems": True, "minItems": 3, "maxItems": 9}
    yield "size", {"type": "array", "contains": {"const": 1}, "minContains": 5}


def _sized(depth: int, size: int) -> Any:
    inner = _sized(depth - 1, size) if depth else {"type": "null"}
    return {"type": "array", "items": inner, "minItems": size, "maxItems": size}


def _numbers() -> Iterator[tuple[str, Any]]:
    for power in (10, 100, 1000, 4000):
        yield "number", {"type": "integer", "minimum": -(10**power), "maximum": 10**power}
        yield "number", {"type": "integer", "minimum": 10**power, "maximum": 10**power + 1}
    for value in (7, 97, 9973, 99991, 999983, 2**61 - 1, 1e-9, 0.1, 1e-300, 1e300, 0, -3):
        yield "multipleOf", {"type": "integer", "multipleOf": value}
        yield "multipleOf", {"type": "number", "multipleOf": value, "minimum": 1}
    primes = [101, 103, 107, 109, 113, 127, 131, 137]
    yield from (
        ("multipleOf", {"allOf": [{"type": "integer", "multipleOf": p} for p in primes[:n]]})
        for n in (2, 4, 8)
    )
    yield from (
        ("number", {"type": "number", "exclusiveMinimum": a, "exclusiveMaximum": b})
        for a, b in ((0, 5e-324), (1, 1), (-1e308, 1e308), (0.1, 0.1000000000000001))
    )


def _contradictions() -> Iterator[tuple[str, Any]]:
    yield "contradiction", False
    yield "contradiction", {"type": "integer", "minimum": 5, "maximum": 3}
    yield "contradiction", {"type": "string", "minLength": 5, "maxLength": 3}
    yield "contradiction", {"type": "array", "minItems": 5, "maxItems": 3}
    yield "contradiction", {"type": "array", "items": False, "minItems": 1}
    yield "contradiction", {"type": "object", "properties": {"a": False}, "required": ["a"]}
    yield "contradiction", {"type": "object", "additionalProperties": False, "required": ["a"]}
    yield "contradiction", {"allOf": [{"type": "string"}, {"type": "number"}]}
    yield "contradiction", {"allOf": [{"const": 1}, {"const": 2}]}
    yield "contradiction", {"type": "string", "enum": [1, 2]}
    yield "contradiction", {"type": "string", "pattern": "^a$", "minLength": 2}
    yield "contradiction", {"type": "string", "format": "date", "pattern": "^x"}
    yield "contradiction", {"type": "integer", "minimum": 0.1, "maximum": 0.9}
    yield "contradiction", {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 6}
    yield "contradiction", {"type": "object", "minProperties": 3, "maxProperties": 2}
    yield "contradiction", {"type": []}


def _wrong_types() -> Iterator[tuple[str, Any]]:
    words = (
        "type",
        "properties",
        "required",
        "items",
        "enum",
        "anyOf",
        "$ref",
        "$defs",
        "pattern",
        "maximum",
    )
    values: tuple[Any, ...] = (None, -1, "x\0", [[]], {"": 1})
    for word in (*words, "minLength", "additionalProperties", "patternProperties", "prefixItems", "format"):
        for value in values:
            yield "wrong type", {word: value}


def _objects() -> Iterator[tuple[str, Any]]:
    for n in (100, 400, 1500):
        properties: Any = {f"p{i}": {"type": "string"} for i in range(n)}
        yield "object", {"type": "object", "properties": properties}
        yield "object", {"type": "object", "properties": properties, "required": list(properties)}
        yield "object", {"type": "object", "patternProperties": {f".*{i}.*{i}": {} for i in range(n)}}
        yield (
            "object",
            {"type": "object", "required": list(properties), "additionalProperties": {"type": "null"}},
        )
    for key in ("", '"', "\0", "\\", "é" * 3000, "\U0010ffff", "a\nb"):
        yield "object", {"type": "object", "properties": {key: {"const": key}}, "required": [key]}


def _broken_json() -> Iterator[tuple[str, str]]:
    for text in (
        "{",
        "[]",
        "5",
        '"x"',
        "null",
        "nul",
        "{}}",
        "{} {}",
        "\ufeff{}",
        " ",
        "\0",
        "{'a':1}",
        "{a:1}",
        "{,}",
    ):
        yield "broken JSON", text
    for text in (
        '{"a":NaN}',
        '{"a":1e999}',
        '{"a":-}',
        '{"a":01}',
        '{"maximum":1e99999}',
        '{"a":"\\ud800"}',
        '{"a":"\ud800"}',
    ):
        yield "broken JSON", text
    for text in (
        '{"type":"string","type":"null"}',
        "// x\n{}",
        '{"a":"\t"}',
        '{"\\u0000":{}}',
        '{"minimum":' + "9" * 60000 + "}",
    ):
        yield "broken JSON", text
    yield "injection", '{}}, {"lark_grammar": "start: \\"a\\""'
    yield "injection", '{}}], "max_tokens": 1, "test_trace": true, "x": [{"y": {}'
    for n in (100, 3000, 20000):
        yield from (
            ("deep JSON", text)
            for text in ("[" * n, "[" * n + "]" * n, '{"a":' * n, '{"not":' * n + "1" + "}" * n)
        )


def mutated(schema: Any, rng: random.Random) -> str:
    """JSON text of a schema with one to four random changes."""
    schema = copy.deepcopy(schema)
    for _ in range(rng.randint(1, 4)):
        schema = _changed(schema, rng)
    text = json.dumps(schema)
    if rng.random() < 0.15:
        at = rng.randrange(len(text))
        text = (
            text[:at]
            + rng.choice(["", "\0", '"', "{", "]", "\ud800", "9" * 300])
            + text[at + rng.randint(0, 5) :]
        )
    return text


def _changed(schema: Any, rng: random.Random) -> Any:
    places = list(_places(schema))
    if not places:
        return schema
    holder, key = rng.choice(places)
    extreme = rng.choice(
        [None, -1, 10**30, 1e300, "", "(", [], {}, True, False, {"$ref": "#"}, "object", ["null"] * 99]
    )
    word = rng.choice(
        ["pattern", "minLength", "minItems", "required", "enum", "maximum", "multipleOf", "$ref", "not"]
    )
    change = rng.randrange(6)
    if change == 0:
        del holder[key]
    elif change == 1:
        holder[key] = extreme
    elif change == 2:
        holder[key] = {
            rng.choice(["anyOf", "allOf", "oneOf", "not", "items"]): [copy.deepcopy(holder[key])]
            * rng.randint(1, 4)
        }
    elif change == 3:
        holder[key] = copy.deepcopy(schema)
    elif change == 4 and isinstance(holder, dict):
        holder[word] = rng.choice([extreme, rng.choice(PATTERNS)[:200], rng.choice([3, 50, 9973, 10**6])])
    elif isinstance(holder[key], str):
        holder[key] = rng.choice(["string", "array", "object", "integer", "number", "null", holder[key] * 50])
    return schema


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place inside a value, as its holder and key."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield value, key
        yield from _places(child)
