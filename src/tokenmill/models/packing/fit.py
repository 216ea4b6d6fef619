"""How much memory a model takes to run, in each form, and how long a sequence may then be.

Everything is counted in full, so that what fits never waits for the disk: the packed weights and the table of
embeddings, which are mapped from a file, the KV cache of one sequence, the buffers of a step, and the process
itself. All but the last follow from the architecture, byte for byte; a test compares them with what is
allocated. The process (interpreter, libraries, tokenizer) was measured, see `_BASE_BYTES`.

The memory of packing, of adapters, drafts, grammars and further sequences is not in it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from tokenmill.kernels import KV_BLOCK, KV_DTYPES, KvDtype
from tokenmill.kernels.isa import default_threads
from tokenmill.kernels.packing import TILE, group_block_bytes
from tokenmill.kernels.plan import SPAN_BLOCKS, LinearKind
from tokenmill.models.architecture import Architecture
from tokenmill.models.packing.pack import FUSED, WEIGHT_FORMATS, WeightFormat, fused_linears
from tokenmill.models.weights import WeightSource

__all__ = ["Fit", "Footprint", "StepSizes", "find_fits", "footprint", "packed_bytes"]

_GROUP: Final = 32
_ALIGNMENT: Final = 64
_SLACK_ROWS: Final = 32
_EMBED: Final = "model.embed_tokens.weight"
_BASE_BYTES: Final = 56_000_000
_VOCABULARY_BYTES: Final = 1000
"""The process, and a token of its tokenizer's vocabulary. Measured with Python 3.11 on Linux as peak resident
memory less all that is counted: 54 MB with 263 tokens, 102 MB with 49,152, 198 to 205 MB with 151,936."""


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """The most rows that a step computes, the most rows with logits, and its threads."""

    max_rows: int = 512
    max_out_rows: int = 16
    num_threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a running model, by what they are for."""

    weights: int
    embeddings: int
    kv: int
    steps: int
    base: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.embeddings + self.kv + self.steps + self.base


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One form of a model against a limit: the longest sequence in tokens (0: it does not fit), its bytes.

    Of a form that does not fit, `footprint` is that of the shortest sequence, one block.
    """

    weights: WeightFormat
    kv_dtype: KvDtype
    context: int
    footprint: Footprint


def find_fits(
    architecture: Architecture, limit: int, sizes: StepSizes | None = None, source: WeightSource | None = None
) -> list[Fit]:
    """Every form of a model against `limit` bytes; `source` says which grids its weights have."""
    sizes = sizes or StepSizes()
    fits = []
    for weights in WEIGHT_FORMATS:
        stored, embeddings = packed_bytes(architecture, weights, source)
        for kv_dtype in KV_DTYPES:
            least = replace(
                footprint(architecture, kv_dtype, KV_BLOCK, sizes), weights=stored, embeddings=embeddings
            )
            context = _longest(architecture, kv_dtype, limit - least.total)
            found = replace(
                footprint(architecture, kv_dtype, context or KV_BLOCK, sizes),
                weights=stored,
                embeddings=embeddings,
            )
            fits.append(Fit(weights=weights, kv_dtype=kv_dtype, context=context, footprint=found))
    return fits


def footprint(architecture: Architecture, kv_dtype: KvDtype, context: int, sizes: StepSizes) -> Footprint:
    """What running takes beside the weights, for one sequence of `context` tokens."""
    num_blocks = -(-context // KV_BLOCK)
    positions = min(num_blocks * KV_BLOCK, architecture.max_positions)
    return Footprint(
        weights=0,
        embeddings=0,
        kv=num_blocks * architecture.kv_block_bytes(kv_dtype),
        steps=_step_bytes(architecture, kv_dtype, sizes) + positions * _rotation_bytes(architecture),
        base=_BASE_BYTES + _VOCABULARY_BYTES * architecture.vocab_size,
    )


def packed_bytes(
    architecture: Architecture, weights: WeightFormat, source: WeightSource | None = None
) -> tuple[int, int]:
    """Bytes of the packed weights and of the table of embeddings, as the packed file has them."""
    hidden = architecture.hidden_size
    head = _EMBED if architecture.tied_embeddings else "lm_head.weight"
    total = _linear_bytes(_head_kind(weights, source, head), architecture.vocab_size, hidden)
    for layer in range(architecture.num_layers):
        total += sum(_block_bytes(architecture, layer, weights, source))
    total += sum(map(_aligned, _vector_bytes(architecture, weights)))
    grid = _grid_kind(source, [_EMBED])
    is_small = weights == "w4a8" and (grid == ("i8g", True) or (grid is None and hidden % _GROUP == 0))
    values = architecture.vocab_size * hidden
    embeddings = _aligned(values) + _aligned(values // _GROUP * 2) if is_small else _aligned(2 * values)
    return total, embeddings


def _longest(architecture: Architecture, kv_dtype: KvDtype, spare: int) -> int:
    """The longest sequence, `spare` bytes being left beside the first block; 0 if they are negative."""
    if spare < 0:
        return 0
    block = architecture.kv_block_bytes(kv_dtype) + KV_BLOCK * _rotation_bytes(architecture)
    return min((1 + spare // block) * KV_BLOCK, architecture.max_positions)


def _block_bytes(
    architecture: Architecture, layer: int, weights: WeightFormat, source: WeightSource | None
) -> Iterator[int]:
    """Bytes of each fused matrix of a layer."""
    shapes, prefix = architecture.linear_shapes(layer), f"model.layers.{layer}"
    for parts in fused_linears(architecture, layer).values():
        names = [f"{prefix}.{part}.weight" for part in parts]
        num_out, num_in = sum(shapes[part][0] for part in parts), shapes[parts[0]][1]
        yield _linear_bytes(_kind(weights, source, names, num_in), num_out, num_in)
    if not architecture.layers[layer].routed:
        return
    assert architecture.experts is not None
    num_experts = architecture.experts.num_experts
    for name in ("gate_up", "down"):
        parts = tuple(part.replace("mlp.", "mlp.experts.0.") for part in FUSED[name])
        names = [f"{prefix}.{part}.weight" for part in parts]
        num_out, num_in = sum(shapes[part][0] for part in parts), shapes[parts[0]][1]
        arrays = _array_bytes(_kind(weights, source, names, num_in), num_out, num_in)
        yield sum(_aligned(num_experts * size) for size in arrays)


def _linear_bytes(kind: tuple[LinearKind, bool], num_out: int, num_in: int) -> int:
    return sum(map(_aligned, _array_bytes(kind, num_out, num_in)))


def _array_bytes(kind: tuple[LinearKind, bool], num_out: int, num_in: int) -> tuple[int, int, int]:
    """Bytes of the data, scales and minima of one matrix: the layouts of `kernels.packing`."""
    name, is_symmetric = kind
    if name == "i8c":
        rows = _up(num_out, 2 * TILE)
        return rows * _up(num_in, 64), 4 * rows, 0
    if name == "bf16":
        return 2 * _up(num_out, 2 * TILE) * _up(num_in, 32), 0, 0
    blocks = _up(num_out, 2 * TILE) // (2 * TILE) * (num_in // _GROUP)
    return blocks * group_block_bytes(name, is_symmetric), 0, 0


def _kind(
    weights: WeightFormat, source: WeightSource | None, names: list[str], num_in: int
) -> tuple[LinearKind, bool]:
    """What a matrix is packed as, and whether its groups have no minima."""
    if weights != "w4a8":
        return ("i8c" if weights == "w8a8" else "bf16"), True
    if (grid := _grid_kind(source, names)) is not None:
        return grid
    return ("i8c", True) if num_in % _GROUP else ("i4g", False)


def _head_kind(weights: WeightFormat, source: WeightSource | None, name: str) -> tuple[LinearKind, bool]:
    grid = _grid_kind(source, [name]) if weights == "w4a8" else None
    return grid or ("bf16" if weights == "bf16" else "i8c", True)


def _grid_kind(source: WeightSource | None, names: list[str]) -> tuple[LinearKind, bool] | None:
    """What matrices that are fused are packed as where the weights have a grid; None without one."""
    kinds: set[tuple[LinearKind, bool] | None] = set()
    for name in names:
        grid = None if source is None else source.grid(name)
        kinds.add(None if grid is None else ("i8g" if grid.bits == 8 else "i4g", grid.mins is None))
    return kinds.pop() if len(kinds) == 1 else None


def _vector_bytes(architecture: Architecture, weights: WeightFormat) -> Iterator[int]:
    """Bytes of what stays in float32: norms, biases, routers, and what inputs are divided by in w8a8."""
    hidden, experts = 4 * architecture.hidden_size, architecture.experts
    yield hidden
    for kind in architecture.layers:
        yield from (hidden, hidden)
        yield from (4 * size for size in architecture.qk_norm_sizes() if size)
        biases = architecture.bias_sizes(kind.routed)
        yield from (4 * sum(biases[part] for part in parts) for parts in FUSED.values() if parts[0] in biases)
        if kind.routed:
            assert experts is not None
            yield from (experts.num_experts * hidden, hidden)
    if weights != "w8a8":
        return
    yield hidden
    for kind in architecture.layers:
        yield from () if architecture.post_norm else (hidden, hidden)
        if not kind.routed:
            yield 4 * architecture.intermediate_size


def _step_bytes(architecture: Architecture, kv_dtype: KvDtype, sizes: StepSizes) -> int:
    """Buffers of the native executor, without its KV cache (csrc/plan.cpp)."""
    rows, outs, hidden = sizes.max_rows, sizes.max_out_rows, architecture.hidden_size
    query = architecture.query_size
    inner = architecture.intermediate_size
    num_in = max(hidden, query, 0 if all(layer.routed for layer in architecture.layers) else inner)
    qkv = query + 2 * architecture.kv_size
    floats = rows * (hidden + qkv + query + inner + hidden)
    floats += outs * (hidden + architecture.vocab_size)
    acts = _act_bytes(_up(max(rows, outs), 16) + _SLACK_ROWS, num_in)
    if (experts := architecture.experts) is not None:  # a row of its own for every expert that a token takes
        pairs = rows * experts.num_active
        floats += rows * experts.num_experts + pairs * (hidden + experts.intermediate_size)
        tiles = min(experts.num_experts, pairs) + pairs // 16
        acts += _act_bytes(16 * tiles + _SLACK_ROWS, max(hidden, experts.intermediate_size))
    head_pad = _up(architecture.head_dim, 32)
    queries = 2 * (rows * architecture.num_heads + _SLACK_ROWS) * head_pad
    span = SPAN_BLOCKS * KV_BLOCK
    thread = 4 * (max(num_in, qkv) + 16 * span + 2 * 16 * head_pad) + 2 * 16 * span
    if kv_dtype == "int8":
        thread += 2 * (SPAN_BLOCKS + 1) * KV_BLOCK * head_pad
    num_threads: int = sizes.num_threads or default_threads()
    return 4 * floats + queries + acts + num_threads * thread


def _act_bytes(rows: int, num_in: int) -> int:
    """Rows as a linear reads them: values, scales and sums."""
    width = _up(num_in, 64)
    return rows * (2 * width + 2 * 4 * width // _GROUP + 4)


def _rotation_bytes(architecture: Architecture) -> int:
    """Bytes of a position's sines and cosines."""
    return 2 * 4 * (architecture.head_dim // 2)


def _up(value: int, to: int) -> int:
    return math.ceil(value / to) * to


def _aligned(num_bytes: int) -> int:
    return _up(num_bytes, _ALIGNMENT)
