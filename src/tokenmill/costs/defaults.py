"""Constants for a machine that nobody has measured: by its kind, and by how its software starts kernels.

They are round numbers, not a fit: efficiencies and launch times as published for such machines (the
sources are in docs/economics.md). What predictions with them are worth was measured on 98 published
rows of 18 machines by `scripts.validate_plan`; the interval was checked with every machine left out.
"""

from typing import Final, Literal, TypeAlias

from tokenmill.core import UsageError
from tokenmill.costs.calibration import Calibration
from tokenmill.costs.step import Constants

__all__ = ["MACHINE_CLASSES", "RUNTIMES", "MachineClass", "Runtime", "class_calibration", "class_constants"]

MachineClass: TypeAlias = Literal["gpu", "unified", "cpu"]
"""Discrete accelerators; a processor and its graphics on one memory; processors alone."""

Runtime: TypeAlias = Literal["graph", "launch"]
"""Kernels replayed as one captured graph (vLLM, TensorRT-LLM, compiled code), or started one by one."""

MACHINE_CLASSES: Final = ("gpu", "unified", "cpu")
RUNTIMES: Final = ("graph", "launch")

_EFFICIENCIES: Final = {"gpu": (0.8, 0.5, 0.4), "unified": (0.95, 0.8, 0.3), "cpu": (0.6, 0.5, 0.4)}
_LAYER_SECONDS: Final = {"graph": 10e-6, "launch": 100e-6}

# 80 % of 98 published rows lie within this; of a machine left out in turn 79 % (`scripts.validate_plan`).
_LOG_WIDTH: Final = 0.372


def class_constants(machine: MachineClass, runtime: Runtime) -> Constants:
    """The round numbers of a class."""
    if machine not in MACHINE_CLASSES or runtime not in RUNTIMES:
        raise UsageError(
            f"no constants for {machine} with {runtime}",
            hint=f"use one of {', '.join(MACHINE_CLASSES)} and one of {', '.join(RUNTIMES)}",
        )
    weights, kv, compute = _EFFICIENCIES[machine]
    return Constants(
        weights=weights, kv=kv, compute=compute, layer_s=_LAYER_SECONDS[runtime], comm_s=10e-6, row_s=5e-6
    )


def class_calibration(machine: MachineClass, runtime: Runtime) -> Calibration:
    """The same with the interval that published throughput gives them."""
    return Calibration(
        constants=class_constants(machine, runtime),
        log_width=_LOG_WIDTH,
        num_points=98,
        median_error=0.156,
        p90_error=0.699,
        basis=f"not calibrated: constants of the class {machine}, {runtime}",
    )
