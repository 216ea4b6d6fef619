"""The cache of experts keeps within its budget, counts right and changes no token; routing is counted right.

Run: pytest tests/fast/test_moe_cache.py
"""

import ctypes
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.fast.random_moe import make_moe_plan
from tests.fast.random_plan import make_batch, make_plan
from tokenmill.core import StorageError, UsageError
from tokenmill.engine.core import CoreConfig, EngineCore
from tokenmill.engine.embedding import EmbeddingState
from tokenmill.engine.taps.routing import RoutingStats, routing
from tokenmill.engine.taps.tap import Recording, Tap, ablate
from tokenmill.kernels import (
    Executor,
    ExpertCacheStats,
    ExpertLinear,
    PackedExperts,
    StepBatch,
    StepPlan,
    available_isas,
    create_executor,
    expert_cache,
)

ISA = next(isa for isa in available_isas() if isa != "numpy")
BATCH = make_batch([([t % 203 for t in range(40)], 0, [0, 1])])


def mapped(plan: StepPlan, folder: Path) -> StepPlan:
    """The same plan with its experts' weights in files, none of it in the system's cache."""
    ops = list(plan.ops)
    for index, op in enumerate(ops):
        if isinstance(op, ExpertLinear):
            parts: dict[str, Any] = {}
            for part in ("data", "scales"):
                if (array := getattr(op.weight.linear, part)).size:
                    parts[part] = in_file(array, folder / f"{index}.{part}.npy")
            linear = replace(op.weight.linear, **parts)
            ops[index] = replace(op, weight=PackedExperts(num_experts=op.weight.num_experts, linear=linear))
    return replace(plan, ops=tuple(ops))


def in_file(array: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    loaded: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    return loaded


def touched(plan: StepPlan, batch: StepBatch) -> list[int]:
    """Bytes of every expert's matrix that a step reads, in order."""
    ex = create_executor(plan, max_rows=64, max_out_rows=64, num_blocks=4, num_threads=1, isa=ISA)
    sizes: list[int] = []
    for index, op in enumerate(plan.ops):
        ex.run(batch, index, index + 1)
        if isinstance(op, ExpertLinear):
            used_X = (ex.buffer("route")[: batch.num_rows] != 0).any(axis=0)
            sizes += [op.weight.expert(int(e)).num_bytes for e in np.flatnonzero(used_X)]
    return sizes


def counts(ex: Executor) -> ExpertCacheStats:
    stats = expert_cache(ex)
    assert stats is not None
    return stats


@pytest.mark.parametrize("kind", ["i8c", "i4g", "bf16"])
@pytest.mark.parametrize("budget", ["one", "half", "all"])
def test_a_budget_changes_no_bit_and_is_kept(kind: str, budget: str, tmp_path: Path) -> None:
    plan = mapped(make_moe_plan(kind, num_experts=6), tmp_path)
    sizes = touched(plan, BATCH)
    total = sum(op.weight.linear.num_bytes for op in plan.ops if isinstance(op, ExpertLinear))
    num_bytes = {"one": 1, "half": total // 2, "all": total}[budget]
    free, kept = (
        create_executor(
            plan,
            max_rows=64,
            max_out_rows=64,
            num_blocks=4,
            num_threads=2,
            isa=ISA,
            expert_cache_bytes=each,
        )
        for each in (None, num_bytes)
    )
    assert expert_cache(free) is None
    for _ in range(3):
        for ex in (free, kept):
            ex.run(BATCH)
        np.testing.assert_array_equal(kept.buffer("logits")[:40], free.buffer("logits")[:40])
        assert counts(kept).bytes_held <= max(num_bytes, *sizes)
    stats = counts(kept)
    assert stats.num_hits + stats.num_misses == 3 * len(sizes)
    if budget == "all":
        assert (stats.num_misses, stats.bytes_read) == (len(sizes), sum(sizes))
    if budget == "one":
        assert (stats.num_hits, stats.bytes_read) == (0, 3 * sum(sizes))


def test_the_least_recently_used_expert_goes(tmp_path: Path) -> None:
    plan = mapped(make_moe_plan("i8c", num_experts=4, num_active=1, layers=1), tmp_path)
    up, down = (op.weight.expert(0).num_bytes for op in plan.ops if isinstance(op, ExpertLinear))
    first = next(i for i, op in enumerate(plan.ops) if isinstance(op, ExpertLinear)) - 1
    ex = create_executor(
        plan,
        max_rows=4,
        max_out_rows=4,
        num_blocks=4,
        num_threads=2,
        isa=ISA,
        expert_cache_bytes=2 * (up + down),
    )
    batch = make_batch([([1], 0, [0])])
    misses: list[int] = []
    for expert in (0, 1, 0, 2, 0, 1):
        ex.run(batch, 0, first)
        ex.buffer("route")[0] = np.eye(4)[expert]
        ex.run(batch, first)
        misses.append(counts(ex).num_misses)
    assert misses == [2, 4, 4, 6, 6, 8]


def budgeted(plan: StepPlan, num_bytes: int | None, num_threads: int = 2) -> Executor:
    return create_executor(
        plan,
        max_rows=64,
        max_out_rows=64,
        num_blocks=4,
        num_threads=num_threads,
        isa=ISA,
        expert_cache_bytes=num_bytes,
    )


def test_memory_is_what_the_budget_says(tmp_path: Path) -> None:
    plan = mapped(make_moe_plan("bf16", num_experts=8, expert_size=8192, layers=1), tmp_path)
    arrays = [op.weight.linear.data for op in plan.ops if isinstance(op, ExpertLinear)]
    total, largest = sum(each.nbytes for each in arrays), max(each.nbytes // 8 for each in arrays)
    assert len(touched(plan, BATCH)) == 16  # every expert is used
    grown = {}
    for budget in (None, 1, total // 3, total):
        ex = budgeted(plan, budget)
        before = anonymous_bytes()
        ex.run(BATCH)
        grown[budget] = anonymous_bytes() - before
        if budget is not None:
            # Without a budget all is in the mapping, and what grows is what every step needs.
            own, held = grown[budget] - grown[None], counts(ex).bytes_held
            assert budget - largest <= held <= max(budget, largest)
            assert held - largest / 2 <= own <= held + largest / 2
        del ex


def test_reading_leaves_nothing_in_the_systems_cache(tmp_path: Path) -> None:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    if max((place, kind) for place, kind in mounts if tmp_path.is_relative_to(place))[1] == "tmpfs":
        pytest.skip("files in memory stay there")
    plan = mapped(make_moe_plan("bf16", num_experts=8, expert_size=256, layers=1), tmp_path)
    arrays = [op.weight.linear.data for op in plan.ops if isinstance(op, ExpertLinear)]
    budgeted(plan, 1 << 30).run(BATCH)
    pages = os.sysconf("SC_PAGESIZE") * len(arrays)  # numpy reads the head of each file
    assert sum(resident(each) for each in arrays) <= 16 * pages < sum(each.nbytes for each in arrays) / 2


@pytest.mark.parametrize("num_bytes", [1, 1 << 30])
def test_a_file_system_in_memory_serves_as_well(num_bytes: int, tmp_path: Path) -> None:
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("no file system in memory")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        plan = mapped(make_moe_plan("i4g"), Path(name))
        kept, free = budgeted(plan, num_bytes), budgeted(make_moe_plan("i4g"), num_bytes)
        for ex in (kept, free):
            ex.run(BATCH)
        np.testing.assert_array_equal(kept.buffer("logits")[:40], free.buffer("logits")[:40])
        assert counts(kept).bytes_read and not counts(free).bytes_read  # what is in memory stays there


def test_a_file_that_was_cut_is_an_error_and_no_crash(tmp_path: Path) -> None:
    plan = mapped(make_moe_plan("i8c", layers=1), tmp_path)
    ex = budgeted(plan, 1 << 30)
    ex.run(BATCH, 0, 1)
    path = max(tmp_path.iterdir(), key=lambda each: each.stat().st_size)
    content = path.read_bytes()
    os.truncate(path, 4096)
    for _ in range(2):
        with pytest.raises(StorageError, match=rf"{path.name}: it is shorter"):
            ex.run(BATCH)
    path.write_bytes(content)
    ex.run(BATCH)
    whole = budgeted(plan, 1)
    whole.run(BATCH)
    np.testing.assert_array_equal(ex.buffer("logits")[:40], whole.buffer("logits")[:40])
    assert counts(ex).bytes_held == sum(touched(plan, BATCH))


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
    return int(line.split()[1]) * 1024


def resident(array: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> int:
    """Bytes of a mapped array that are in memory."""
    page = os.sysconf("SC_PAGESIZE")
    start = array.ctypes.data // page * page
    length = array.ctypes.data + array.nbytes - start
    pages = (ctypes.c_ubyte * -(-length // page))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), pages) == 0
    return page * sum(each & 1 for each in pages)


def engine(plan: StepPlan, expert_cache_bytes: int | None = None) -> EngineCore:
    ex = create_executor(
        plan,
        max_rows=16,
        max_out_rows=8,
        num_blocks=12,
        num_threads=2,
        isa=ISA,
        expert_cache_bytes=expert_cache_bytes,
    )
    return EngineCore(ex, CoreConfig(num_blocks=12, max_sequences=4))


def test_a_step_reports_what_was_read(tmp_path: Path) -> None:
    core = engine(mapped(make_moe_plan("i8c"), tmp_path), expert_cache_bytes=1 << 30)
    core.submit(EmbeddingState("a", [1, 2, 3] * 10, "last"))
    steps = []
    while core.has_work:
        steps.append(core.step().stats.experts)
    first, second = (each for each in steps if each is not None and each.num_hits + each.num_misses)
    assert first.num_misses and first.bytes_read == first.bytes_held
    assert second.num_hits and second.num_misses <= 4 * 5 - first.num_misses


def test_routing_counts_choices_of_every_token() -> None:
    plan = make_moe_plan("i8c", num_experts=6, num_active=2)
    windows = [list(range(1, 30)), list(range(50, 75))]
    stats = routing(engine(plan), plan, windows)
    assert list(stats) == [0, 1]
    for layer in stats.values():
        assert layer.num_tokens == 29 + 25
        assert layer.load_X.sum() == pytest.approx(1) and layer.weight_X.sum() == pytest.approx(1)
    batch = make_batch([(windows[0], 0, [0])])
    ex = create_executor(plan, max_rows=64, max_out_rows=64, num_blocks=4, isa=ISA)
    ex.run(batch)
    alone = routing(engine(plan), plan, windows[:1])[1]
    np.testing.assert_array_equal(np.rint(alone.load_X * 29 * 2), (ex.buffer("route")[:29] != 0).sum(axis=0))


def test_a_tap_may_change_who_is_asked() -> None:
    plan, seen = make_moe_plan("i8c"), Recording()
    core = engine(plan)
    read = [f"blocks.{layer}.hook_resid_{at}" for layer in (0, 1) for at in ("mid", "post")]
    state = EmbeddingState("a", [1, 2, 3], "last")
    edit = ablate("blocks.0.mlp.hook_route")
    state.taps = (edit, *(Tap(point=point, handler=seen) for point in read))
    core.submit(state)
    while core.has_work:
        core.step()
    state.embedding()
    mid, post, mid_1, post_1 = (seen.rows("a", point).values_TD for point in read)
    np.testing.assert_array_equal(mid, post)
    assert not np.array_equal(mid_1, post_1)


def test_balance_of_a_load() -> None:
    weight_X = np.full(4, 0.25)
    even = RoutingStats(num_tokens=1, load_X=np.full(4, 0.25), weight_X=weight_X)
    assert (even.entropy, even.max_violation, even.num_idle) == (1.0, 0.0, 0)
    uneven = RoutingStats(num_tokens=1, load_X=np.array([0.5, 0.5, 0, 0]), weight_X=weight_X)
    assert (uneven.entropy, uneven.max_violation, uneven.num_idle) == (0.5, 1.0, 2)
    assert uneven.to_json()["load"] == [0.5, 0.5, 0, 0]


def test_routing_needs_experts_and_text() -> None:
    dense, routed = make_plan("i8c"), make_moe_plan("i8c")
    with pytest.raises(UsageError, match="no experts"):
        routing(engine(dense), dense, [[1, 2]])
    with pytest.raises(UsageError, match="no text"):
        routing(engine(routed), routed, [])
