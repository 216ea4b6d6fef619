"""Hostile `tokenizer.json` files: parts, vocabularies, merges and steps that are none, or that explode."""

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from scripts.scorecard.hostile_files import Expected, HostileCase
from scripts.scorecard.hostile_folders import any_of, file_case
from scripts.scorecard.hostile_gguf_kinds import damaged_charsmaps, small_charsmap
from scripts.scorecard.hostile_safetensors import put, sound_folder, take

__all__ = ["hostile_tokenizers"]

_Json = dict[str, Any]


def hostile_tokenizers() -> list[HostileCase]:
    """More than 100 cases."""
    return [*_tokenizers(), *_vocabularies(), *_pipelines(), *_steps(), *_sentencepiece()]


def _tokenizer(
    name: str,
    change: Callable[[_Json], object],
    field: str = "tokenizer.json",
    expected: Expected = "refused",
) -> HostileCase:
    value = json.loads(sound_folder()["tokenizer.json"])
    change(value)
    text = json.dumps(value).encode()
    return file_case("tokenizer", name, "tokenizer.json", text, field, expected)


def _first_control(text: str) -> Callable[[_Json], object]:
    def change(own: _Json) -> None:
        own["added_tokens"][0]["content"] = text

    return change


def _more_tokens(tokens: list[_Json]) -> Callable[[_Json], object]:
    return lambda own: own["added_tokens"].extend(tokens)


def _tokenizers() -> Iterator[HostileCase]:
    """Parts that are missing or of another type, and added tokens that collide."""
    for key in (
        "version",
        "truncation",
        "padding",
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "model",
    ):
        for value in any_of(1, "x", [1], {"type": "Nobody"}, {"type": 1}):
            expected: Expected = "either" if key == "version" else "refused"
            yield _tokenizer(f"{key} is {value!r}", put({key: value}), expected=expected)
    yield from (_tokenizer(f"without {key}", take(key)) for key in ("pre_tokenizer", "decoder", "model"))
    for content in ("", "a", "\u0120", " "):
        yield _tokenizer(
            f"a control token {content!r}",
            _first_control(content),
            expected="either",
        )
    for number in (-1, 1.5, "1", 100_000, 2**31, 2**32 - 1, 2**63, 10**30):
        added = {"id": number, "content": "<evil>", "single_word": False, "lstrip": False}
        added |= {"rstrip": False, "normalized": False, "special": True}
        yield _tokenizer(f"an added token {number}", _more_tokens([added]), expected="either")
    extra = [{**added, "id": 300 + at, "content": f"<{at}>"} for at in range(5000)]
    yield _tokenizer("5,000 control tokens", _more_tokens(extra))
    for size in (5000, 1 << 20):
        name, content = f"an added token of {size} characters", "x" * size
        yield _tokenizer(name, _first_control(content))
    for value in (
        {"max_length": 2**63 - 1, "strategy": "LongestFirst", "stride": 2**40, "direction": "Right"},
    ):
        yield _tokenizer("endless truncation", put({"truncation": value}), expected="either")
    padding = {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": 2**40}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    yield _tokenizer("endless padding", put({"padding": padding}), expected="loads")


def _vocabularies() -> Iterator[HostileCase]:
    """Vocabulary and merges of the model."""
    own: _Json = json.loads(sound_folder()["tokenizer.json"])
    last = list(own["model"]["vocab"])[-1]

    def case(name: str, expected: Expected = "refused", **changes: Any) -> HostileCase:
        return _tokenizer(name, put(changes, "model"), expected=expected)

    vocab: dict[str, Any] = own["model"]["vocab"]
    for value in (-1, 1.5, "1", None, 2**31, 2**32 - 1, 2**32, 10**30, 263, 100_000):
        yield case(f"a token with the id {value!r}", vocab={**vocab, last: value})
    yield case("two tokens of one id", "either", vocab={**vocab, last: 5})
    yield case("an empty vocabulary", vocab={})
    yield case("a vocabulary that is a list", vocab=[["a", 0]])
    yield case(
        "a token of no bytes",
        "refused",
        vocab={**{k: v for k, v in vocab.items() if k != last}, "\u4e16": vocab[last]},
    )
    yield case("9,000 tokens more", vocab={**vocab, **{f"t{at}": 300 + at for at in range(9000)}})
    merges: list[Any] = own["model"]["merges"]
    broken: list[Any] = [
        "he",
        "h e l",
        "",
        ["h"],
        ["h", "e", "l"],
        [],
        1,
        None,
        {},
        ["zz", "qq"],
        "zz qq",
        ["h", 1],
    ]
    for value in broken:
        yield case(f"a merge {value!r}", merges=[*merges, value])
    for kind in ("WordPiece", "WordLevel", "Unigram", "BPE2"):
        yield case(f"a model of kind {kind}", type=kind)
    settings: tuple[tuple[str, Any], ...] = (
        ("byte_fallback", "x"),
        ("dropout", 2.0),
        ("dropout", 0.5),
        ("unk_token", 1),
        ("fuse_unk", []),
    )
    for key, value in settings:
        expected: Expected = "refused" if key == "dropout" else "either"  # it makes encoding random
        yield case(f"{key} is {value!r}", expected, **{key: value})
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        yield case(f"{key} of 100,000", "either", **{key: "#" * 100_000})


def _pipelines() -> Iterator[HostileCase]:
    """Steps that change text, that are nested without end, or whose patterns explode."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

    def split(pattern: str) -> Callable[[_Json], object]:
        step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        steps = {"type": "Sequence", "pretokenizers": [step, {**byte_level, "use_regex": False}]}
        return put({"pre_tokenizer": steps})

    patterns = (
        "(",
        "[",
        "(?P<x>a)(?P<x>b)",
        r"\p{Nobody}",
        "a{99999999}",
        "(a{1000}){1000}",
        "(" * 5000 + ")" * 5000,
    )
    for pattern in patterns:
        expected: Expected = "either" if "1000" in pattern else "refused"
        yield _tokenizer(f"a pattern {pattern[:30]}", split(pattern), expected=expected)
    for pattern in ("(a+)+$", "(.*)*x", "(?:(?:a|a)*)*b", "(x+x+)+y", r"(\w+\s?)*$"):
        yield _tokenizer(f"a slow pattern {pattern}", split(pattern), expected="either")
    for depth in (10, 120, 1000, 100_000):
        text = (
            b'{"type":"Sequence","pretokenizers":[' * depth + json.dumps(byte_level).encode() + b"]}" * depth
        )
        own = sound_folder()["tokenizer.json"].decode()
        value = json.loads(own)
        value["pre_tokenizer"] = "HERE"
        content = json.dumps(value).encode().replace(b'"HERE"', text)
        expected = "either" if depth < 128 else "refused"
        yield file_case(
            "tokenizer", f"steps nested {depth} deep", "tokenizer.json", content, "tokenizer.json", expected
        )


def _steps() -> Iterator[HostileCase]:
    """Steps that change text."""
    normalizers: list[_Json] = [
        {"type": "Lowercase"},
        {"type": "StripAccents"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
    ]
    normalizers += [
        {"type": "Replace", "pattern": {"String": "e"}, "content": "x" * 100},
        {"type": "Prepend", "prepend": "\u2581"},
    ]
    normalizers += []
    for step in normalizers:
        yield _tokenizer(
            f"normalizer {json.dumps(step)[:50]}",
            put({"normalizer": step}),
            expected="either",
        )
    decoders: list[_Json] = [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Fuse"},
        {"type": "ByteFallback"},
    ]
    for step in decoders:
        yield _tokenizer(f"decoder {step['type']}", put({"decoder": step}))
    for kind in ("Metaspace", "Whitespace", "BertPreTokenizer", "CharDelimiterSplit"):
        step = {
            "type": kind,
            "replacement": "\u2581",
            "prepend_scheme": "always",
            "split": True,
            "delimiter": "x",
        }
        yield _tokenizer(f"pre-tokenizer {kind}", put({"pre_tokenizer": step}))
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
        "pair": [],
    }
    yield _tokenizer(
        "a post-processor of unknown tokens",
        put({"post_processor": {**post, "special_tokens": {}}}),
        expected="either",
    )


def _sentencepiece() -> Iterator[HostileCase]:
    """Unigram and BPE vocabularies of SentencePiece: scores, byte tokens, tables of characters."""
    yield _pieces("a Unigram vocabulary", expected="loads")
    for text in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", '"1"', "null", "[]", "-0.0"):
        for at in (1, 259):
            yield _pieces(f"a piece of score {text} at {at}", scores={at: text}, expected="either")
    for number in ("-1", "263", "1000", "4294967296", "18446744073709551616", "1.5", '"<unk>"', "null"):
        yield _pieces(f"the unknown token {number}", unknown=number, expected="either")
    yield _pieces("a piece twice", names={260: "a", 261: "a"}, expected="either")
    yield _pieces("an empty piece", names={260: ""}, expected="either")
    yield _pieces(
        "bytes in reverse", names={3 + at: f"<0x{255 - at:02X}>" for at in range(256)}, expected="loads"
    )
    for name in ("<0x100>", "<0xZZ>", "<0x4>"):
        yield _pieces(f"a byte named {name}", names={68: name}, expected="either")
    sound = base64.b64encode(small_charsmap()).decode()
    yield _pieces("a sound table", table=f'"{sound}"', expected="loads")
    key = r'"precompiled\u005fcharsmap"'
    for name, table in damaged_charsmaps().items():
        text = f'"{base64.b64encode(table).decode()}"'
        yield _pieces(f"a table {name}", table=text, field="precompiled_charsmap")
        yield _pieces(f"a table {name}, in hiding", table=text, key=key, field="precompiled_charsmap")
    for text in ('"!!"', '"AAA"', '"\u0041AAA"', "1", "null", "[1, 2]", '"' + "A" * 9999 + '"'):
        yield _pieces(f"a table {text[:20]}", table=text)


def _pieces(
    name: str,
    *,
    scores: Mapping[int, str] | None = None,
    names: Mapping[int, str] | None = None,
    unknown: str = "0",
    table: str = "",
    key: str = '"precompiled_charsmap"',
    field: str = "tokenizer.json",
    expected: Expected = "refused",
) -> HostileCase:
    """A Unigram vocabulary of 263 pieces, written by hand, since JSON of Python has no such numbers."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab"]
    pieces = [
        f"[{json.dumps((names or {}).get(at, text))}, {(scores or {}).get(at, '0.0' if at < 3 else '-1.5')}]"
        for at, text in enumerate(texts)
    ]
    added = [{"id": at, "content": texts[at], "special": True, "normalized": False} for at in range(3)]
    for each in added:
        each |= {"single_word": False, "lstrip": False, "rstrip": False}
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    steps = [{"type": "ByteFallback"}, {"type": "Fuse"}, space]
    normalizer = f'{{"type": "Precompiled", {key}: {table}}}' if table else "null"
    text = (
        f'{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": {json.dumps(added)},'
        f'"normalizer": {normalizer}, "pre_tokenizer": {json.dumps(space)}, "post_processor": null,'
        f'"decoder": {json.dumps({"type": "Sequence", "decoders": steps})},'
        f'"model": {{"type": "Unigram", "unk_id": {unknown}, "byte_fallback": true, '
        f'"vocab": [{", ".join(pieces)}]}}}}'
    )
    return file_case("tokenizer", f"pieces: {name}", "tokenizer.json", text.encode(), field, expected)
