"""Adapters by name: which of the executor's slots holds which, and who may use it.

An adapter is read and packed when it is loaded; a request names it, and rows of many adapters and of none
share a step. Files and arithmetic are in `models.adapter` and the kernels.
"""

from pathlib import Path
from typing import NamedTuple

from tokenmill.core import NotFoundError, ResourceError, UsageError
from tokenmill.kernels import Executor
from tokenmill.models.adapter import pack_adapter, read_adapter
from tokenmill.models.architecture import Architecture

__all__ = ["NO_ADAPTER", "AdapterSlot", "AdapterSlots"]


class AdapterSlot(NamedTuple):
    """A slot of the executor, and the SHA-256 of what is in it."""

    number: int
    digest: str


NO_ADAPTER = AdapterSlot(-1, "")
"""The plain model."""


class AdapterSlots:
    """The adapters loaded into one executor, which has `num_slots` slots."""

    def __init__(self, executor: Executor, architecture: Architecture, num_slots: int) -> None:
        self._executor = executor
        self._architecture = architecture
        self._free = list(range(num_slots - 1, -1, -1))
        self._num_slots = num_slots
        self._loaded: dict[str, AdapterSlot] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that requests may name."""
        return tuple(self._loaded)

    def load(self, name: str, folder: Path) -> None:
        """Read an adapter in the layout of PEFT and give it a slot.

        Raises UsageError for a name that is empty or taken, ResourceError if no slot is free, and what
        `read_adapter` raises; then nothing has changed.
        """
        if not name or name in self._loaded:
            raise UsageError(
                f"an adapter named {name!r} is loaded already" if name else "an adapter needs a name",
                hint="choose another name, or unload it first",
            )
        if not self._free:
            raise ResourceError(
                f"all {self._num_slots} adapter slots are taken", hint="raise max_adapters, or unload one"
            )
        packed = pack_adapter(read_adapter(folder, self._architecture), self._executor.plan)
        slot = self._free.pop()
        self._executor.set_adapter(slot, packed)
        self._loaded[name] = AdapterSlot(slot, packed.digest)

    def unload(self, name: str) -> None:
        """Free an adapter's slot. No request may be using it. Raises NotFoundError as `find` does."""
        slot = self.find(name).number
        del self._loaded[name]
        self._executor.set_adapter(slot, None)
        self._free.append(slot)

    def check(self, slot: AdapterSlot) -> None:
        """Raise NotFoundError unless this is still loaded there."""
        if slot != NO_ADAPTER and slot not in self._loaded.values():
            raise NotFoundError("the adapter of a request was unloaded", hint="send the request again")

    def find(self, name: str) -> AdapterSlot:
        """The slot of an adapter; the empty name is the plain model. Raises NotFoundError if not loaded."""
        if not name:
            return NO_ADAPTER
        if name not in self._loaded:
            known = ", ".join(self._loaded) or "none"
            raise NotFoundError(f"no adapter named {name!r} is loaded", hint=f"loaded are: {known}")
        return self._loaded[name]
