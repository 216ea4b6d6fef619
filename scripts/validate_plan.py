"""How good the planner is on published throughput: uncalibrated, calibrated, and the intervals.

The rows are those of `published_throughput.csv` with a number for batch, context and bandwidth, decode or
prefill; without machines of SRAM, without rows of the largest batch that fits, without the five rows that
mix prefill into what they measured. Nothing else is left out. Error is |predicted - measured| / measured
of tokens a second; of rows with a median time between tokens, measured is batch / that time.

    python -m scripts.validate_plan [FILE]
"""

import csv
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenmill.costs.calibration import Observation, fit_constants, held_out_errors, interval_width
from tokenmill.costs.catalogue import find_shape, load_shapes
from tokenmill.costs.defaults import MachineClass, Runtime, class_constants
from tokenmill.costs.hardware import Hardware, find_hardware, load_hardware
from tokenmill.costs.shape import ModelShape
from tokenmill.costs.step import Constants, Form, bound_seconds, decode_load, prefill_load, step_seconds

FILE = Path(__file__).parents[1] / "../shared/data/hardware/published_throughput.csv"
SAME_MACHINES = (
    ("A100-SXM-80GB (330 W cap)", "gpt-fast"),
    ("DGX Spark (GB10)", "llama"),
    ("H100-SXM-80GB", "vLLM"),
)

_PHASES = ("decode", "prefill", "decode+prefill steady state")
_ALIASES = {
    "A100-SXM-80GB (330 W cap)": "A100-SXM-80GB",
    "AMD EPYC 9554 (1 socket)": "EPYC 9554 (Genoa, 64c)",
    "AMD EPYC 9334 (2 sockets)": "EPYC 9334 (Genoa, 2 x 32c)",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published row that can be predicted. `machine` is hardware and engine."""

    id: str
    hardware: Hardware
    machine: tuple[str, str]
    runtime: Runtime
    observation: Observation

    @property
    def machine_class(self) -> MachineClass:
        """Of the hardware."""
        return self.hardware.machine_class

    @property
    def prior(self) -> Constants:
        """What is assumed without any measurement."""
        return class_constants(self.machine_class, self.runtime)


class Errors(NamedTuple):
    """Relative errors of tokens a second, in percent."""

    mean: float
    median: float
    p90: float


def read_rows(path: Path = FILE) -> list[Row]:
    """The rows that are scored."""
    machines, shapes = load_hardware(), load_shapes()
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for fields in csv.DictReader(file):
            if not is_scored(fields):
                continue
            hardware = find_hardware(machines, _ALIASES.get(fields["hardware"], fields["hardware"]))
            shape = find_shape(shapes, fields["model"])
            assert math.isclose(shape.params, 1e9 * float(fields["total_params_b"]), rel_tol=1e-3), shape.name
            rows.append(_row(fields, hardware, shape))
    return rows


def is_scored(fields: Mapping[str, str]) -> bool:
    """The rules of the page: phase, numbers, no SRAM machine."""
    is_sram = fields["hardware"].startswith(("Groq", "Cerebras"))
    return (
        fields["phase"] in _PHASES
        and not is_sram
        and is_number(fields["batch"])
        and is_number(fields["context_tokens"])
    )


def is_number(text: str) -> bool:
    """Whether a field is a plain number."""
    return text.replace(".", "", 1).isdigit()


def measured_seconds(fields: Mapping[str, str]) -> float:
    """Seconds of one decode step, or of the whole prompt."""
    if fields["phase"] == "prefill":
        return float(fields["context_tokens"]) / float(fields["measured_tok_s"])
    if fields["median_itl_ms"]:
        return float(fields["median_itl_ms"]) / 1000
    return float(fields["batch"]) / float(fields["measured_tok_s"])


def runtime_of(engine: str) -> Runtime:
    """Engines that replay graphs or compiled steps, and llama.cpp, which starts kernel after kernel."""
    return "launch" if "llama" in engine.lower() else "graph"


def _row(fields: Mapping[str, str], hardware: Hardware, shape: ModelShape) -> Row:
    bits, context = float(fields["weight_bits_effective"]), float(fields["context_tokens"])
    num_devices = int(fields["n_devices"])
    if fields["phase"] == "prefill":
        load = prefill_load(
            shape,
            bits=bits,
            num_tokens=context,
            num_devices=num_devices,
            link_bytes_per_s=hardware.link_bytes_per_s,
        )
    else:
        load = decode_load(
            shape,
            bits=bits,
            batch=float(fields["batch"]),
            context=context,
            num_devices=num_devices,
            link_bytes_per_s=hardware.link_bytes_per_s,
        )
    low_precision = fields["weight_precision"] == "fp8"
    return Row(
        id=fields["id"],
        hardware=hardware,
        machine=(fields["hardware"], fields["engine"].split()[0]),
        runtime=runtime_of(fields["engine"]),
        observation=Observation(
            load=load,
            peak=hardware.peak(low_precision=low_precision),
            seconds=measured_seconds(fields),
            group=fields["model"],
        ),
    )


def errors_of(log_errors: Sequence[float]) -> Errors:
    """From logarithms of predicted / measured time to errors of the speed."""
    relative = 100 * np.abs(np.expm1(-np.array(log_errors)))
    return Errors(float(relative.mean()), float(np.median(relative)), float(np.quantile(relative, 0.9)))


def roofline_errors(rows: Sequence[Row]) -> list[float]:
    """The data sheet alone: the longer of memory and arithmetic, and nothing lost."""
    ideal = Constants(weights=1.0, kv=1.0, compute=1.0, layer_s=0.0, comm_s=0.0, row_s=0.0)
    return [_log_error(row, ideal, "max") for row in rows]


def above_bound(rows: Sequence[Row]) -> list[str]:
    """Rows that were measured faster than the bound allows, by more than 2 % of noise."""
    each = [(row.id, row.observation) for row in rows]
    return [id for id, o in each if bound_seconds(o.load, o.peak) > 1.02 * o.seconds]


def class_errors(rows: Sequence[Row], form: Form = "sum") -> list[float]:
    """The round numbers of each class; nothing is fitted."""
    return [_log_error(row, row.prior, form) for row in rows]


def machine_out_errors(rows: Sequence[Row], form: Form = "sum") -> list[float]:
    """Constants of each class and runtime fitted on the other machines."""
    log_errors = []
    for row in rows:
        rest = [
            other.observation
            for other in rows
            if other.machine[0] != row.machine[0]
            and (other.machine_class, other.runtime) == (row.machine_class, row.runtime)
        ]
        log_errors.append(_log_error(row, fit_constants(rest, row.prior, form), form))
    return log_errors


def calibrated_errors(rows: Sequence[Row], form: Form = "sum") -> list[float]:
    """Six constants for each of the three machines, every model predicted from the others."""
    return [
        held.log_error
        for group in same_machines(rows)
        for held in held_out_errors([row.observation for row in group], group[0].prior, form)
    ]


def same_machines(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows of each of the three machines with one engine and many rows."""
    for machine in SAME_MACHINES:
        yield [row for row in rows if row.machine[0] == machine[0] and row.machine[1].startswith(machine[1])]


def covered(rows: Sequence[Row]) -> list[bool]:
    """Whether each row of the three machines lies in its interval; neither fit nor width saw its model."""
    inside = []
    for group in same_machines(rows):
        observations = [row.observation for row in group]
        for held in held_out_errors(observations, group[0].prior):
            rest = [each for each in observations if each.group != held.observation.group]
            inner = [other.log_error for other in held_out_errors(rest, group[0].prior)]
            inside.append(abs(held.log_error) <= interval_width(inner))
    return inside


def class_covered(rows: Sequence[Row]) -> list[bool]:
    """Whether each row lies in the interval that the other machines give the round numbers."""
    log_errors = class_errors(rows)
    inside = []
    for row, own in zip(rows, log_errors, strict=True):
        rest = [e for e, other in zip(log_errors, rows, strict=True) if other.machine[0] != row.machine[0]]
        inside.append(abs(own) <= interval_width(rest))
    return inside


def _log_error(row: Row, constants: Constants, form: Form) -> float:
    each = row.observation
    return math.log(step_seconds(each.load, each.peak, constants, form) / each.seconds)


def main() -> None:
    """Print all figures."""
    rows = read_rows(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
    same = [row for group in same_machines(rows) for row in group]
    print(f"{len(rows)} rows of {len({row.machine[0] for row in rows})} machines; {len(same)} rows of three")
    for name, errors in (
        ("all: data sheet", roofline_errors(rows)),
        ("all: classes, nothing fitted", class_errors(rows)),
        ("all: classes, max form", class_errors(rows, "max")),
        ("all: classes fitted, machine left out", machine_out_errors(rows)),
        ("three: data sheet", roofline_errors(same)),
        ("three: classes, nothing fitted", class_errors(same)),
        ("three: calibrated, model left out", calibrated_errors(rows)),
        ("three: the same, max form", calibrated_errors(rows, "max")),
    ):
        mean, median, p90 = errors_of(errors)
        print(f"{name:40} mean {mean:5.1f} %  median {median:5.1f} %  p90 {p90:5.1f} %")
    print(f"rows measured faster than their bound: {above_bound(rows) or 'none'}")
    print(f"width of the classes' interval: {interval_width(class_errors(rows)):.3f}")
    for name, inside in (("calibrated", covered(rows)), ("classes", class_covered(rows))):
        share = 100 * sum(inside) / len(inside)
        print(f"80 % intervals, {name}: cover {share:.0f} % of {len(inside)} rows left out")


if __name__ == "__main__":
    main()
