"""Calls in a model's text are found however the text is split, what is none stays text, nothing raises."""

import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.core import Grammar, Message, ToolCall
from tokenmill.engine.structured.grammar import GrammarCompiler
from tokenmill.models.chat.template import ChatTemplate
from tokenmill.models.chat.tool_calls import ToolFormat
from tokenmill.models.chat.tool_reader import ToolReader
from tokenmill.models.text.byte_tokenizer import ByteTokenizer
from tokenmill.wire import TextPiece, ToolChoice

HERMES = ("<tool_call>", "</tool_call>")
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"],
        "additionalProperties": False, "$defs": {"city": {"enum": ["Rome", "Oslo"]}}}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip
TEMPLATES = {
    "hermes": "{% if tools %}<tool_call>{% endif %}",
    "mistral": "{% if tools %}[AVAILABLE_TOOLS][TOOL_CALLS]{% endif %}",
    "llama": "{% if tools %}Environment: ipython {'parameters'}<|python_tag|>{% endif %}",
}
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"
ROME = '{"city": "Rome"}'
TWO = [ROME, "{}"]


def read(
    pieces: Sequence[str], marks: tuple[str, str] = HERMES, *, parallel: bool = True
) -> tuple[str, list[tuple[str, str, str]]]:
    """The text, and the calls as (id, name, arguments)."""
    ids = map(str, itertools.count())
    reader = ToolReader(marks, {"weather", "now"}, parallel=parallel, new_id=lambda: next(ids))
    out = [piece for text in pieces for piece in reader.feed(text)] + reader.end()
    calls: dict[int, list[str]] = {}
    for piece in out:
        if not isinstance(piece, TextPiece):
            parts = calls.setdefault(piece.position, ["", "", ""])
            for at, part in enumerate((piece.id, piece.name, piece.arguments)):
                parts[at] += part
    text = "".join(piece.text for piece in out if isinstance(piece, TextPiece))
    return text, [(parts[0], parts[1], parts[2]) for parts in calls.values()]


def found(text: str, marks: tuple[str, str] = HERMES) -> tuple[str, list[tuple[str, str]]]:
    said, calls = read([text], marks)
    return said, [(name, arguments) for _, name, arguments in calls]


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<tool", "_call>", "\n", " ", "{", "}", "[", "]", '"',
    "\\", ",", ":", ";", '{"name": "weather"', '"arguments": ', '"name": ', '"weather"', ROME, "text", "🌍",
    "1", "null",
    hermes("weather", ROME), '{"name": "now", "arguments": {}}', '{"city": "R}{\\""}',
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.data(), st.sampled_from([HERMES, ("[TOOL_CALLS]", ""), ("", "")]))
def test_splits_change_nothing(text: str, data: st.DataObject, marks: tuple[str, str]) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    whole = read([text], marks)
    assert read(pieces, marks) == whole
    assert read(list(text), marks) == whole


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_text_without_calls_is_left_as_it_is(text: str) -> None:
    said, calls = read([text])
    if not calls:
        assert said == text


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8), st.text(max_size=20) | st.integers() | st.lists(st.text(max_size=5))
    ),
    st.sampled_from([None, 1, 2]),
)
def test_arguments_come_as_they_were_written(arguments: dict[str, Any], indent: int | None) -> None:
    written = json.dumps(arguments, indent=indent, ensure_ascii=False)
    assert found(hermes("weather", written)) == ("", [("weather", written)])
    assert found(f'{{"name": "weather", "parameters": {written}}}') == ("", [("weather", written)])


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (f"I look.\n\n{hermes('now', '{}')}\n{hermes('weather', ROME)}", "I look.", ["{}", ROME]),
        (f"{hermes('weather', ROME)}\nDone.", "Done.", [ROME]),
        (
            f'[{{"name": "weather", "arguments": {ROME}}}, {{"name": "now", "arguments": {{}}}}]',
            "",
            [ROME, "{}"],
        ),
        (
            f'{{"name": "weather", "parameters": {ROME}}}; {{"name": "now", "parameters": {{}}}}',
            "",
            [ROME, "{}"],
        ),
        ('{"type": "function", "name": "now", "arguments": "{\\"a\\": 1}"}', "", ['{"a": 1}']),
        (f'<tool_call>{{"arguments": {ROME}, "name": "weather"}}</tool_call>', "", [ROME]),
        ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', "", ["{}"]),
        ('<tool_call>{"name": "now"}</tool_call>', "", ["{}"]),
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Ro', "", ['{"city": "Ro']),
        (hermes("now", "{}")[:-5], "", ["{}"]),
        ('{"name": "Bob", "age": 3}', None, []),
        ('{"name": "unknown", "arguments": {}}', None, []),
        ('{"city": "Rome"}', None, []),
        ("[1, 2, 3]", None, []),
        ('Say {"name": "now", "arguments": {}} to me', None, []),
        ("<tool_call>no</tool_call>", None, []),
        ('<tool_call>{"name": "now", oops', None, []),
        ("a < b and <tool_calls", None, []),
        ("  \n", None, []),
    ],
)
def test_what_is_a_call(text: str, said: str | None, calls: list[str]) -> None:
    text_found, calls_found = found(text)
    assert text_found == (text if said is None else said)
    assert [arguments for _, arguments in calls_found] == calls


def test_only_one_call_where_one_is_wanted() -> None:
    text = hermes("now", "{}") + "\nand\n" + hermes("weather", ROME)
    assert read([text], parallel=False)[1] == [("0", "now", "{}")]
    assert read(list(text), parallel=False) == read([text], parallel=False)


@pytest.mark.parametrize(
    "text",
    ["{\n" * 20_000, "<tool_call>" * 4_000, " " * 40_000, "[" * 40_000, '{"name": "' + "x" * 40_000,
     hermes("now", '{"a": "' + "\\\\" * 20_000 + '"}'), "\n" * 20_000 + "{", "<tool_call" * 4_000],
)  # fmt: skip
def test_long_nonsense_takes_no_long_time(text: str) -> None:
    begun_s = time.process_time()
    read([text])
    assert time.process_time() - begun_s < 1.0


# Formats.


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_template_says_the_format(kind: str) -> None:
    assert ToolFormat.of(ChatTemplate(TEMPLATES[kind])) == ToolFormat(kind=kind, in_template=True)  # type: ignore[arg-type]


def test_a_template_without_tools_is_plain() -> None:
    assert ToolFormat.of(ChatTemplate(PLAIN)) == ToolFormat(kind="plain", in_template=False)


def test_tools_are_told_where_the_template_has_no_place() -> None:
    messages = [
        Message(role="user", content="Weather?"),
        Message(role="assistant", tool_calls=(ToolCall(id="a", name="weather", arguments=ROME),)),
        Message(role="tool", content="18 degrees", tool_call_id="a"),
        Message(role="user", content="And now?"),
    ]
    plain = ToolFormat(kind="plain", in_template=False)
    told, tools = plain.conversation(messages, TOOLS, ToolChoice(mode="required"))
    assert tools == ()
    assert [message.role for message in told] == ["system", "user", "assistant", "user"]
    assert '"name": "weather"' in (told[0].content or "") and "Call a function now." in (
        told[0].content or ""
    )
    assert found(told[2].content or "") == ("", [("weather", ROME)])
    assert told[3].content == "Result of weather: 18 degrees\nAnd now?"
    assert ToolFormat(kind="hermes", in_template=True).conversation(messages, TOOLS, ToolChoice())[
        0
    ] == tuple(messages)


WRITTEN = {
    "hermes": ('<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', "\n"),
    "llama": ('{"name": "weather", "parameters": {"city": "Rome"}}', "; "),
    "plain": ('{"name": "weather", "arguments": {"city": "Rome"}}', "\n"),
}


@pytest.mark.parametrize("kind", [*WRITTEN, "mistral"])
def test_required_calls_are_what_the_reader_reads(kind: Any) -> None:
    format_ = ToolFormat(kind=kind, in_template=True)
    one, between = WRITTEN.get(kind, (WRITTEN["plain"][0], ", "))
    around = ("[", "]") if kind == "mistral" else ("", "")
    two = around[0] + one + between + one + around[1]
    one = around[0] + one + around[1]
    with GrammarCompiler(ByteTokenizer(), 257, [256]) as compiler:

        def fits(choice: ToolChoice, text: str, answer: Grammar | None = None) -> bool:
            grammar = format_.grammar(TOOLS, choice, answer)
            assert grammar is not None
            tokens = [*text.encode(), 256]
            return compiler.start(grammar).num_valid(tokens) == len(tokens)

        required, single = ToolChoice(mode="required"), ToolChoice(mode="required", parallel=False)
        assert fits(required, one) and fits(required, two)
        assert fits(single, one) and not fits(single, two)
        assert fits(ToolChoice(mode="named", name="weather"), one)
        assert not fits(ToolChoice(mode="named", name="now"), one)
        assert not fits(required, one.replace("Rome", "Paris")) and not fits(required, "Hello")
        assert fits(ToolChoice(), one, Grammar(kind="json_object")) and fits(
            ToolChoice(), "{}", Grammar(kind="json_object")
        )
    reader = format_.reader(TOOLS, index=0, parallel=True)
    pieces = [*reader.feed(two), *reader.end()]
    assert not any(isinstance(piece, TextPiece) for piece in pieces)
    assert reader.num_calls == 2
    assert format_.grammar(TOOLS, ToolChoice(), None) is None


def test_control_pieces_read_alone_lose_a_call() -> None:
    """What the property above would find in a reader that keeps nothing between pieces."""
    pieces = list(hermes("weather", ROME))
    assert read(pieces)[1] and not any(read([piece])[1] for piece in pieces)


def test_control_without_a_grammar_no_call_is_required() -> None:
    format_ = ToolFormat(kind="hermes", in_template=True)
    assert format_.grammar(TOOLS, ToolChoice(mode="none"), None) is None
    assert format_.grammar(TOOLS, ToolChoice(mode="auto"), None) is None
