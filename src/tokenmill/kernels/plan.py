"""The step plan: what a model does in one step, as a short list of named operations.

A model's description is compiled once to a `StepPlan`. Two executors run the same plan: the native one
(C++, one call a step) and the numpy twin. Both take a flat batch: the rows of all sequences one after
the other, whatever mixture of prefill chunks and single decode tokens they are.

    tokens ─Embed─► x ─Norm─► a ─Linear─► qkv ─RopeKv─► q, KV cache ─Attend─► z ─Quantize─► a
           ─Linear(+=)─► x ─Norm─► a ─Linear(gated)─► h ─Quantize─► a ─Linear(+=)─► x
           ... ─Select─► y ─Norm─► y ─Quantize─► a ─Linear─► logits

A routed block has, in place of the gated linear and the one after it:

    x ─Route─► route    a, route ─Gather─► ea ─ExpertLinear(gated)─► eh ─Quantize─► ea ─ExpertLinear─► eo
      eo, route ─Combine(+=)─► x

A block with norms on its outputs has Quantize(x) where the first norms are, and ─Linear─► o ─AddNorm─► x.

Every operation may carry the name of the point it produces (`blocks.3.hook_resid_post`). A plan can be
run from one operation to another, so a tap on a named point stops there, reads or replaces the
buffer, and goes on.

Shape legend: T rows of the step, S sequences, L rows that need logits, D model width, H query heads,
G key-value heads, E head width, F inner width of the gated unit, V vocabulary, N and K outputs and
inputs of a linear, X experts, P pairs of a row and an expert that it is sent to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "KV_BLOCK",
    "KV_DTYPES",
    "SPAN_BLOCKS",
    "ActFormat",
    "Activation",
    "AddNorm",
    "Attend",
    "BufferName",
    "Combine",
    "Embed",
    "EmbedTable",
    "Executor",
    "ExpertLinear",
    "F32Array",
    "Gather",
    "I32Array",
    "KvDtype",
    "Linear",
    "LinearKind",
    "Norm",
    "Op",
    "PackedAdapter",
    "PackedExperts",
    "PackedLinear",
    "PackedLowRank",
    "PlanShape",
    "Quantize",
    "RopeKv",
    "Route",
    "Select",
    "StepBatch",
    "StepPlan",
    "kv_block_bytes",
]

F32Array: TypeAlias = npt.NDArray[np.float32]
I32Array: TypeAlias = npt.NDArray[np.int32]

KV_BLOCK = 32
"""Tokens in one block of the paged KV cache."""

SPAN_BLOCKS = 16
"""Blocks that attention treats at once between two rescalings of the online softmax."""

KvDtype = Literal["bf16", "int8"]
"""How the cache keeps keys and values: `int8` has one float32 scale a token, layer, KV head and kind."""

KV_DTYPES: tuple[KvDtype, ...] = ("bf16", "int8")

ActFormat = Literal["int8", "int8_groups", "bf16"]
LinearKind = Literal["i8c", "i8g", "i4g", "bf16"]
BufferName = Literal["x", "y", "qkv", "z", "h", "o", "route", "eh", "eo", "logits"]

Activation = Literal["silu", "gelu_tanh", "relu"]
"""What is done to the gates of a gated unit (Shazeer 2020); `gelu_tanh` is GELU by way of tanh."""


@dataclass(frozen=True, kw_only=True)
class PackedLinear:
    """One weight matrix [N, K], packed for the native kernels. `packing.py` makes and unmakes it.

    `i8c`: 8 bits, one float32 scale an output. `i8g`: 8 bits, one float16 scale a group of inputs.
    `i4g`: 4 bits, one float16 scale and, unless symmetric, one float16 minimum a group. `bf16`: as is.
    Inputs come in 8 bits with a scale a row (`i8c`) or a scale a 32 inputs (`i8g`, `i4g`), or in bf16.
    """

    kind: LinearKind
    num_out: int
    num_in: int
    group: int
    symmetric: bool
    data: npt.NDArray[np.uint8]
    scales: npt.NDArray[Any]

    @property
    def act_format(self) -> ActFormat:
        """The format this matrix wants its inputs in."""
        formats: dict[LinearKind, ActFormat] = {"i8c": "int8", "bf16": "bf16"}
        return formats.get(self.kind, "int8_groups")

    @property
    def num_bytes(self) -> int:
        """Bytes that one pass over the matrix reads."""
        return self.data.nbytes + self.scales.nbytes


@dataclass(frozen=True, kw_only=True)
class PackedExperts:
    """One weight matrix [N, K] of each of X experts, packed alike: a `PackedLinear` with X in front."""

    num_experts: int
    linear: PackedLinear

    def expert(self, index: int) -> PackedLinear:
        """The matrix of one expert; its arrays are views."""
        each = self.linear
        return replace(each, data=each.data[index], scales=each.scales[index])


@dataclass(frozen=True, kw_only=True)
class PackedLowRank:
    """What an adapter adds to one linear [N, K], with R ranks in all, an even number. `lowrank.py` makes it.

    `down`: bf16 bits [R/2, K up to 16s, 2]. `up`: bf16 bits [rows, 16, 2], for pairs of tiles of 16 outputs.
    `pairs` [pairs, 4] gives for each the first rank of either tile, their number of ranks, and the row of
    `up` that belongs to the first.
    """

    scale: float
    down: npt.NDArray[np.uint16]
    up: npt.NDArray[np.uint16]
    pairs: I32Array

    @property
    def rank(self) -> int:
        """Ranks of all matrices that are fused into this linear, rounded up to an even number."""
        return 2 * len(self.down)


@dataclass(frozen=True, kw_only=True)
class PackedAdapter:
    """An adapter for one plan: what it adds, by the index of the linear among the plan's operations.

    `digest` is the SHA-256 of its content, in hexadecimal digits.
    """

    digest: str
    linears: Mapping[int, PackedLowRank]

    @property
    def num_bytes(self) -> int:
        """Bytes that one pass over the adapter reads."""
        return sum(each.down.nbytes + each.up.nbytes for each in self.linears.values())


@dataclass(frozen=True, kw_only=True)
class EmbedTable:
    """Token embeddings [V, D]: bf16 bits (`scales` empty), or int8 with a float16 scale a 32 inputs."""

    data: npt.NDArray[Any]
    scales: npt.NDArray[np.float16]


@dataclass(frozen=True, kw_only=True)
class PlanShape:
    """The sizes that every operation of a plan shares. `cos` and `sin` are [positions, E/2].

    `expert_size` is the inner width of an expert, `num_active` the experts that a row is sent to.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    num_layers: int
    softmax_scale: float
    cos: F32Array
    sin: F32Array
    num_experts: int = 0
    num_active: int = 0
    expert_size: int = 0

    @property
    def qkv_size(self) -> int:
        """Outputs of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Embed:
    """x = table[tokens]."""

    table: EmbedTable
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Norm:
    """a = quantised RMSNorm(src) * weight; or src = RMSNorm(src) * weight in float32 where `act` is None.

    `src` is x, or y for the selected rows.
    """

    src: BufferName
    weight: F32Array
    eps: float
    act: ActFormat | None
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class AddNorm:
    """x += RMSNorm(o) * weight: a norm on the output of a block's part."""

    weight: F32Array
    eps: float
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """dst = a @ weight.T + bias, or dst += where `accumulate`. `rows` names the row count: T or L.

    `gated`: the outputs, and `bias`, come in turns of 16 gates and 16 ups, and dst = activation(gate) * up is
    half as wide.
    """

    weight: PackedLinear
    dst: BufferName
    accumulate: bool = False
    gated: Activation | None = None
    bias: F32Array | None = None
    rows: Literal["T", "L"] = "T"
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class RopeKv:
    """Rotates queries and keys of qkv by position; q becomes bf16, keys and values go to the cache.

    `q_norm`, `k_norm`: RMSNorm weights, applied before; [E] for each head, or [H * E] and [G * E] for all
    heads at once. Without `rotary` nothing is rotated.
    """

    layer: int
    rotary: bool = True
    q_norm: F32Array | None = None
    k_norm: F32Array | None = None
    eps: float = 0.0
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Attend:
    """z = causal softmax attention of q over each sequence's list of blocks.

    With a `window`, a row at position p sees positions above p - window only.
    """

    layer: int
    window: int | None = None
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """a = src in the format of the next linear; y holds the selected rows only. ea takes the rows of eh."""

    src: BufferName
    act: ActFormat
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Route:
    """route = the weights of each row's experts [T, X], zero for those it is not sent to.

    softmax(RMSNorm(x) * norm @ weight.T) in float32, of which the `num_active` largest stay (of equal ones
    the first), divided by their sum where `renormalise`. `weight` is [X, D] in float32. The experts of a row
    are those whose weight is not zero; a row that is not finite goes to the first ones, with weight NaN.
    """

    weight: F32Array
    norm: F32Array
    eps: float
    renormalise: bool
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Gather:
    """ea = the rows of a that each expert reads, P rows in order of expert, then of row, as `route` says."""

    name: str = ""


@dataclass(frozen=True, kw_only=True)
class ExpertLinear:
    """dst = ea @ weight.T of each row's own expert, [P, N], or half as wide where `gated` as in `Linear`."""

    weight: PackedExperts
    dst: BufferName
    gated: Activation | None = None
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Combine:
    """x += the sum of route * eo over a row's experts, in their order."""

    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Select:
    """y = x[out_rows]: only rows that need the final norm or logits reach the head."""

    name: str = ""


Op: TypeAlias = (
    Embed
    | Norm
    | AddNorm
    | Linear
    | RopeKv
    | Attend
    | Quantize
    | Route
    | Gather
    | ExpertLinear
    | Combine
    | Select
)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """A whole model as operations. `ops[head_start:]` are the head: Select, Norm, Quantize, Linear to logits.

    `smoothing` gives, by the name of a linear's input (`blocks.3.mlp.hook_post`), the factors [K] by which
    that input was divided when the weights were packed; inputs that are not listed were left as they are.
    """

    shape: PlanShape
    ops: tuple[Op, ...]
    smoothing: Mapping[str, F32Array] = field(default_factory=dict)

    @property
    def head_start(self) -> int:
        """Index of the Select operation."""
        return next(i for i, op in enumerate(self.ops) if isinstance(op, Select))

    @property
    def linears(self) -> tuple[PackedLinear, ...]:
        """Every weight matrix that all rows read, in order of use."""
        return tuple(op.weight for op in self.ops if isinstance(op, Linear))


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The flat inputs of one step. All arrays are int32 and contiguous.

    Sequence s owns rows [row_starts[s], row_starts[s+1]) and blocks [block_starts[s],
    block_starts[s+1]) of `blocks`. Each block is (block id, position of its first token, rows in use
    after this step); attention sees exactly these, never an implied range. `adapters` has the adapter
    slot of each sequence, -1 for none; it may be empty where no sequence has one.
    """

    tokens: I32Array
    positions: I32Array
    kv_slots: I32Array
    row_starts: I32Array
    block_starts: I32Array
    blocks: I32Array
    out_rows: I32Array
    adapters: I32Array = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def num_rows(self) -> int:
        """Rows of this step."""
        return int(self.tokens.shape[0])


def kv_block_bytes(*, num_layers: int, num_kv_heads: int, head_dim: int, kv_dtype: KvDtype) -> int:
    """Bytes of one KV block of the native executor: keys and values of `KV_BLOCK` tokens in every layer.

    Heads are padded to whole 32 values; in int8 each has its scale beside it.
    """
    width = -(-head_dim // 32) * 32
    head_bytes = width + 4 if kv_dtype == "int8" else 2 * width
    return 2 * num_layers * num_kv_heads * KV_BLOCK * head_bytes


class Executor(Protocol):
    """Runs a plan over batches. The native executor and the numpy twin are the two implementations."""

    plan: StepPlan
    max_rows: int
    max_out_rows: int
    kv_dtype: KvDtype

    def run(self, batch: StepBatch, first: int = 0, last: int | None = None) -> None:
        """Run operations [first, last) of the plan; the KV cache and the buffers change."""
        ...

    def buffer(self, name: BufferName) -> F32Array:
        """The live buffer, [max_rows or max_out_rows, width]; valid until the next run, writable."""
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination) in every layer."""
        ...

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        """A live, writable view of one KV block, [block_bytes]: all layers, keys, values and scales.

        Bytes copied from it mean the same in any block of this executor. Raises ValueError if there is no
        such block.
        """
        ...

    def set_adapter(self, slot: int, adapter: PackedAdapter | None) -> None:
        """Fill an adapter slot, or free it. ValueError: no such slot, or not made for this plan."""
        ...
