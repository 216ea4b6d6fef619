"""The swap tier: blocks come back as they went, to any block, and a full disk is an error at the start.

Run: pytest tests/fast/test_swap.py
"""

import errno
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.fast.engine_fakes import FakeExecutor
from tests.fast.random_plan import make_batch
from tests.fast.test_executor import executor, logits, tokens
from tokenmill.core import StorageError
from tokenmill.engine.swap import SwapFile, measure_swap
from tokenmill.kernels import KV_DTYPES, KvDtype, available_isas

BLOCK = 5_000
"""Bytes; no multiple of a page."""


def block_of(seed: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    return np.random.default_rng(seed).integers(0, 256, BLOCK).astype(np.uint8)


def test_slots_are_apart(tmp_path: Path) -> None:
    with SwapFile(tmp_path, 3, BLOCK) as swap:
        for slot in (0, 1, 2, 1):
            swap.put(slot, block_of(slot))
        for slot in (2, 0, 1):
            back = np.zeros(BLOCK, np.uint8)
            swap.get(slot, back)
            np.testing.assert_array_equal(back, block_of(slot))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_sequence_swapped_out_goes_on_in_other_blocks(kv_dtype: KvDtype, isa: str) -> None:
    prompt, last = tokens(8, 40), [5]
    undisturbed, ex = (executor(1, "i8c", isa, kv_dtype=kv_dtype) for _ in range(2))
    undisturbed.run(make_batch([(prompt, 0, [2, 6])]))
    want = logits(undisturbed, make_batch([(last, 40, [2, 6])]))
    ex.run(make_batch([(prompt, 0, [2, 6])]))
    with SwapFile(None, 4, ex.block(0).nbytes) as swap:
        for slot, block in ((3, 2), (1, 6)):
            swap.put(slot, ex.block(block))
        ex.run(make_batch([(tokens(9, 50), 0, [6, 2])]))
        for slot, block in ((3, 6), (1, 20)):
            swap.get(slot, ex.block(block))
    np.testing.assert_array_equal(logits(ex, make_batch([(last, 40, [6, 20])])), want)


def test_blocks_of_the_fake_executor_swap_and_copy_too() -> None:
    ex = FakeExecutor(num_blocks=4, max_rows=64, max_out_rows=4)
    batch = make_batch([([1, 2, 3], 0, [1])], out_rows=[2])
    ex.run(batch)
    with SwapFile(None, 1, ex.block(1).nbytes) as swap:
        swap.put(0, ex.block(1))
        swap.get(0, ex.block(3))
    ex.copy_blocks([(3, 0)])
    np.testing.assert_array_equal(ex.block(0), ex.block(1))
    with pytest.raises(ValueError, match="KV block out of range"):
        ex.block(4)


def test_the_file_has_no_name_and_its_space_is_taken_and_given_back(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    swap = SwapFile(tmp_path, 2, 1 << 20)
    assert list(tmp_path.iterdir()) == []
    swap.close()
    swap.close()
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(AssertionError, match="slot 0 of 0"):
        swap.put(0, np.zeros(1 << 20, np.uint8))


def test_a_full_disk_is_an_error_at_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        assert (offset, length) == (0, 4 * BLOCK), "all of the space is asked for"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        SwapFile(tmp_path, 4, BLOCK)
    assert str(tmp_path) in caught.value.message and "smaller" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_the_system_is_an_error_at_creation(tmp_path: Path) -> None:
    """The same without a stand-in: the kernel refuses to grow the file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StorageError, match="no swap file of 2 MiB"):
            SwapFile(tmp_path, 2, 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        SwapFile(tmp_path / "nowhere", 1, BLOCK)


@pytest.mark.parametrize(("slot", "size"), [(-1, BLOCK), (2, BLOCK), (0, 1), (0, BLOCK + 1)])
def test_a_wrong_slot_or_block_is_a_bug_not_a_write(tmp_path: Path, slot: int, size: int) -> None:
    with SwapFile(tmp_path, 2, BLOCK) as swap:
        for move in (swap.put, swap.get):
            with pytest.raises(AssertionError):
                move(slot, np.zeros(size, np.uint8))


def test_the_measured_time_is_that_of_a_block(tmp_path: Path) -> None:
    with SwapFile(tmp_path, 1, BLOCK) as one, SwapFile(tmp_path, 8, 4 << 20) as many:
        assert 0 < measure_swap(one) < measure_swap(many) < 1
