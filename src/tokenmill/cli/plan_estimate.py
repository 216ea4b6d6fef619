"""`tokenmill plan estimate`: one model, one machine, one load."""

import argparse
from dataclasses import asdict, replace
from typing import Any

from tokenmill.cli.output import Output, format_bytes, format_count
from tokenmill.cli.plan_target import (
    Machine,
    Phase,
    Target,
    check_memory,
    memory_needed,
    open_target,
    price_fields,
    speed_fields,
)
from tokenmill.costs import Calibration, Prediction, StepLoad, critical_batch, step_terms, usd_per_million

__all__ = ["binding_shares", "estimate"]

_BINDS = {
    "weights": "reading weights",
    "kv": "reading the cache",
    "compute": "arithmetic",
    "overhead": "overhead of layers, exchanges and rows",
}


def estimate(args: argparse.Namespace, out: Output) -> int:
    """Print speed, memory, energy and cost."""
    target = open_target(args)
    machine = replace(
        target.machine,
        decode=replace(target.machine.decode, form=args.form),
        prefill=replace(target.machine.prefill, form=args.form),
    )
    target = replace(target, machine=machine)
    decode, prefill = target.decode(args.batch, args.context), target.prefill(args.context)
    phases = {
        "decode": _phase(target, decode, "decode", args.batch),
        "prefill": _phase(target, prefill, "prefill", args.context),
    }
    out.text(
        f"{target.shape.name}, {target.bits:g} bits, on {_counted(machine)}: batch {args.batch}, "
        f"context {args.context}"
    )
    out.table(
        ("phase", "bound tok/s", "estimate", "80 % interval", "J/token", "$/1M", "binds"),
        [_cells(name, phase) for name, phase in phases.items()],
    )
    problem = check_memory(target, args.batch, args.context)
    _notes(out, target, args, problem)
    peak = machine.peak(decode.weight_bytes + decode.kv_bytes)
    out.document(
        {
            "model": asdict(target.shape),
            "bits": target.bits,
            "hardware": machine.name,
            "devices": machine.count,
            "batch": args.batch,
            "context": args.context,
            **phases,
            "user_tokens_per_s": phases["decode"]["tokens_per_s"]["estimate"] / args.batch,
            "ttft_s": args.context / phases["prefill"]["tokens_per_s"]["estimate"],
            "critical_batch": critical_batch(target.shape, target.bits, peak),
            "memory": {
                "needed_bytes": memory_needed(target, args.batch, args.context),
                "there_bytes": machine.memory_bytes,
                "fits": not problem,
                "max_batch": target.max_batch(args.context),
            },
            "price": None if machine.price is None else price_fields(machine.price),
            "calibration": asdict(machine.decode),
            "energy_note": machine.energy_note or (machine.energy.basis if machine.energy else ""),
        }
    )
    return 0


def binding_shares(target: Target, load: StepLoad, calibration: Calibration) -> dict[str, float]:
    """The share of the estimated step that each cause takes; of the summed form."""
    constants = calibration.constants
    terms = step_terms(load, target.machine.peak(load.weight_bytes + load.kv_bytes))
    parts = {
        "weights": terms.weights / constants.weights,
        "kv": terms.kv / constants.kv,
        "compute": terms.compute / constants.compute,
        "overhead": terms.layers * constants.layer_s
        + terms.exchanges * constants.comm_s
        + terms.rows * constants.row_s
        + load.exchange_s,
    }
    total = sum(parts.values())
    return {name: part / total for name, part in parts.items()}


def _phase(target: Target, load: StepLoad, phase: Phase, tokens: float) -> dict[str, Any]:
    machine = target.machine
    prediction = machine.forecast(load, phase)
    shares = binding_shares(target, load, machine.decode if phase == "decode" else machine.prefill)
    return {
        "tokens_per_s": speed_fields(prediction, tokens),
        "joules_per_token": _joules(machine, load, prediction, tokens),
        "usd_per_1m": _usd(machine, prediction, tokens),
        "shares": shares,
        "binds": max(shares, key=lambda name: shares[name]),
    }


def _joules(machine: Machine, load: StepLoad, prediction: Prediction, tokens: float) -> dict[str, Any] | None:
    """Energy with both errors: of the power, and of the time."""
    fast, middle, slow = (
        machine.joules(load, seconds)
        for seconds in (prediction.low_s, prediction.estimate_s, prediction.high_s)
    )
    if fast is None or middle is None or slow is None or machine.energy is None:
        return None
    return {
        "estimate": middle.joules / tokens,
        "low": fast.low / tokens,
        "high": slow.high / tokens,
        "source": "estimated",
        "basis": machine.energy.basis,
    }


def _usd(machine: Machine, prediction: Prediction, tokens: float) -> dict[str, float] | None:
    if machine.hour is None:
        return None
    speeds = speed_fields(prediction, tokens)
    usd = {name: usd_per_million(machine.hour, speed, machine.utilisation) for name, speed in speeds.items()}
    return {"estimate": usd["estimate"], "low": usd["high"], "high": usd["low"]}


def _cells(name: str, phase: dict[str, Any]) -> list[str]:
    speed, joules, usd = phase["tokens_per_s"], phase["joules_per_token"], phase["usd_per_1m"]
    return [
        name,
        _figure(speed["bound"]),
        _figure(speed["estimate"]),
        f"{_figure(speed['low'])}-{_figure(speed['high'])}",
        "-" if joules is None else f"{joules['estimate']:.3g} ({joules['low']:.2g}-{joules['high']:.2g})",
        "-" if usd is None else f"{usd['estimate']:.3g} ({usd['low']:.2g}-{usd['high']:.2g})",
        f"{_BINDS[phase['binds']]} ({phase['shares'][phase['binds']]:.0%})",
    ]


def _notes(out: Output, target: Target, args: argparse.Namespace, problem: str) -> None:
    machine = target.machine
    calibration = machine.decode
    out.text(
        f"speed: {calibration.basis}; median error {calibration.median_error:.0%}, nine in ten within "
        f"{calibration.p90_error:.0%}, of {calibration.num_points} points"
    )
    if machine.price is not None:
        out.text(f"price: {machine.price}, at work {machine.utilisation:.0%} of the time")
    else:
        out.text("price: none is known for this machine; give --hour-usd")
    energy = f"estimated from {machine.energy.basis}" if machine.energy else machine.energy_note
    out.text(f"energy: {energy}")
    needed = format_bytes(memory_needed(target, args.batch, args.context))
    out.text(
        f"memory: {needed} of {format_bytes(machine.memory_bytes)}; "
        f"at most {format_count(target.max_batch(args.context))} sequences of {args.context} tokens"
    )
    if problem:
        out.warn(problem)


def _counted(machine: Machine) -> str:
    return machine.name if machine.count == 1 else f"{machine.count} x {machine.name}"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
