"""Small vocabularies of every kind, trained on a few lines, so that lines and tests need no download.

Their control tokens are made as easy to reach as in the worst of real files: every one is in the model's own
vocabulary, BPE has merges that lead to it, and Unigram has it with the best score of all.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

__all__ = ["CHATML", "KINDS", "LLAMA_CHAT", "description", "unknown_id"]

_EVERY_TEXT = """\
{%- macro every(value) %}
{%- if value is mapping %}{% for key, item in value.items() %}{{ every(key) ~ every(item) }}{% endfor %}
{%- elif value is string %}{{ bos_token[:-1] ~ value ~ bos_token[1:] }}
{%- elif value is iterable %}{% for item in value %}{{ every(item) }}{% endfor %}{% endif %}
{%- endmacro %}
{{- tools | tojson if tools }}{{ every(tools) }}{{ every(messages) }}
{{- custom }}{{ every(custom) }}{{ every(more) }}
{%- for message in messages if message.tool_calls %}{{ message.tool_calls | tojson }}{% endfor %}
"""
"""Every text of a chat once more, between the two halves of what nearly is a control token."""

CHATML = (
    _EVERY_TEXT
    + "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}" + _EVERY_TEXT + "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% else %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
"""Templates as models have them, with tools, to which `user_fields` gives its variables."""

_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA_TOKENS = ("<unk>", "<s>", "</s>")
_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_LINES = (
    "The mill grinds 1234 tokens a second, and the baker sells them for less than a cent each.",
    "Die Mühle mahlt, der Bäcker backt; größer ist nicht immer besser. Wie spät ist es?",
    "def encode(self, text: str) -> list[int]:\n    return [token for token in self.split(text)]",
    "Мельница мелет муку, пекарь печёт хлеб. 製粉所は小麦を挽く。 제분소는 밀을 빻는다.",
    "<div class='a'>  two  spaces   three</div>\n\n\t{\"key\": [1, 2, 3]}",
    "It's what they'd said: we'll see, we've seen, I'm sure.",
)
_SPACE = "▁"
_UNPREFIXED = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_TEXT_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


@cache
def description(kind: str) -> Mapping[str, Any]:
    """The `tokenizer.json` of one of `KINDS`."""
    return KINDS[kind]()


def unknown_id(tokenizer_json: str) -> int | None:
    """The one control token that a text may lead to: where the vocabulary lacks a character."""
    model = json.loads(tokenizer_json)["model"]
    found = model["unk_id"] if model["type"] == "Unigram" else model["vocab"].get(model["unk_token"])
    return None if found is None else int(found)


def _byte_level() -> dict[str, Any]:
    """As GPT-2's."""
    return _byte_level_parts(pre_tokenizers.ByteLevel(add_prefix_space=False), None, ignore_merges=False)


def _byte_level_words() -> dict[str, Any]:
    """As Llama 3's and Qwen's: words that are tokens are never merged, NFC, a token begins a prompt."""
    split = pre_tokenizers.Split(tokenizers.Regex(r"\s?\S+|\s+"), "isolated")
    whole = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made = _byte_level_parts(whole, normalizers.NFC(), ignore_merges=True)
    return {**made, "post_processor": _begin_with(_CHATML_TOKENS[0], 0)}


def _byte_level_parts(split: Any, normalizer: Any, *, ignore_merges: bool) -> dict[str, Any]:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.normalizer = split, normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        _LINES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    made = _json(inner)
    model = _with_controls(made["model"], _CHATML_TOKENS, ())
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        **made,
        "added_tokens": _added(_CHATML_TOKENS),
        "model": {**model, "ignore_merges": ignore_merges},
        "decoder": decoder,
    }


def _text_bpe(parts: Mapping[str, Any]) -> dict[str, Any]:
    """SentencePiece's BPE with these parts for its spaces."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.train_from_iterator(
        [_SPACE + line.replace(" ", _SPACE) for line in _LINES],
        trainers.BpeTrainer(vocab_size=300, show_progress=False),
    )
    made = _json(inner)
    model = _with_controls(made["model"], _LLAMA_TOKENS, _BYTE_TOKENS)
    model = {**model, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    common = {"added_tokens": _added(_LLAMA_TOKENS), "model": model, "decoder": _TEXT_DECODER}
    return {**made, **common, **parts, "post_processor": _begin_with("<s>", 1)}


def _text_bpe_each() -> dict[str, Any]:
    """As Llama 2's first files: a space in front of every part between control tokens."""
    steps = [{"type": "Prepend", "prepend": _SPACE}, _UNPREFIXED]
    return _text_bpe({"normalizer": {"type": "Sequence", "normalizers": steps}})


def _text_bpe_first() -> dict[str, Any]:
    """As later files: a space in front of the whole text only."""
    return _text_bpe({"pre_tokenizer": _metaspace("first")})


def _text_bpe_bare() -> dict[str, Any]:
    """As Gemma's: no space in front."""
    decoder = {**_TEXT_DECODER, "decoders": _TEXT_DECODER["decoders"][:3]}
    return _text_bpe({"normalizer": _UNPREFIXED, "decoder": decoder})


def _unigram() -> dict[str, Any]:
    """A Unigram vocabulary with byte tokens."""
    return _unigram_parts(None)


def _unigram_nfkc() -> dict[str, Any]:
    """The same behind NFKC, which makes ordinary signs of wide ones."""
    return _unigram_parts({"type": "NFKC"})


def _unigram_parts(normalizer: Mapping[str, Any] | None) -> dict[str, Any]:
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=250, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(_LINES, trainer)
    made = _json(inner)
    pieces = [piece for piece in made["model"]["vocab"] if piece[0] not in _LLAMA_TOKENS]
    reserved = [[text, 0.0] for text in (*_LLAMA_TOKENS, *_BYTE_TOKENS)]
    return {
        **made,
        "added_tokens": _added(_LLAMA_TOKENS),
        "normalizer": normalizer,
        "pre_tokenizer": _metaspace("always"),
        "post_processor": None,
        "decoder": _TEXT_DECODER,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": reserved + pieces, "byte_fallback": True},
    }


def _json(inner: tokenizers.Tokenizer) -> dict[str, Any]:
    return dict(json.loads(inner.to_str()))


def _metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}


def _with_controls(
    model: Mapping[str, Any], controls: Iterable[str], others: Iterable[str]
) -> dict[str, Any]:
    """A BPE model with tokens in front, and merges that lead to the control tokens from single characters."""
    front = [*controls, *others]
    steps = [(text[:size], text[size]) for text in controls for size in range(1, len(text))]
    parts = [part for left, right in steps for part in (left, right, left + right)]
    tokens = dict.fromkeys([*front, *sorted(model["vocab"], key=model["vocab"].get), *parts])
    merges = [*map(list, dict.fromkeys(steps)), *model["merges"]]
    return {**model, "vocab": {token: index for index, token in enumerate(tokens)}, "merges": merges}


def _added(controls: Iterable[str]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": index, "content": text, **flags} for index, text in enumerate(controls)]


def _begin_with(token: str, token_id: int) -> dict[str, Any]:
    first, second = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


KINDS = {
    "byte level": _byte_level,
    "byte level, whole words": _byte_level_words,
    "sentencepiece, each part": _text_bpe_each,
    "sentencepiece, first part": _text_bpe_first,
    "sentencepiece, no space": _text_bpe_bare,
    "unigram": _unigram,
    "unigram, nfkc": _unigram_nfkc,
}
"""How to make each kind of vocabulary."""
