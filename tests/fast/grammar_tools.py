"""Vocabularies and samplers for the tests of grammars."""

import random
from collections.abc import Sequence

import numpy as np

from tokenmill.engine.structured.grammar import GrammarState, U32Array

__all__ = ["END", "PIECES", "PieceTokens", "allowed", "random_tokens"]

END = 256
PIECES = ("ab", "bc", "abc", "ca", '": ', '", "', "true", "  ", "é")


class PieceTokens:
    """One token a byte, then two control tokens, then longer pieces; ids from there on are padding."""

    def __init__(self, pieces: Sequence[str] = PIECES) -> None:
        self.tokens = [bytes([i]) for i in range(256)] + [b"<end>", b"<start>"]
        self.tokens += [piece.encode() for piece in pieces]
        self.vocab_size = len(self.tokens) + 7

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id] if token_id < len(self.tokens) else b""

    def is_special(self, token_id: int) -> bool:
        return token_id in (END, END + 1)

    def encode_after(self, text: str) -> list[int]:
        return list(text.encode())


def allowed(mask_W: U32Array) -> list[int]:
    """Token ids whose bit is set."""
    return [int(i) for i in np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))]


def random_tokens(
    state: GrammarState, num_words: int, rng: random.Random, prefer: Sequence[int] = (), most: int = 400
) -> list[int]:
    """Random allowed tokens up to the end token, with those of `prefer` chosen often."""
    mask_W = np.empty(num_words, np.uint32)
    tokens: list[int] = []
    while len(tokens) < most:
        state.fill_mask(mask_W)
        choices = allowed(mask_W)
        likely = [each for each in choices if each in prefer]
        tokens.append(rng.choice(likely if likely and rng.random() < 0.5 else choices))
        state.accept(tokens[-1])
        if tokens[-1] == END:
            break
    return tokens
