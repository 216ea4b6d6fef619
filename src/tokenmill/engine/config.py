"""How a model is run: the sizes and switches of an engine, checked where they are written down."""

from dataclasses import dataclass

from tokenmill.core import UsageError
from tokenmill.kernels import KV_BLOCK
from tokenmill.models.architecture import Architecture
from tokenmill.models.pack import WEIGHT_FORMATS, WeightFormat

__all__ = ["LLMConfig"]

_DEFAULT_KV_BYTES = 2 << 30
_MAX_ROWS = 1 << 16
_MAX_BATCH = 1 << 12


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """How a model is run.

    One step computes at most `max_rows` tokens, of at most `max_batch` sequences. `kv_tokens` is the size
    of the KV cache; by default 2 GiB of it, or less if `max_batch` full contexts need less (memory is
    touched only as it fills). `max_waiting` bounds the queue. `prefix_cache` keeps what was computed for the
    requests that begin with the same tokens. `num_threads` None leaves the choice to the executor.
    """

    weights: WeightFormat = "w8a8"
    max_rows: int = 512
    max_batch: int = 64
    max_waiting: int = 1 << 16
    num_threads: int | None = None
    kv_tokens: int | None = None
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_FORMATS:
            raise UsageError(f"weights is {self.weights!r}", hint=f"use one of {', '.join(WEIGHT_FORMATS)}")
        _check("max_rows", self.max_rows, 1, _MAX_ROWS)
        _check("max_batch", self.max_batch, 1, _MAX_BATCH)
        _check("max_waiting", self.max_waiting, 1, 1 << 24)
        if self.num_threads is not None:
            _check("num_threads", self.num_threads, 1, 1024)
        if self.kv_tokens is not None:
            _check("kv_tokens", self.kv_tokens, KV_BLOCK, 1 << 31)

    def num_blocks(self, architecture: Architecture) -> int:
        """KV blocks for a model of this architecture."""
        if self.kv_tokens is not None:
            return -(-self.kv_tokens // KV_BLOCK)
        affordable = _DEFAULT_KV_BYTES // (KV_BLOCK * architecture.kv_bytes_per_token())
        useful = self.max_batch * -(-architecture.max_positions // KV_BLOCK)
        return max(1, min(affordable, useful))


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}", hint=f"use a value from {low} to {high}")
