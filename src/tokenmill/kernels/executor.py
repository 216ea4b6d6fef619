"""The native executor: hands a step plan to the extension once, then one call a step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tokenmill.core import ResourceError, StorageError, UsageError
from tokenmill.kernels import twin
from tokenmill.kernels.isa import NUMPY, choose_isa, default_threads, load_native
from tokenmill.kernels.numpy_executor import NumpyExecutor
from tokenmill.kernels.packing import TILE
from tokenmill.kernels.plan import (
    AddNorm,
    Attend,
    BufferName,
    Combine,
    Embed,
    Executor,
    ExpertLinear,
    F32Array,
    Gather,
    KvDtype,
    Linear,
    Norm,
    Op,
    PackedAdapter,
    PackedLinear,
    Quantize,
    RopeKv,
    Route,
    Select,
    StepBatch,
    StepPlan,
)

__all__ = ["ExpertCacheStats", "NativeExecutor", "create_executor", "expert_cache", "log_sum_exp_rows"]

_MAX_HEAD_DIM = 512
_NO_WINDOW = 2**30
"""A window that no position lies outside of."""


class ExpertCacheStats(NamedTuple):
    """What the cache of experts did since the executor was made.

    A hit or a miss is one matrix of one expert (gate and up together, or down) in one step. `bytes_held` are
    in memory now; `read_seconds` were spent waiting for what was not.
    """

    num_hits: int
    num_misses: int
    bytes_read: int
    bytes_held: int
    read_seconds: float

    def since(self, before: "ExpertCacheStats") -> "ExpertCacheStats":
        """What it did after `before`; the bytes held are those of now."""
        return ExpertCacheStats(
            num_hits=self.num_hits - before.num_hits,
            num_misses=self.num_misses - before.num_misses,
            bytes_read=self.bytes_read - before.bytes_read,
            bytes_held=self.bytes_held,
            read_seconds=self.read_seconds - before.read_seconds,
        )


class NativeExecutor:
    """Runs a plan in C++ with its own threads, buffers and paged KV cache.

    Not safe for use by several threads at once; a step releases the interpreter lock. With
    `expert_cache_bytes` the weights of experts that are mapped from a file are read into memory that is no
    larger than that, or than one matrix, and part of two pages for each array.
    """

    def __init__(
        self,
        plan: StepPlan,
        *,
        max_rows: int,
        max_out_rows: int,
        num_blocks: int,
        num_threads: int,
        isa: str,
        kv_dtype: KvDtype = "bf16",
        max_adapters: int = 0,
        expert_cache_bytes: int | None = None,
    ) -> None:
        shape = plan.shape
        if shape.head_dim > _MAX_HEAD_DIM:
            raise UsageError(
                f"head width {shape.head_dim} is above {_MAX_HEAD_DIM}", hint="use TOKENMILL_ISA=numpy"
            )
        native: Any = load_native()
        self.plan = plan
        self.max_rows = max_rows
        self.max_out_rows = max_out_rows
        self.kv_dtype = kv_dtype
        self.isa = isa
        self.num_threads = num_threads
        self._has_expert_cache = expert_cache_bytes is not None
        try:
            self._native = native.Plan(
                isa=isa,
                threads=num_threads,
                max_rows=max_rows,
                max_outs=max_out_rows,
                num_blocks=num_blocks,
                max_inputs=max(linear.num_in for linear in plan.linears),
                max_adapters=max_adapters,
                hidden=shape.hidden_size,
                heads=shape.num_heads,
                kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                inner=shape.intermediate_size,
                vocab=shape.vocab_size,
                layers=shape.num_layers,
                softmax_scale=shape.softmax_scale,
                cos=np.ascontiguousarray(shape.cos),
                sin=np.ascontiguousarray(shape.sin),
                kv_int8=kv_dtype == "int8",
                experts=shape.num_experts,
                active=shape.num_active,
                expert_inner=shape.expert_size,
                expert_cache_bytes=expert_cache_bytes or 0,
            )
        except MemoryError as error:
            raise ResourceError(
                f"no memory for {num_blocks} KV blocks", hint="give the engine a smaller KV cache"
            ) from error
        except RuntimeError as error:
            raise ResourceError(
                f"{num_threads} threads cannot be started ({error})", hint="use fewer threads"
            ) from error
        self._add_all()

    def run(self, batch: StepBatch, first: int = 0, last: int | None = None) -> None:
        """Run operations [first, last) of the plan in one native call.

        Raises StorageError if an expert cannot be read; the executor can be used on.
        """
        try:
            self._native.run(
                batch.tokens,
                batch.positions,
                batch.kv_slots,
                batch.row_starts,
                batch.block_starts,
                batch.blocks,
                batch.out_rows,
                batch.adapters,
                first,
                len(self.plan.ops) if last is None else last,
            )
        except OSError as error:
            raise StorageError(
                str(error), hint="check the disk, and load the model again: its file must not change in use"
            ) from error

    @property
    def native(self) -> Any:
        """The extension's own object, whose threads the sampler shares."""
        return self._native

    def buffer(self, name: BufferName) -> F32Array:
        """A writable view of the live buffer."""
        view: F32Array = self._native.buffer(name)
        return view

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination) in every layer."""
        for source, target in pairs:
            self._native.copy_block(source, target)

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        """A live, writable view of one KV block, [block_bytes]. Raises ValueError if there is none."""
        view: npt.NDArray[np.uint8] = self._native.block(index)
        return view

    def set_adapter(self, slot: int, adapter: PackedAdapter | None) -> None:
        """Fill an adapter slot, or free it. ValueError: no such slot, or not made for this plan."""
        linears = {} if adapter is None else adapter.linears
        self._native.set_adapter(
            slot,
            list(linears),
            [each.rank for each in linears.values()],
            [each.scale for each in linears.values()],
            [np.ascontiguousarray(each.down) for each in linears.values()],
            [np.ascontiguousarray(each.up) for each in linears.values()],
            [np.ascontiguousarray(each.pairs) for each in linears.values()],
        )

    def time_operations(self) -> None:
        """Time each operation of the plan from now on, counted from zero; between two steps."""
        self._native.time_ops()

    def operation_seconds(self) -> tuple[float, ...]:
        """Seconds of each operation of the plan since `time_operations`; empty if it was never called.

        As thread 0 saw it, waiting for the others included, so that the sum is the time of the plan.
        """
        return tuple(each * 1e-9 for each in self._native.op_ns())

    @property
    def num_shared_blocks(self) -> int:
        """Entries of the last step's block list that were attended to together with another sequence's."""
        return int(self._native.num_shared_blocks())

    def expert_cache(self) -> ExpertCacheStats | None:
        """What the cache of experts did so far; None without a budget."""
        return ExpertCacheStats(*self._native.expert_stats()) if self._has_expert_cache else None

    def _add_all(self) -> None:
        plan = self.plan
        for before, op, after in zip((None, *plan.ops), plan.ops, (*plan.ops[1:], None), strict=False):
            if isinstance(op, Linear):
                assert isinstance(before, Norm | Quantize) and before.act == op.weight.act_format
            if isinstance(op, Gather):
                assert isinstance(after, ExpertLinear)
                self._native.add_gather(after.weight.linear.act_format)
            else:
                self._add(op)

    def _add(self, op: Op) -> None:
        native = self._native
        match op:
            case Embed():
                native.add_embed(np.ascontiguousarray(op.table.data), np.ascontiguousarray(op.table.scales))
            case Norm():
                act = op.act or "float32"
                native.add_norm(op.src, np.ascontiguousarray(op.weight), op.eps, act, op.src == "y")
            case AddNorm():
                native.add_add_norm(np.ascontiguousarray(op.weight), op.eps)
            case Linear():
                native.add_linear(
                    op.dst,
                    *_matrix(op.weight),
                    _padded_bias(op),
                    op.accumulate,
                    op.gated or "",
                    op.rows == "L",
                )
            case Quantize():
                native.add_quantize(op.src, op.act, op.src == "y")
            case RopeKv():
                native.add_rope_kv(
                    op.layer, op.rotary, _float_array(op.q_norm), _float_array(op.k_norm), op.eps
                )
            case Attend():
                native.add_attend(op.layer, _NO_WINDOW if op.window is None else op.window)
            case Route():
                weight, norm = np.ascontiguousarray(op.weight), np.ascontiguousarray(op.norm)
                native.add_route(weight, norm, op.eps, op.renormalise)
            case ExpertLinear():
                native.add_expert_linear(op.dst, *_matrix(op.weight.linear), op.gated or "")
            case Combine():
                native.add_combine()
            case Select():
                native.add_select()
            case _:
                raise AssertionError(f"no native kernel for {type(op).__name__}")


def _float_array(weight: F32Array | None) -> F32Array:
    """A weight as the extension takes it; empty for none."""
    return np.zeros(0, np.float32) if weight is None else np.ascontiguousarray(weight, np.float32)


def _matrix(w: PackedLinear) -> tuple[Any, ...]:
    """A packed matrix as the extension takes it."""
    return w.kind, w.num_out, w.num_in, w.group, w.symmetric, w.data, w.scales


def _padded_bias(op: Linear) -> F32Array:
    """The bias of whole pairs of tiles, as the kernels read it; empty for none."""
    if op.bias is None:
        return _float_array(None)
    assert op.bias.shape == (op.weight.num_out,)
    return np.pad(_float_array(op.bias), (0, -op.weight.num_out % (2 * TILE)))


def create_executor(
    plan: StepPlan,
    *,
    max_rows: int,
    max_out_rows: int,
    num_blocks: int,
    num_threads: int | None = None,
    isa: str | None = None,
    kv_dtype: KvDtype = "bf16",
    max_adapters: int = 0,
    expert_cache_bytes: int | None = None,
) -> Executor:
    """The fastest executor available here for a plan; `isa` and `num_threads` default to the machine's.

    The numpy twin leaves the memory of experts to the system.
    """
    isa = isa or choose_isa()
    if isa == NUMPY:
        return NumpyExecutor(
            plan,
            kv_dtype=kv_dtype,
            max_rows=max_rows,
            max_out_rows=max_out_rows,
            num_blocks=num_blocks,
            max_adapters=max_adapters,
        )
    return NativeExecutor(
        plan,
        max_rows=max_rows,
        max_out_rows=max_out_rows,
        num_blocks=num_blocks,
        num_threads=num_threads or default_threads(),
        isa=isa,
        kv_dtype=kv_dtype,
        max_adapters=max_adapters,
        expert_cache_bytes=expert_cache_bytes,
    )


def expert_cache(executor: Executor) -> ExpertCacheStats | None:
    """What an executor's cache of experts did so far; None if it has none."""
    return executor.expert_cache() if isinstance(executor, NativeExecutor) else None


def log_sum_exp_rows(logits_LV: F32Array) -> npt.NDArray[np.float64]:
    """log(sum(exp(row))) of each row, in float64; NaN for a row that holds a value that is not finite."""
    isa = choose_isa()
    if isa == NUMPY:
        return twin.log_sum_exp_rows(logits_LV)
    native: Any = load_native()
    sums: npt.NDArray[np.float64] = native.log_sum_exp_rows(logits_LV, isa)
    return sums
