"""The calibration of this machine, kept in the user's data folder so that later plans use it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import msgspec

from tokenmill.core import NotFoundError, StorageError
from tokenmill.costs.calibration import Calibration
from tokenmill.costs.roofline import ReadRate, bandwidth_at
from tokenmill.costs.step import MachinePeak
from tokenmill.costs.tables import data_home, write_atomically

__all__ = ["CALIBRATION_FILE", "MeasuredMachine", "load_machine", "save_machine"]

CALIBRATION_FILE: Final = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class MeasuredMachine:
    """A machine as measured on `date` with `model` in `weights`: its rates, and what it made of them.

    `flops`: operations a second of the products of these weights. `watts`: mean power while
    the steps were measured, None where no counter could be read, with the reason in `energy_note`.
    """

    name: str
    date: str
    model: str
    weights: str
    num_threads: int
    flops: float
    reads: tuple[ReadRate, ...]
    memory_bytes: float
    decode: Calibration
    prefill: Calibration
    watts: float | None
    energy_note: str

    def peak(self, step_bytes: float) -> MachinePeak:
        """Rates for a step that reads so many bytes: what a cache holds comes faster."""
        return MachinePeak(flops=self.flops, bytes_per_s=bandwidth_at(self.reads, step_bytes))


def save_machine(machine: MeasuredMachine, home: Path | None = None) -> Path:
    """Write it; returns where. Raises StorageError."""
    target = (home or data_home()) / CALIBRATION_FILE
    write_atomically(target, (json.dumps(asdict(machine), indent=1) + "\n").encode())
    return target


def load_machine(home: Path | None = None) -> MeasuredMachine:
    """The saved one. Raises NotFoundError if there is none, StorageError if it is damaged."""
    path = (home or data_home()) / CALIBRATION_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=MeasuredMachine, strict=False)
    except FileNotFoundError as error:
        raise NotFoundError(
            "this machine is not calibrated", hint="run `tokenmill plan calibrate MODEL`, or name --hardware"
        ) from error
    except (OSError, msgspec.MsgspecError, AssertionError) as error:
        raise StorageError(
            f"{path} is damaged ({error})", hint="run `tokenmill plan calibrate MODEL`"
        ) from error
