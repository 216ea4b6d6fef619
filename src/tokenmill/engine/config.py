"""How a model is run: the sizes and switches of an engine, checked where they are written down."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from tokenmill.core import UsageError
from tokenmill.engine.core import GuessesFor
from tokenmill.kernels import KV_BLOCK, KV_DTYPES, KvDtype
from tokenmill.models.architecture import Architecture
from tokenmill.models.packing.pack import WEIGHT_FORMATS, WeightFormat

__all__ = ["SPECULATIONS", "LLMConfig", "Speculation"]

Speculation: TypeAlias = Literal["off", "lookup"]

SPECULATIONS: tuple[Speculation, ...] = get_args(Speculation)

_DEFAULT_KV_BYTES = 2 << 30
_MAX_ROWS = 1 << 16
_MAX_BATCH = 1 << 12


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """How a model is run.

    One step computes at most `max_rows` tokens, of at most `max_batch` sequences. `kv_tokens` is the size
    of the KV cache; by default 2 GiB of it, or less if `max_batch` full contexts need less (memory is
    touched only as it fills); `kv_dtype` int8 about halves its bytes. `prefix_cache` keeps what was computed
    for requests that begin with the same tokens. `max_waiting` bounds the queue. `num_threads` None leaves
    the choice to the executor.

    `swap_tokens` is the size of a file, in `swap_folder` (default: the system's for temporary files), that
    keeps what preempted requests had computed. `speculation` "lookup" guesses from what was seen before,
    where that pays. `max_adapters` is how many adapters may be loaded at a time. While requests of the fast
    tier run, a step takes about `fast_step_s` seconds at most, or twice what it takes without prompts, and of
    the others one in `fast_ratio` takes part in it. Beside other work the batch tier takes part as far as a
    step ends within `batch_step_s`. `guesses_for` says whose tokens are guessed.

    `expert_cache_bytes` is the memory that the experts of a mixture may take: those that are used stay,
    others are read from disk when a token is sent to them. By default the system decides what stays.
    """

    weights: WeightFormat = "w8a8"
    max_rows: int = 512
    max_batch: int = 64
    max_waiting: int = 1 << 16
    num_threads: int | None = None
    kv_tokens: int | None = None
    kv_dtype: KvDtype = "bf16"
    prefix_cache: bool = True
    swap_tokens: int = 0
    swap_folder: Path | None = None
    speculation: Speculation = "off"
    max_adapters: int = 0
    fast_step_s: float = 0.1
    fast_ratio: float = 3.0
    batch_step_s: float = 0.1
    guesses_for: GuessesFor = "all"
    expert_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_FORMATS:
            raise UsageError(f"weights is {self.weights!r}", hint=f"use one of {', '.join(WEIGHT_FORMATS)}")
        if self.kv_dtype not in KV_DTYPES:
            raise UsageError(f"kv_dtype is {self.kv_dtype!r}", hint=f"use one of {', '.join(KV_DTYPES)}")
        if self.speculation not in SPECULATIONS:
            hint = f"use one of {', '.join(SPECULATIONS)}"
            raise UsageError(f"speculation is {self.speculation!r}", hint=hint)
        _check("max_rows", self.max_rows, 1, _MAX_ROWS)
        _check("max_batch", self.max_batch, 1, _MAX_BATCH)
        _check("max_waiting", self.max_waiting, 1, 1 << 24)
        if self.num_threads is not None:
            _check("num_threads", self.num_threads, 1, 1024)
        if self.kv_tokens is not None:
            _check("kv_tokens", self.kv_tokens, KV_BLOCK, 1 << 31)
        _check("swap_tokens", self.swap_tokens, 0, 1 << 34)
        _check("max_adapters", self.max_adapters, 0, 1 << 10)
        if self.guesses_for not in get_args(GuessesFor):
            hint = f"use one of {', '.join(get_args(GuessesFor))}"
            raise UsageError(f"guesses_for is {self.guesses_for!r}", hint=hint)
        if self.expert_cache_bytes is not None:
            _check("expert_cache_bytes", self.expert_cache_bytes, 1, 1 << 50)
        _check("fast_step_s", self.fast_step_s, 1e-3, 60.0)
        _check("fast_ratio", self.fast_ratio, 1.0, 100.0)
        _check("batch_step_s", self.batch_step_s, 1e-3, 60.0)

    def num_blocks(self, architecture: Architecture) -> int:
        """KV blocks for a model of this architecture."""
        if self.kv_tokens is not None:
            return -(-self.kv_tokens // KV_BLOCK)
        affordable = _DEFAULT_KV_BYTES // architecture.kv_block_bytes(self.kv_dtype)
        useful = self.max_batch * -(-architecture.max_positions // KV_BLOCK)
        return max(1, min(affordable, useful))


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}", hint=f"use a value from {low} to {high}")
