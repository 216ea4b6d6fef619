"""Joules of a step where nothing measures them, and of a token with everything around it.

The energy of a step is affine in its time and its arithmetic: J = P0 t + c FLOPs. P0 is the power while
decoding, reads of memory included, not idle power. Fitted on published measurements the error was 6.7 %
on H100 and 13.4 % on B200 with every model left out in turn, given the time of the step; the time of a
board at full power misses by a quarter. For other machines only a range can be said.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

__all__ = [
    "EnergyModel",
    "EnergyRange",
    "effective_joules",
    "measured_energy_model",
    "step_joules",
    "tdp_energy_model",
]


@dataclass(frozen=True, kw_only=True)
class EnergyModel:
    """Watts while a step runs, joules for each operation, and the relative error to expect.

    `basis` says for people where it comes from; what it gives is always an estimate.
    """

    watts: float
    joules_per_flop: float
    error: float
    basis: str


class EnergyRange(NamedTuple):
    """Joules: an estimate, and what it may be."""

    joules: float
    low: float
    high: float


_FITTED: Final = {
    "H100-SXM-80GB": EnergyModel(
        watts=441.0, joules_per_flop=1.45e-12, error=0.067, basis="80 published H100 configurations, vLLM"
    ),
    "B200-SXM-180GB": EnergyModel(
        watts=698.0, joules_per_flop=0.78e-12, error=0.134, basis="75 published B200 configurations, vLLM"
    ),
}


def measured_energy_model(hardware: str) -> EnergyModel | None:
    """The model of a machine with published measurements; devices only, without the rest of the server."""
    return _FITTED.get(hardware)


def tdp_energy_model(tdp_w: float) -> EnergyModel:
    """Where only the rated power is known: 80 % of it, give or take 40 %, whatever is computed."""
    return EnergyModel(
        watts=0.8 * tdp_w, joules_per_flop=0.0, error=0.4, basis=f"80 % of the rated {tdp_w:g} W, assumed"
    )


def step_joules(model: EnergyModel, seconds: float, flops: float, num_devices: int = 1) -> EnergyRange:
    """Joules of a step of `seconds` that computes `flops` over all devices."""
    joules = model.watts * num_devices * seconds + model.joules_per_flop * flops
    return EnergyRange(joules, joules * (1 - model.error), joules * (1 + model.error))


def effective_joules(
    joules_per_token: float, *, tokens_per_s: float, idle_w: float, utilisation: float, pue: float = 1.0
) -> float:
    """Joules a token at the meter of the building: idle hours are paid by the tokens of the busy ones."""
    idle = idle_w * (1 - utilisation) / (utilisation * tokens_per_s)
    return (joules_per_token + idle) * pue
