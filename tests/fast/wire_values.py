"""Random calls, replies and streams, within what each API can say."""

from typing import Any

import msgspec
from hypothesis import strategies as st

from tokenmill.core import Grammar, Message, SamplingParams, ToolCall, Usage
from tokenmill.wire import (
    Begin,
    Call,
    CallText,
    Choice,
    Finish,
    Piece,
    Reply,
    TextPiece,
    TokenText,
    ToolChoice,
    ToolPiece,
    Totals,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WORD = st.text("abcXYZ_09", min_size=1, max_size=8)
NUMBER = st.floats(-10.0, 10.0)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-9999, 9999) | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)


def compact(value: Any) -> str:
    """As the codec spells it: JSON has several spellings of a number."""
    return msgspec.json.encode(value).decode()


def pick(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


def _tool_name(tool: Any) -> str:
    return str(tool["function"]["name"])


TOOLS: st.SearchStrategy[list[dict[str, Any]]] = st.lists(
    st.builds(
        lambda name, rest: {"type": "function", "function": {"name": name, **rest}},
        WORD,
        pick(description=TEXT, parameters=OBJECT, strict=st.booleans()),
    ),
    max_size=2,
    unique_by=_tool_name,
)
SCHEMA = st.builds(lambda value: Grammar(kind="json_schema", source=compact(value)), OBJECT)
GRAMMARS = (
    SCHEMA
    | st.just(Grammar(kind="json_object"))
    | st.builds(lambda text: Grammar(kind="regex", source=text), WORD)
    | st.builds(lambda text: Grammar(kind="lark", source=text), WORD)
)
COMMON = {
    "max_tokens": st.integers(5, 999),
    "temperature": st.floats(0.0, 1.0),
    "top_p": st.floats(0.01, 1.0),
    "top_k": st.integers(0, 99),
    "stop": st.lists(TEXT.filter(bool), max_size=2).map(tuple),
}
PARAMS = pick(
    **COMMON,
    min_tokens=st.integers(0, 5),
    min_p=st.floats(0.0, 1.0),
    repetition_penalty=st.floats(0.5, 2.0),
    presence_penalty=st.floats(-2.0, 2.0),
    frequency_penalty=st.floats(-2.0, 2.0),
    logit_bias=st.dictionaries(st.integers(0, 99), NUMBER, max_size=2).map(lambda each: tuple(each.items())),
    seed=st.integers(0, 2**63 - 1),
    n=st.integers(1, 8),
    stop_token_ids=st.lists(st.integers(0, 99), max_size=2).map(tuple),
    bad_words=st.lists(TEXT.filter(bool), max_size=2).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.integers(0, 20),
    prompt_logprobs=st.integers(0, 20),
    grammar=GRAMMARS,
).map(lambda fields: SamplingParams(**fields))
ANTHROPIC_PARAMS = pick(**COMMON, grammar=SCHEMA).map(lambda fields: SamplingParams(**fields))


def tool_choices(tools: list[Any]) -> st.SearchStrategy[ToolChoice]:
    """Those that make sense with these tools, or the plain one without any."""
    if not tools:
        return st.just(ToolChoice())
    names = [tool["function"]["name"] for tool in tools]
    modes = st.sampled_from(["auto", "none", "required"])
    plain = st.builds(lambda mode, parallel: ToolChoice(mode=mode, parallel=parallel), modes, st.booleans())
    named = st.sampled_from(names).map(lambda name: ToolChoice(mode="named", name=name))
    return plain | named


CALLS_OF_TOOLS = st.lists(
    st.builds(
        lambda name, call_id, value: ToolCall(name=name, id=call_id, arguments=compact(value)),
        WORD,
        WORD,
        OBJECT,
    ),
    max_size=2,
).map(tuple)


def _assistant(text: str | None, calls: tuple[ToolCall, ...]) -> Message:
    return Message(role="assistant", content=text if text or not calls else None, tool_calls=calls)


USERS = TEXT.map(lambda text: Message(role="user", content=text))
ASSISTANTS = st.builds(_assistant, TEXT, CALLS_OF_TOOLS)
RESULTS = st.builds(lambda text, name: Message(role="tool", content=text, tool_call_id=name), TEXT, WORD)
SYSTEMS = TEXT.filter(bool).map(lambda text: Message(role="system", content=text))
NAMED = st.builds(lambda text, name: Message(role="user", content=text, name=name), TEXT, WORD)
CONVERSATIONS = st.lists(USERS | ASSISTANTS | RESULTS | SYSTEMS | NAMED, min_size=1, max_size=4).map(tuple)
ANTHROPIC_CONVERSATIONS = st.builds(
    lambda system, turns: (*system, *turns),
    st.lists(SYSTEMS, max_size=1),
    st.lists(USERS | ASSISTANTS | RESULTS, min_size=1, max_size=4),
)


@st.composite
def chats(draw: st.DrawFn, *, anthropic: bool = False) -> Call:
    """Conversations to answer."""
    tools = draw(TOOLS)
    if anthropic:
        tools = [tool for tool in tools if "parameters" in tool["function"]]
    is_stream = draw(st.booleans())
    extra: dict[str, Any] = (
        {}
        if anthropic
        else {
            "tier": draw(st.sampled_from(["fast", None, "batch"])),
            "metadata": draw(st.dictionaries(WORD, TEXT, max_size=2)),
            "variables": draw(OBJECT),
            "include_usage": is_stream and draw(st.booleans()),
        }
    )
    return Call(
        model=draw(WORD),
        messages=draw(ANTHROPIC_CONVERSATIONS if anthropic else CONVERSATIONS),
        params=draw(ANTHROPIC_PARAMS if anthropic else PARAMS),
        tools=tuple(tools),
        tool_choice=draw(tool_choices(tools)),
        stream=is_stream,
        user=draw(TEXT),
        **({"include_usage": is_stream} | extra),
    )


TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3).map(tuple)
PROMPTS = st.lists(TEXT, min_size=1, max_size=3).map(tuple) | st.lists(TOKENS, min_size=1, max_size=3).map(
    tuple
)
COMPLETIONS = st.builds(
    lambda model, prompts, params, echo: Call(model=model, prompts=prompts, params=params, echo=echo),
    WORD,
    PROMPTS,
    PARAMS,
    st.booleans(),
)
USAGES = st.builds(
    lambda prompt, share, output: Usage(
        num_prompt_tokens=prompt, num_cached_tokens=int(prompt * share), num_output_tokens=output
    ),
    st.integers(0, 9999),
    st.floats(0.0, 1.0),
    st.integers(0, 9999),
)
TOPS = st.dictionaries(TEXT, NUMBER, max_size=2).map(lambda top: tuple(top.items()))
TOKEN_TEXTS = st.lists(st.builds(TokenText, TEXT, NUMBER, TOPS), min_size=1, max_size=3).map(tuple)
ENDS: st.SearchStrategy[tuple[Any, str]] = st.tuples(
    st.sampled_from(["completed", "length"]), st.just("")
) | st.tuples(st.just("stopped"), WORD)


@st.composite
def replies(draw: st.DrawFn, kind: str) -> Reply:
    """Replies of `chat`, `text` or `anthropic`."""
    choices = []
    for index in range(1 if kind == "anthropic" else draw(st.integers(1, 3))):
        finish, stop = draw(ENDS)
        calls = (
            ()
            if kind == "text"
            else tuple(CallText(call.id, call.name, call.arguments) for call in draw(CALLS_OF_TOOLS))
        )
        choice = Choice(
            index=index,
            text=draw(TEXT),
            finish_reason=finish,
            stop=stop,
            tool_calls=calls,
            thoughts="" if kind == "text" else draw(TEXT),
            logprobs=None if kind == "anthropic" else draw(st.none() | TOKEN_TEXTS),
        )
        choices.append(choice)
    created = 0 if kind == "anthropic" else draw(st.integers(0, 2**31))
    return Reply(id=draw(WORD), model=draw(WORD), choices=tuple(choices), usage=draw(USAGES), created=created)


@st.composite
def streams(draw: st.DrawFn, kind: str) -> list[Piece]:
    """The pieces of one answer in order."""
    texts = st.builds(TextPiece, TEXT.filter(bool))
    if kind != "text":
        texts |= st.builds(lambda text: TextPiece(text, is_thought=True), TEXT.filter(bool))
    if kind != "anthropic":
        texts |= st.builds(lambda text, tokens: TextPiece(text, logprobs=tokens), TEXT, TOKEN_TEXTS)
    pieces: list[Piece] = [Begin(draw(WORD), draw(WORD), 0 if kind == "anthropic" else 5)]
    pieces += draw(st.lists(texts, max_size=4))
    for position in range(0 if kind == "text" else draw(st.integers(0, 2))):
        pieces.append(ToolPiece(position, draw(WORD), draw(WORD)))
        pieces += [ToolPiece(position, arguments=text) for text in draw(st.lists(WORD, max_size=2))]
    finish, stop = draw(ENDS)
    return [*pieces, Finish(finish, stop=stop), Totals(draw(USAGES))]
