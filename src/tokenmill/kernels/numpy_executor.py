"""Runs a step plan with the numpy twin: slow, plain, and the measure of the native executor.

It is also what runs where no compiler was available at installation.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tokenmill.kernels import twin
from tokenmill.kernels.lowrank import low_rank_delta
from tokenmill.kernels.moe_twin import ExpertPairs, combine, expert_linear, route_rows, sort_pairs
from tokenmill.kernels.plan import (
    KV_BLOCK,
    AddNorm,
    Attend,
    BufferName,
    Combine,
    Embed,
    ExpertLinear,
    F32Array,
    Gather,
    KvDtype,
    Linear,
    Norm,
    PackedAdapter,
    Quantize,
    RopeKv,
    Route,
    Select,
    StepBatch,
    StepPlan,
)

__all__ = ["NumpyExecutor"]


class NumpyExecutor:
    """The twin of `NativeExecutor`: same plan, same batches, same buffers.

    `ordered` sums bf16 linears in the native order: equal to the bit, and very slow. The other formats
    are equal to the bit anyway.
    """

    def __init__(
        self,
        plan: StepPlan,
        *,
        max_rows: int,
        max_out_rows: int,
        num_blocks: int,
        ordered: bool = False,
        kv_dtype: KvDtype = "bf16",
        max_adapters: int = 0,
    ) -> None:
        shape = plan.shape
        self._adapters: list[PackedAdapter | None] = [None] * max_adapters
        self.plan = plan
        self.kv_dtype = kv_dtype
        self._ordered = ordered
        self.max_rows = max_rows
        self.max_out_rows = max_out_rows
        widths: dict[BufferName, int] = {
            "x": shape.hidden_size,
            "y": shape.hidden_size,
            "qkv": shape.qkv_size,
            "z": shape.num_heads * shape.head_dim,
            "h": shape.intermediate_size,
            "o": shape.hidden_size,
            "logits": shape.vocab_size,
            "route": shape.num_experts,
            "eh": shape.expert_size,
            "eo": shape.hidden_size if shape.num_experts else 0,
        }
        num_pairs = max_rows * shape.num_active
        rows = dict.fromkeys(("y", "logits"), max_out_rows) | dict.fromkeys(("eh", "eo"), num_pairs)
        self._buffers = {
            name: np.zeros((rows.get(name, max_rows), width), np.float32) for name, width in widths.items()
        }
        # The rows as the next linear reads them, before rounding: each linear rounds to its own format.
        self._act = np.zeros((0, 0), np.float32)
        self._expert_act = np.zeros((0, 0), np.float32)
        self._pairs = ExpertPairs(np.zeros(0, np.intp), np.zeros(0, np.intp))
        self._q = np.zeros((max_rows, shape.num_heads, shape.head_dim), np.float32)
        # [layers, keys and values, heads, tokens, head width] a block; bf16 values in float32.
        page = (shape.num_layers, 2, shape.num_kv_heads, KV_BLOCK)
        values = np.int8 if kv_dtype == "int8" else np.float32
        self._kv = np.zeros(
            num_blocks, [("values", values, (*page, shape.head_dim)), ("scales", np.float32, page)]
        )

    def run(self, batch: StepBatch, first: int = 0, last: int | None = None) -> None:
        """Run operations [first, last) of the plan."""
        for index in range(len(self.plan.ops))[first:last]:
            self._step(batch, index)

    def buffer(self, name: BufferName) -> F32Array:
        """The live buffer; writable."""
        return self._buffers[name]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination) in every layer."""
        for source, target in pairs:
            self.block(target)[:] = self.block(source)

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        """A live, writable view of one KV block, [block_bytes]. Raises ValueError if there is none."""
        if not 0 <= index < len(self._kv):
            raise ValueError("KV block out of range")
        return self._kv[index : index + 1].view(np.uint8)

    def set_adapter(self, slot: int, adapter: PackedAdapter | None) -> None:
        """Fill an adapter slot, or free it. ValueError: no such slot."""
        if not 0 <= slot < len(self._adapters):
            raise ValueError("adapter slot out of range")
        self._adapters[slot] = adapter

    def _step(self, batch: StepBatch, index: int) -> None:
        rows, op = batch.num_rows, self.plan.ops[index]
        match op:
            case Embed():
                self._buffers["x"][:rows] = _embed(op, batch)
            case Norm():
                src = self._rows(batch, op.src)
                normed = twin.rms_norm(src, op.weight, op.eps)
                if op.act is None:
                    src[:] = normed
                else:
                    self._act = normed
            case AddNorm():
                self._rows(batch, "x")[:] += twin.rms_norm(self._rows(batch, "o"), op.weight, op.eps)
            case Linear():
                self._linear(batch, index, op)
            case Route() | Gather() | ExpertLinear() | Combine() | Quantize(src="eh"):
                self._routed_step(batch, op)
            case Quantize():
                self._act = self._rows(batch, op.src).copy()
            case RopeKv():
                self._rope_kv(batch, op)
            case Attend():
                self._attend(batch, op)
            case Select():
                self._buffers["y"][: len(batch.out_rows)] = self._buffers["x"][batch.out_rows]
            case _:
                raise AssertionError(f"no twin of {type(op).__name__}")

    def _rows(self, batch: StepBatch, name: BufferName) -> F32Array:
        """The rows of a buffer that this batch uses."""
        return self._buffers[name][: len(batch.out_rows) if name == "y" else batch.num_rows]

    def _linear(self, batch: StepBatch, index: int, op: Linear) -> None:
        dst = self._buffers[op.dst][: self._act.shape[0]]
        exact = self._ordered and op.weight.kind == "bf16"
        product = (twin.linear_bf16_ordered if exact else twin.linear)(op.weight, self._act)
        for s, slot in enumerate(batch.adapters):
            adapter = self._adapter(slot)
            if adapter is not None and (low_rank := adapter.linears.get(index)) is not None:
                rows = slice(batch.row_starts[s], batch.row_starts[s + 1])
                product[rows] += low_rank_delta(low_rank, op.weight, self._act[rows])
        if op.bias is not None:
            product = product + op.bias
        product = twin.gated_unit(product, op.gated) if op.gated else product
        dst[:] = dst + product if op.accumulate else product

    def _routed_step(self, batch: StepBatch, op: Route | Gather | ExpertLinear | Combine | Quantize) -> None:
        x, route = (self._rows(batch, name) for name in ("x", "route"))
        match op:
            case Route():
                route[:] = route_rows(op, x, self.plan.shape.num_active)
            case Gather():
                self._pairs = sort_pairs(route, len(self._buffers["eo"]))
                self._expert_act = self._act[self._pairs.rows_P]
            case Quantize():
                self._expert_act = self._buffers[op.src][: len(self._pairs.rows_P)].copy()
            case ExpertLinear():
                exact = self._ordered and op.weight.linear.kind == "bf16"
                linear = twin.linear_bf16_ordered if exact else twin.linear
                product = expert_linear(op.weight, self._expert_act, self._pairs, linear)
                product = twin.gated_unit(product, op.gated) if op.gated else product
                self._buffers[op.dst][: len(product)] = product
            case _:
                x[:] = combine(x, route, self._buffers["eo"][: len(self._pairs.rows_P)], self._pairs)

    def _adapter(self, slot: int) -> PackedAdapter | None:
        if slot == -1:
            return None
        if not 0 <= slot < len(self._adapters) or self._adapters[slot] is None:
            raise ValueError("adapter slot is not filled")
        return self._adapters[slot]

    def _rope_kv(self, batch: StepBatch, op: RopeKv) -> None:
        shape, rows = self.plan.shape, batch.num_rows
        heads = self._buffers["qkv"][:rows].reshape(rows, -1, shape.head_dim)
        first_value = shape.num_heads + shape.num_kv_heads
        queries, keys = heads[:, : shape.num_heads], heads[:, shape.num_heads : first_value]
        turned = [
            self._turn(batch, op, _normed(queries, op.q_norm, op.eps)),
            self._turn(batch, op, _normed(keys, op.k_norm, op.eps)),
        ]
        self._q[:rows] = turned[0]
        block, slot = batch.kv_slots // KV_BLOCK, batch.kv_slots % KV_BLOCK
        for kind, new in enumerate((turned[1], heads[:, first_value:])):
            at = (block, op.layer, kind, slice(None), slot)
            if self.kv_dtype == "int8":
                quantised, scales = twin.quantize_rows(new.reshape(-1, shape.head_dim))
                self._kv["values"][at] = quantised.reshape(new.shape)
                self._kv["scales"][at] = scales.reshape(new.shape[:2])
            else:
                self._kv["values"][at] = twin.bf16_values(twin.bf16_bits(new))

    def _turn(self, batch: StepBatch, op: RopeKv, heads_THE: F32Array) -> F32Array:
        """Heads rotated by position, or as they are, rounded to bf16."""
        if not op.rotary:
            return twin.bf16_values(twin.bf16_bits(heads_THE))
        cos, sin = self.plan.shape.cos, self.plan.shape.sin
        return twin.rope(heads_THE, cos[batch.positions], sin[batch.positions])

    def _attend(self, batch: StepBatch, op: Attend) -> None:
        shape, layer = self.plan.shape, op.layer
        group = shape.num_heads // shape.num_kv_heads
        for s in range(len(batch.row_starts) - 1):
            rows = slice(batch.row_starts[s], batch.row_starts[s + 1])
            blocks = batch.blocks[batch.block_starts[s] : batch.block_starts[s + 1]]
            at = np.arange(KV_BLOCK)
            key_positions = (blocks[:, 1, None] + at).reshape(-1)
            in_use = (at < blocks[:, 2, None]).reshape(-1)
            seen_TS = in_use & (key_positions <= batch.positions[rows, None])
            if op.window is not None:
                seen_TS &= key_positions > batch.positions[rows, None] - op.window
            for g in range(shape.num_kv_heads):
                k, v = (
                    self._kv["values"][blocks[:, 0], layer, :, g]
                    .swapaxes(0, 1)
                    .reshape(2, -1, shape.head_dim)
                )
                scales = self._kv["scales"][blocks[:, 0], layer, :, g].swapaxes(0, 1).reshape(2, -1)
                heads = slice(g * group, (g + 1) * group)
                z = twin.attend_rows(
                    self._q[rows, heads].transpose(1, 0, 2),
                    k.astype(np.float32),
                    v.astype(np.float32),
                    seen_TS,
                    shape.softmax_scale,
                    scales if self.kv_dtype == "int8" else None,
                )
                z_THE = self._buffers["z"][rows].reshape(-1, shape.num_heads, shape.head_dim)
                z_THE[:, heads] = z.transpose(1, 0, 2)


def _normed(heads_THE: F32Array, weight: F32Array | None, eps: float) -> F32Array:
    """RMSNorm over as many values as `weight` has: of each head, or of all heads of a row."""
    if weight is None:
        return heads_THE
    return twin.rms_norm(heads_THE.reshape(-1, len(weight)), weight, eps).reshape(heads_THE.shape)


def _embed(op: Embed, batch: StepBatch) -> F32Array:
    rows = op.table.data[batch.tokens]
    if not op.table.scales.size:
        return twin.bf16_values(rows)
    scales = op.table.scales[batch.tokens].astype(np.float32)
    values: F32Array = np.repeat(scales, 32, axis=1)[:, : rows.shape[1]] * rows.astype(np.float32)
    return values
