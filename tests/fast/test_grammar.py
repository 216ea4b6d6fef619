"""Grammars over a small vocabulary: what is allowed, drafts, refusals, what is kept."""

import contextlib
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fast.grammar_tools import END, PIECES, PieceTokens, allowed, random_tokens
from tokenmill.core import Grammar, ResourceError, TokenmillError, UsageError
from tokenmill.core.sampling import GrammarKind
from tokenmill.engine.structured.cache import TenantCache
from tokenmill.engine.structured.grammar import GrammarCompiler, GrammarLimits, GrammarState

TOKENS = PieceTokens()
CLOSERS = (ord('"'), ord("}"), ord("]"), ord(","), END)


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    with GrammarCompiler(TOKENS, TOKENS.vocab_size, [END]) as compiler:
        yield compiler


def grammar(kind: GrammarKind, source: object = "") -> Grammar:
    return Grammar(kind=kind, source=source if isinstance(source, str) else json.dumps(source))


def mask_of(compiler: GrammarCompiler, state: GrammarState) -> list[int]:
    mask_W = np.empty(compiler.num_words, np.uint32)
    state.fill_mask(mask_W)
    return allowed(mask_W)


def texts(compiler: GrammarCompiler, wanted: Grammar, count: int = 8) -> list[str]:
    """Random texts of a grammar; all must come to their end."""
    found = []
    for seed in range(count):
        tokens = random_tokens(compiler.start(wanted), compiler.num_words, random.Random(seed), CLOSERS)
        assert tokens[-1] == END, "the text did not end"
        found.append(b"".join(map(TOKENS.token_bytes, tokens[:-1])).decode())
    return found


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["ab", "é", 'q"']}, "minItems": 1, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def assert_matches(value: Any) -> None:
    """`SCHEMA` by hand."""
    assert isinstance(value, dict) and {"name", "age", "tags"} <= set(value) <= set(SCHEMA["properties"])  # type: ignore[call-overload]
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert isinstance(value["age"], int) and 0 <= value["age"] <= 150
    assert 1 <= len(value["tags"]) <= 3 and set(value["tags"]) <= {"ab", "é", 'q"'}
    if value.get("next") is not None:
        assert_matches(value["next"])


def test_a_schema_is_kept(compiler: GrammarCompiler) -> None:
    for text in texts(compiler, grammar("json_schema", SCHEMA)):
        assert_matches(json.loads(text))


def test_json_object(compiler: GrammarCompiler) -> None:
    for text in texts(compiler, grammar("json_object")):
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "pattern", [r"a(bc|ca){2,4}", r"\d{4}-\d\d", r"[^\x00-\x20]{1,5}é", r"(?i)ab", "a/b"]
)
def test_a_regex_is_kept(compiler: GrammarCompiler, pattern: str) -> None:
    for text in texts(compiler, grammar("regex", pattern)):
        assert re.fullmatch(pattern, text)


def test_a_context_free_grammar_is_kept(compiler: GrammarCompiler) -> None:
    source = 'start: sum\nsum: term ("+" term){0,3}\nterm: /[0-9]{1,2}/ | "(" sum ")"'
    closers = grammar("lark", source)
    for seed in range(8):
        rng = random.Random(seed)
        tokens = random_tokens(compiler.start(closers), compiler.num_words, rng, [*map(ord, "0123)"), END])
        text = bytes(tokens[:-1]).decode()
        assert re.fullmatch(r"[0-9+()]+", text) and text.count("(") == text.count(")")


words = st.lists(st.text("abcé", max_size=5), min_size=1, max_size=6, unique=True)


def allowed_by_hand(language: list[bytes], text: bytes) -> list[int]:
    """The plain twin: a token is allowed if some word goes on with it, the end if the text is a word."""
    ids = [
        i
        for i, token in enumerate(TOKENS.tokens)
        if not TOKENS.is_special(i) and any(word.startswith(text + token) for word in language)
    ]
    return sorted(ids + [END] * (text in language))


@settings(max_examples=30, deadline=None)
@given(language=words, seed=st.integers(0, 99))
def test_masks_are_those_of_the_language(language: list[str], seed: int, compiler: GrammarCompiler) -> None:
    state = compiler.start(grammar("regex", "|".join(language) or "()"))
    encoded, text = [word.encode() for word in language], b""
    rng = random.Random(seed)
    while True:
        taken = [token for token in range(-1, TOKENS.vocab_size + 40) if state.allows(token)]
        choices = mask_of(compiler, state)
        assert taken == choices
        by_hand = allowed_by_hand(encoded, text)
        bytes_next = {word[len(text)] for word in encoded if word.startswith(text) and word != text}
        is_forced = text not in encoded and len(bytes_next) == 1
        assert choices == by_hand or (is_forced and choices == list(bytes_next))
        token = rng.choice(choices)
        state.accept(token)
        if token == END:
            break
        text += TOKENS.token_bytes(token)
    assert state.finished and mask_of(compiler, state) == [END]
    assert [token for token in range(TOKENS.vocab_size) if state.allows(token)] == [END]


@settings(max_examples=30, deadline=None)
@given(
    language=words,
    accepted=st.integers(0, 3),
    drafts=st.lists(st.sampled_from([97, 98, 99, END, END + 1, 258, 259, 260, 9999]), max_size=5),
)
def test_drafts_are_what_would_be_accepted_and_leave_no_trace(
    language: list[str], accepted: int, drafts: list[int], compiler: GrammarCompiler
) -> None:
    wanted = grammar("regex", "|".join(language) or "()")
    tokens: list[int] = []
    for _ in range(accepted):
        tokens += mask_of(compiler, twin_of(wanted, compiler, tokens))[: END not in tokens]
    state = twin_of(wanted, compiler, tokens)
    before = mask_of(compiler, state), state.forced(), state.finished
    mask_RW = np.empty((len(drafts) + 1, compiler.num_words), np.uint32)
    num_rows = state.masks(drafts, mask_RW)
    num_valid = state.num_valid(drafts)
    assert (mask_of(compiler, state), state.forced(), state.finished) == before
    assert num_valid == num_accepted(twin_of(wanted, compiler, tokens), drafts)
    twin = twin_of(wanted, compiler, tokens)
    for row, draft in enumerate([*drafts, -1][:num_rows]):
        assert allowed(mask_RW[row]) == mask_of(compiler, twin)
        if row + 1 < num_rows:
            twin.accept(draft)
        else:
            assert draft in (-1, END) or draft not in mask_of(compiler, twin)
    assert all(allowed(row_W) == [END] for row_W in mask_RW[num_rows:])


def twin_of(wanted: Grammar, compiler: GrammarCompiler, tokens: list[int]) -> GrammarState:
    """A new state after some tokens."""
    state = compiler.start(wanted)
    for token in tokens:
        state.accept(token)
    return state


def num_accepted(state: GrammarState, drafts: list[int]) -> int:
    """How many tokens are accepted, one at a time."""
    for count, draft in enumerate(drafts):
        try:
            state.accept(draft)
        except UsageError:
            return count
    return len(drafts)


def test_a_wrong_token_is_refused_and_changes_nothing(compiler: GrammarCompiler) -> None:
    state = compiler.start(grammar("regex", "ab*"))
    for wrong in (ord("b"), END, END + 1, TOKENS.vocab_size - 1, TOKENS.vocab_size, -1, 1 << 40):
        with pytest.raises(UsageError, match="does not allow token"):
            state.accept(wrong)
    assert mask_of(compiler, state) == [ord("a"), TOKENS.tokens.index(b"ab")]
    state.accept(ord("a"))
    state.accept(END)
    with pytest.raises(UsageError, match="does not allow token"):
        state.accept(END)


def test_forced_tokens(compiler: GrammarCompiler) -> None:
    state = compiler.start(grammar("json_schema", {"const": "abc"}))
    assert bytes(state.forced()) == b'"abc"'
    assert len(compiler.start(grammar("json_schema", {"const": "abc" * 1000})).forced()) == 64
    assert compiler.start(grammar("regex", "a|b")).forced() == ()


def test_a_long_forced_text_is_written_out(compiler: GrammarCompiler) -> None:
    text = json.dumps("héa" * 500, ensure_ascii=False)
    state, written = compiler.start(grammar("json_schema", text.join(('{"const":', "}")))), b""
    while not state.finished:
        written += TOKENS.token_bytes(mask_of(compiler, state)[0])
        state.accept(mask_of(compiler, state)[0])
    assert written == text.encode()


# The first 40 tokens are beyond the trial: what follows shows only when a sequence gets there.
LATE_DEAD_END = "start: A <[257]>\nA: /a{40}/"
OBJECTS = [{"type": "object", "properties": {"a": True, f"b{i}": True}} for i in range(400)]
LATE_EXPLOSION = f"start: A %json {json.dumps({'anyOf': OBJECTS})}\nA: /[df]{{40}}/"


@pytest.mark.parametrize(
    ("source", "text", "error"),
    [(LATE_DEAD_END, b"a" * 40, UsageError), (LATE_EXPLOSION, b"d" * 40 + b"{", ResourceError)],
)
def test_a_sequence_that_fails_fails_alone(
    compiler: GrammarCompiler, source: str, text: bytes, error: type[TokenmillError]
) -> None:
    bad = compiler.start(grammar("lark", source))
    good, other = compiler.start(grammar("regex", "a+")), compiler.start(grammar("regex", "a+"))
    for token in text:
        assert token in mask_of(compiler, bad)
        with contextlib.suppress(ResourceError):  # it may show here already
            bad.accept(token)
    assert mask_of(compiler, good) == mask_of(compiler, other) == [ord("a")]
    with pytest.raises(error):
        mask_of(compiler, bad)
    assert not any(bad.allows(token) for token in range(TOKENS.vocab_size))


def test_a_draft_into_an_error_does_not_fail_the_sequence(compiler: GrammarCompiler) -> None:
    source = LATE_EXPLOSION.replace("start: ", "start: B | ")
    state = compiler.start(grammar("lark", source + "\nB: /d{39}e/"))
    for _ in range(39):
        state.accept(ord("d"))
    before = mask_of(compiler, state)
    mask_RW = np.empty((4, compiler.num_words), np.uint32)
    assert state.masks([ord("d"), ord("{"), ord('"')], mask_RW) == 2
    assert state.num_valid([ord("d"), ord("{"), END]) <= 2
    assert [allowed(row_W) for row_W in mask_RW] == [before, [ord("{")], [END], [END]]
    assert mask_of(compiler, state) == before == [*b"def"]
    state.accept(ord("e"))
    assert mask_of(compiler, state) == [END]


def test_control_tokens_and_padding_are_never_allowed(compiler: GrammarCompiler) -> None:
    state = compiler.start(grammar("lark", 'start: "a" <[*]> "b"'))
    state.accept(ord("a"))
    choices = mask_of(compiler, state)
    assert END not in choices and END + 1 not in choices and max(choices) < len(TOKENS.tokens)
    assert state.num_valid([END + 1]) == state.num_valid([TOKENS.vocab_size - 1]) == 0
    assert not state.allows(END + 1) and not state.allows(TOKENS.vocab_size - 1) and state.allows(choices[0])
    with pytest.raises(UsageError, match="no text can satisfy"):
        compiler.check(grammar("lark", "start: <[257]>"))


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", '{"type":', "is no JSON"),
        ("json_schema", "[1]", "no JSON object or boolean"),
        ("json_schema", '{}}, {"lark_grammar": "start: \\"a\\""', "is no JSON"),
        ("json_schema", {"type": "colour"}, "colour"),
        ("json_schema", {"$ref": "#/$defs/x"}, "does not exist"),
        ("json_schema", {"type": "string", "pattern": "("}, "unclosed group"),
        ("json_schema", {"dependencies": {"a": ["b"]}}, "dependencies"),
        ("json_schema", "[" * 65 + "]" * 65, "no JSON object"),
        ("regex", "a(b", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "a\ud800", "surrogate pair at character 1"),
        ("lark", "start: missing", "missing"),
        ("lark", 'start "a"', r"1\(7\)"),
        ("lark", "start: <nobody>", "cannot"),
    ],
)
def test_bad_grammars_are_refused(
    compiler: GrammarCompiler, kind: GrammarKind, source: object, message: str
) -> None:
    for _ in range(2):
        with pytest.raises(UsageError, match=message) as caught:
            compiler.check(grammar(kind, source))
        assert kind in caught.value.message and len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", "false"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}),
        ("json_schema", {"allOf": [{"type": "string"}, {"type": "number"}]}),
        ("json_schema", {"type": "object", "properties": {"a": False}, "required": ["a"]}),
        ("json_schema", {"$ref": "#"}),
        ("json_schema", {"enum": []}),
        ("regex", "[^\\x00-\\U0010FFFF]"),
        ("lark", 'start: start "a"'),
        ("lark", 'start: "a" x\nx: x "b"'),
    ],
)
def test_what_nothing_satisfies_is_refused(
    compiler: GrammarCompiler, kind: GrammarKind, source: object
) -> None:
    with pytest.raises(UsageError):
        compiler.check(grammar(kind, source))


def test_the_empty_text(compiler: GrammarCompiler) -> None:
    for wanted in (grammar("regex", "()"), grammar("lark", "start:"), grammar("lark", 'start: ""')):
        state = compiler.start(wanted)
        assert mask_of(compiler, state) == [END] and state.num_valid([END, 97]) == 1


def test_schemas_are_bounded_before_they_are_compiled(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler._process, "compile", None)
    limits = compiler.limits
    deep: Any = True
    for _ in range(limits.schema_depth + 1):
        deep = {"not": deep}
    for bad in (deep, {"enum": [1] * limits.schema_values}):
        with pytest.raises(UsageError, match="more than"):
            compiler.check(grammar("json_schema", bad))
    with pytest.raises(UsageError, match="more than"):
        compiler.check(grammar("json_schema", '{"a":' * 5000 + "1" + "}" * 5000))


def test_what_was_compiled_is_kept_for_its_tenant(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    compile_one = compiler._process.compile

    def counted(kind: str, source: str) -> dict[str, Any]:
        asked.append(source)
        return compile_one(kind, source)

    monkeypatch.setattr(compiler._process, "compile", counted)
    wanted = grammar("regex", "kept{3}")
    for tenant in ("a", "a", "b", "a", "b"):
        assert compiler.start(wanted, tenant).num_valid(list(b"kepttt")) == 6
    assert asked == ["kept{3}"] * 2
    for _ in range(2):
        with pytest.raises(UsageError):
            compiler.check(grammar("regex", "(refused"), "a")
    assert asked[2:] == ["(refused"]


def test_a_checked_grammar_outlives_the_cache() -> None:
    limits = GrammarLimits(cache_bytes=1, tenant_bytes=1)
    with GrammarCompiler(TOKENS, TOKENS.vocab_size, [END], limits) as compiler:
        checked = compiler.check(grammar("regex", "ab"))
        assert compiler.cache_bytes == 0
        assert checked.start().num_valid(list(b"abc")) == 2


def test_the_cache_is_bounded_in_bytes_and_by_tenant() -> None:
    cache: TenantCache[int] = TenantCache(max_bytes=10_000, tenant_bytes=4_000)
    for index in range(100_000):
        cache.put(index.to_bytes(4, "big"), index, 1 + index % 700, f"tenant {index % 7}")
        assert index % 100 or cache.num_bytes <= 10_000
    for index in range(1000):
        cache.put(b"x" + index.to_bytes(4, "big"), index, 100, "greedy")
    assert (
        cache.num_bytes <= 10_000
        and sum(cache.get(i.to_bytes(4, "big")) is not None for i in range(100_000)) > 5
    )
    assert [i for i in range(1000) if cache.get(b"x" + i.to_bytes(4, "big")) is not None] == [
        *range(960, 1000)
    ]


def test_the_cache_forgets_the_least_recently_used() -> None:
    cache: TenantCache[str] = TenantCache(max_bytes=30, tenant_bytes=30)
    for key in (b"1", b"2", b"3"):
        cache.put(key, key.decode(), 10, key.decode())
    assert cache.get(b"1") == "1"
    cache.put(b"4", "4", 10, "")
    assert [cache.get(key) for key in (b"1", b"2", b"3", b"4")] == ["1", None, "3", "4"]
    cache.put(b"5", "too large", 31, "")
    assert cache.get(b"5") is None and cache.num_bytes == 30


def test_pieces_are_pieces() -> None:
    """The twin above means nothing if no token is longer than a byte."""
    assert [TOKENS.token_bytes(258 + i).decode() for i in range(len(PIECES))] == list(PIECES)


@pytest.mark.parametrize("source", ['{"type": "array"}', "{}", '  {"type": "array", "minItems": 2} '])
def test_white_space_between_json_tokens_is_bounded(compiler: GrammarCompiler, source: str) -> None:
    state = compiler.start(grammar("json_schema", source))
    for token in b"[" + b" " * 12:
        assert token in mask_of(compiler, state)
        state.accept(token)
    assert ord(" ") not in mask_of(compiler, state)


def test_a_schema_may_say_itself_what_white_space_it_wants(compiler: GrammarCompiler) -> None:
    source = '{"type": "array", "x-guidance": {"whitespace_flexible": false}}'
    state = compiler.start(grammar("json_schema", source))
    state.accept(ord("["))
    assert ord(" ") not in mask_of(compiler, state)
