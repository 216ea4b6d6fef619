"""The swap tier: bytes of KV blocks in a mapped file, so that a preempted request need not compute again.

The disk's space is taken when the file is made, so a full disk is an error then and never a SIGBUS in the
middle of a step. The file has no name: it is gone with the process, however that ends. Who owns which slot
is not known here (that is `kvcache`), nor when swapping pays: `measure_swap` gives the one figure for it.
"""

import mmap
import os
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from tokenmill.core import StorageError

__all__ = ["SwapFile", "measure_swap"]

_MEASURED_SLOTS = 4


class SwapFile:
    """`num_slots` places of `block_bytes` bytes in a mapped file without a name.

    `folder` None is the system's folder for temporary files; if that lies in memory (tmpfs), so do the
    blocks. Raises StorageError if the folder cannot be written or has no room.
    """

    def __init__(self, folder: Path | None, num_slots: int, block_bytes: int) -> None:
        assert num_slots > 0 and block_bytes > 0, f"{num_slots} slots of {block_bytes} bytes"
        self.num_slots = num_slots
        self.block_bytes = block_bytes
        self._map = _map_new_file(folder, num_slots * block_bytes)
        self._slots: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8).reshape(
            num_slots, block_bytes
        )

    def put(self, slot: int, view: npt.NDArray[np.uint8]) -> None:
        """Copy a block, [block_bytes], into a slot."""
        self._slot(slot, view)[:] = view

    def get(self, slot: int, view: npt.NDArray[np.uint8]) -> None:
        """Copy a slot into a block, [block_bytes]."""
        view[:] = self._slot(slot, view)

    def close(self) -> None:
        """Give the space back. A second call does nothing."""
        self._slots = self._slots[:0].copy()
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _slot(self, slot: int, view: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        assert 0 <= slot < len(self._slots), f"slot {slot} of {len(self._slots)}"
        assert view.shape == (self.block_bytes,), f"a block of {view.shape}, not {self.block_bytes} bytes"
        place: npt.NDArray[np.uint8] = self._slots[slot]
        return place


def measure_swap(file: SwapFile) -> float:
    """Seconds to put one block and get it back, a mean over a few slots, which are overwritten.

    The slots of a new file are touched for the first time, which is the dear case. What the disk itself
    takes, later and beside the computation, is not in it.
    """
    block = np.ones(file.block_bytes, np.uint8)
    slots = range(min(_MEASURED_SLOTS, file.num_slots))
    for slot in slots:
        file.put(slot, block)  # its memory is there from now on, as it is for most of a slot's uses
    began = time.perf_counter()
    for slot in slots:
        file.put(slot, block)
        file.get(slot, block)
    return (time.perf_counter() - began) / len(slots)


def _map_new_file(folder: Path | None, num_bytes: int) -> mmap.mmap:
    place = folder or Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        raise StorageError(
            f"{place}: no swap file of {num_bytes >> 20} MiB ({os.strerror(error.errno or 0)})",
            hint="choose a folder with more room, or a smaller swap space",
        ) from error
