"""A tokenizer that needs no file: one token a byte, and one control token that ends an answer.

For tests and for the mock engine: any text is encodable, the ids can be read by eye (`ord` of the byte),
and a character of several bytes spans several tokens, as it may in a real vocabulary. It is built from
the same parts as a model's tokenizer, so whatever takes a `Tokenizer` takes it.
"""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tokenmill.models.text.tokenizer import Tokenizer

__all__ = ["BYTE_VOCAB_SIZE", "END_TEXT", "END_TOKEN", "ByteTokenizer"]

END_TOKEN = 256
"""The id of the control token; ids below it are bytes."""

END_TEXT = "<end>"
BYTE_VOCAB_SIZE = 257


class ByteTokenizer(Tokenizer):
    """Token id = byte; `END_TOKEN` is the only control token, written `<end>` in templates."""

    def __init__(self) -> None:
        stand_ins = sorted(pre_tokenizers.ByteLevel.alphabet())
        # Printable Latin-1 stands for itself; the other bytes, in order, for the characters from U+0100.
        printable = [char for char in stand_ins if ord(char) < 0x100]
        others = sorted(set(range(256)) - {ord(char) for char in printable})
        vocabulary = {char: ord(char) for char in printable}
        vocabulary |= dict(zip(stand_ins[len(printable) :], others, strict=True))
        inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([tokenizers.AddedToken(END_TEXT, special=True, normalized=False)])
        super().__init__(inner, "byte tokenizer")
