"""Who owns which block of the KV cache, in pure integers: no tensor, no byte of the cache is here."""

from tokenmill.kvcache.pool import BlockPool
from tokenmill.kvcache.prefix import PrefixChain, prefix_root
from tokenmill.kvcache.table import BlockTable

__all__ = ["BlockPool", "BlockTable", "PrefixChain", "prefix_root"]
