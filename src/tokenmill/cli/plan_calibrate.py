"""`tokenmill plan calibrate`: the constants of this machine from a handful of real steps."""

import argparse
import datetime
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tokenmill.cli.arguments import open_model
from tokenmill.cli.machine import limits_line, machine_fields, measure
from tokenmill.cli.output import Output
from tokenmill.cli.plan_points import POINTS, MeasuredPoint, PointSource, measure_points
from tokenmill.costs import (
    Calibration,
    EnergyMeter,
    MeasuredMachine,
    Observation,
    Unmeasured,
    class_constants,
    find_counters,
    save_machine,
    step_seconds,
)
from tokenmill.costs import calibrate as fit

if TYPE_CHECKING:
    from tokenmill.cli.machine import Machine

__all__ = ["calibrate"]


def calibrate(args: argparse.Namespace, out: Output) -> int:
    """Measure, fit, save, and say what it is worth."""
    model = open_model(args.model)
    machine = measure(out, num_threads=args.threads)
    out.text(limits_line(machine.limits))
    source = PointSource(model=model, weights=args.weights, limits=machine.limits, num_threads=args.threads)
    counters = find_counters()
    meter = None if isinstance(counters, Unmeasured) else EnergyMeter(counters)
    start = time.perf_counter()
    points: list[MeasuredPoint] = []
    with out.progress("point") as bar:
        for point in measure_points(source, POINTS, budget_s=args.seconds):
            points.append(point)
            if meter is not None:
                meter.poll()
            bar("measured", len(points), len(POINTS))
    watts = None if meter is None else meter.poll() / (time.perf_counter() - start)
    note = counters.why if isinstance(counters, Unmeasured) else ""
    today = datetime.date.today().isoformat()
    prior = class_constants("cpu", "graph")
    basis = f"calibrated on {today} with {model.name}, {args.weights}"
    decode = fit([point.decode for point in points], prior, basis)
    prefill = fit([point.prefill for point in points], prior, basis)
    saved = MeasuredMachine(
        name=machine.hardware.cpu_model or "unknown processor",
        date=today,
        model=model.name,
        weights=args.weights,
        num_threads=machine.limits.num_threads,
        flops=source.flops,
        reads=source.rates.reads,
        memory_bytes=float(machine.hardware.memory_available or 0),
        decode=decode,
        prefill=prefill,
        watts=watts,
        energy_note=note,
    )
    path = save_machine(saved)
    _show(out, points, saved)
    out.text(f"saved in {path}; `--hardware this` uses it")
    out.document(_fields(saved, points, machine) | {"path": str(path)})
    return 0


def _show(out: Output, points: list[MeasuredPoint], saved: MeasuredMachine) -> None:
    header = ("batch", "prompt", "decode ms", "fitted", "prefill ms", "fitted")
    rows = []
    for point in points:
        cells = [str(point.batch), str(point.prompt)]
        for each, found in ((point.decode, saved.decode), (point.prefill, saved.prefill)):
            cells += [f"{1e3 * each.seconds:.2f}", f"{1e3 * _fitted(each, found):.2f}"]
        rows.append(cells)
    out.table(header, rows)
    for name, found in (("decode", saved.decode), ("prefill", saved.prefill)):
        constants = found.constants
        out.text(
            f"{name}: {constants.weights:.0%} of the bandwidth for weights, "
            f"{constants.kv:.0%} for the cache, {constants.compute:.0%} of the arithmetic, "
            f"{1e6 * constants.layer_s:.0f} us a layer, "
            f"{1e6 * constants.row_s:.0f} us a row; left out one by one the median error is "
            f"{found.median_error:.1%}, nine in ten are within {found.p90_error:.1%}"
        )
    energy = "not measured: " + saved.energy_note if saved.watts is None else f"{saved.watts:.1f} W, measured"
    out.text(f"energy: {energy}")


def _fitted(each: Observation, found: Calibration) -> float:
    return step_seconds(each.load, each.peak, found.constants, found.form)


def _fields(saved: MeasuredMachine, points: list[MeasuredPoint], machine: "Machine") -> dict[str, Any]:
    rows = [
        {
            "batch": point.batch,
            "prompt": point.prompt,
            "decode_s": point.decode.seconds,
            "decode_fitted_s": _fitted(point.decode, saved.decode),
            "prefill_s": point.prefill.seconds,
            "prefill_fitted_s": _fitted(point.prefill, saved.prefill),
        }
        for point in points
    ]
    return {"calibration": asdict(saved), "points": rows, "machine": machine_fields(machine)}
