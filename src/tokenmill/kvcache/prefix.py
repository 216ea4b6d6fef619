"""Names for the content of KV blocks: a SHA-256 chain over everything that decides what is in them.

    root = H(tenant, model, layout, adapter, intervention)      key of block i = H(key of block i-1, tokens)

Fields are tagged and length-prefixed, so no two different lists of fields give the same bytes. Two
blocks with one key hold the same keys and values; another tenant, model, cache layout, adapter or
intervention gives another chain, and nothing is shared across.
"""

import hashlib
from array import array

__all__ = ["PrefixChain", "prefix_root"]


def prefix_root(*, tenant: str, model: str, layout: str, adapter: str, intervention: str) -> bytes:
    """Where the chain of a sequence begins."""
    digest = hashlib.sha256(b"tokenmill prefix 1")
    fields = {"tenant": tenant, "model": model, "layout": layout, "adapter": adapter, "edit": intervention}
    for tag, value in fields.items():
        data = value.encode("utf-8", "surrogatepass")
        digest.update(f"{tag}:{len(data)}:".encode())
        digest.update(data)
    return digest.digest()


class PrefixChain:
    """The keys of one sequence's full blocks, made as far as they are asked for."""

    def __init__(self, root: bytes, block_size: int) -> None:
        self._root = root
        self._block_size = block_size
        self._keys: list[bytes] = []

    def tokens_of(self, index: int, tokens: "array[int]") -> bytes:
        """The tokens of block `index`, as they are hashed and compared."""
        return tokens[index * self._block_size : (index + 1) * self._block_size].tobytes()

    def key(self, index: int, tokens: "array[int]") -> bytes:
        """The key of block `index` of a sequence with these tokens; the block is full of them."""
        assert (index + 1) * self._block_size <= len(tokens), f"block {index} is not full"
        while len(self._keys) <= index:
            before = self._keys[-1] if self._keys else self._root
            content = self.tokens_of(len(self._keys), tokens)
            self._keys.append(hashlib.sha256(before + content).digest())
        return self._keys[index]
