"""`tokenmill plan readiness`: what a workload needs of a machine, and what is missing for a decision."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from tokenmill.cli.output import Output, format_bytes
from tokenmill.cli.plan_estimate import binding_shares
from tokenmill.cli.plan_target import (
    Machine,
    Target,
    memory_needed,
    model_bits,
    named_shape,
    open_machine,
    price_fields,
)
from tokenmill.costs import (
    CHARS_PER_TOKEN,
    Traffic,
    load_machine,
    load_shapes,
    max_rate,
    prefix_hits,
    read_traffic,
    usd_per_million,
    waiting_p99,
)

__all__ = ["readiness"]

_FORMATS = ("bf16", "int8", "int4")
_MAX_BATCH = 512
_PACES = {"estimate_s": "estimate", "high_s": "low", "low_s": "high", "bound_s": "bound"}
_NAMES = {"weights": "memory", "kv": "memory (cache)", "compute": "arithmetic", "overhead": "overhead"}


def readiness(args: argparse.Namespace, out: Output) -> int:
    """Print the workload, what of each model fits, and what is missing."""
    traffic = read_traffic(args.workload)
    shapes = load_shapes() if args.model is None else (named_shape(args.model),)
    formats = _formats(args)
    context = traffic.input.p99 + traffic.output.p99
    rows = []
    for shape in shapes:
        for name in formats:
            args.weights = name
            machine = open_machine(args)
            target = Target(
                shape=shape, bits=model_bits(name), kv_value_bytes=args.kv_bits / 8, machine=machine
            )
            rows.append(_row(target, name, traffic, context))
    hits = prefix_hits([call.blocks for call in traffic.calls], 1 << 40)
    missing = _missing(traffic, machine, args)
    _show(out, args, traffic, rows, hits, missing, machine)
    price = machine.price
    out.document(
        {
            "workload": _traffic_fields(traffic, hits),
            "hardware": machine.name,
            "devices": machine.count,
            "models": rows,
            "price": None if price is None else price_fields(price),
            "missing": missing,
        }
    )
    return 0


def _formats(args: argparse.Namespace) -> tuple[str, ...]:
    """The formats to try: of this machine the one that it was calibrated with."""
    if args.weights is not None:
        return (args.weights,)
    return (load_machine().weights,) if args.hardware == "this" else _FORMATS


def _row(target: Target, weights: str, traffic: Traffic, context: int) -> dict[str, Any]:
    """What one model in one format does with the workload."""
    most = min(_MAX_BATCH, target.max_batch(context))
    row: dict[str, Any] = {
        "model": target.shape.name,
        "weights": weights,
        "needed_bytes": memory_needed(target, 1, context),
        "fits": most >= 1,
        "max_batch": most,
    }
    if most < 1:
        return row | {"binds": "memory is too small", "requests_per_s": None}
    rates = {pace: max_rate(_service(target, traffic, pace), most) for pace in _PACES}
    best, needed = rates["estimate_s"], traffic.peak_rate
    row |= {
        "requests_per_s": {name: rates[pace].rate for pace, name in _PACES.items()},
        "batch": best.batch,
        "binds": _binds(target, traffic, best.batch),
        "systems_at_peak": None if needed is None else math.ceil(needed / best.rate),
    }
    service_s = _service(target, traffic, "estimate_s")(best.batch) / best.batch
    return row | _waiting(traffic, best.rate, service_s) | _usd(target, best.rate, traffic)


def _means(traffic: Traffic) -> tuple[float, float]:
    return max(1.0, traffic.input.mean), max(1.0, traffic.output.mean)


def _service(target: Target, traffic: Traffic, pace: str) -> Callable[[int], float]:
    """Seconds of a mean request with so many in flight; `pace` is the field of the prediction."""
    mean_input, mean_output = _means(traffic)
    prefill = target.machine.forecast(target.prefill(mean_input), "prefill")

    def service(batch: int) -> float:
        step = target.machine.forecast(target.decode(batch, mean_input + mean_output / 2), "decode")
        # While one prompt is computed the others of the batch wait.
        return float(batch * getattr(prefill, pace) + mean_output * getattr(step, pace))

    return service


def _binds(target: Target, traffic: Traffic, batch: int) -> str:
    """Where most of the time of a mean request goes."""
    mean_input, mean_output = _means(traffic)
    prefill = target.machine.forecast(target.prefill(mean_input), "prefill").estimate_s
    if batch * prefill > _service(target, traffic, "estimate_s")(batch) / 2:
        return "prefill"
    load = target.decode(batch, mean_input + mean_output / 2)
    shares = binding_shares(target, load, target.machine.decode)
    return _NAMES[max(shares, key=lambda name: shares[name])]


def _waiting(traffic: Traffic, rate: float, service_s: float) -> dict[str, Any]:
    """The wait that one in a hundred exceeds on one system at the mean rate, in closed form."""
    mean, bursts = traffic.rate, traffic.arrival_cv2
    if mean is None or bursts is None or mean >= rate:
        return {"wait_p99_s": None}
    spread = traffic.output_cv2
    return {"wait_p99_s": waiting_p99(mean / rate, service_s, arrival_cv2=bursts, service_cv2=spread)}


def _usd(target: Target, rate: float, traffic: Traffic) -> dict[str, Any]:
    hour = target.machine.hour
    if hour is None:
        return {"usd_per_1000_requests": None, "usd_per_1m_output": None}
    output = usd_per_million(hour, rate * max(1.0, traffic.output.mean), target.machine.utilisation)
    return {
        "usd_per_1000_requests": usd_per_million(hour, rate, target.machine.utilisation) / 1000,
        "usd_per_1m_output": output,
    }


def _missing(traffic: Traffic, machine: Machine, args: argparse.Namespace) -> list[str]:
    """What a decision needs and this plan does not have."""
    missing = []
    if not traffic.counted:
        missing.append(
            f"token counts: the log has none, so {CHARS_PER_TOKEN:g} characters were taken for a token"
        )
    if traffic.output.mean == 0:
        missing.append("answers: without their lengths no decode time is known")
    if not traffic.times:
        missing.append("arrival times: without them no rate, no bursts and no number of machines is known")
    if not any(call.blocks for call in traffic.calls):
        missing.append("shared prefixes: without block hashes no hits are counted, so prefill is too high")
    if machine.price is None:
        missing.append("the price of an hour: give --hour-usd")
    if args.hardware != "this":
        missing.append("a calibration: speeds are of a class of machines; run `plan calibrate` there")
    if machine.energy is None:
        missing.append(f"power: {machine.energy_note}")
    missing.append("quality: nothing here says whether a model is good enough; run your tests on it")
    return missing


def _show(
    out: Output,
    args: argparse.Namespace,
    traffic: Traffic,
    rows: list[dict[str, Any]],
    hits: float,
    missing: list[str],
    machine: Machine,
) -> None:
    lengths = [
        f"{name} mean {each.mean:.0f}, p50 {each.p50}, p99 {each.p99}"
        for name, each in (("input", traffic.input), ("output", traffic.output))
    ]
    out.text(f"{args.workload}: {len(traffic.calls)} requests; tokens: {'; '.join(lengths)}")
    rate, peak, bursts = traffic.rate, traffic.peak_rate, traffic.arrival_cv2
    if rate is not None and peak is not None:
        burst_text = "" if bursts is None else f", gaps vary by {bursts:.2f} (random arrivals: 1)"
        out.text(f"arrivals: {rate:.3g} a second, {peak:.3g} in the fullest minute{burst_text}")
    if hits:
        out.text(f"shared prefixes: {hits:.0%} of blocks, with room for all; not counted below")
    out.text(f"\non {machine.count} x {machine.name}, {format_bytes(machine.memory_bytes)}:")
    columns = ("batch", "requests/s", "80 % interval", "bound", "systems", "$/1000", "binds")
    fastest = _fastest(rows)
    out.table(("model", "weights", "needs", *columns), [_cells(row) for row in fastest])
    if len(rows) > len(fastest):
        out.text("of each model the fastest format that fits; --json has all")
    out.text(f"speed: {machine.decode.basis}")
    if machine.price is not None:
        out.text(f"price: {machine.price}, at work {machine.utilisation:.0%} of the time")
    out.text("missing:")
    for line in missing:
        out.text(f"  {line}")


def _fastest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each model the row with the most requests a second, or the smallest where none fits."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        old = best.get(row["model"])
        if old is None or _rank(row) > _rank(old):
            best[row["model"]] = row
    return list(best.values())


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    return (row["requests_per_s"]["estimate"] if row["fits"] else 0.0, -row["needed_bytes"])


def _cells(row: dict[str, Any]) -> list[str]:
    first = [row["model"], row["weights"], format_bytes(row["needed_bytes"])]
    if not row["fits"]:
        return [*first, "-", "-", "-", "-", "-", "-", row["binds"]]
    speed, usd, systems = row["requests_per_s"], row["usd_per_1000_requests"], row["systems_at_peak"]
    return [
        *first,
        str(row["batch"]),
        f"{speed['estimate']:.3g}",
        f"{speed['low']:.3g}-{speed['high']:.3g}",
        f"{speed['bound']:.3g}",
        "-" if systems is None else str(systems),
        "-" if usd is None else f"{usd:.3g}",
        row["binds"],
    ]


def _traffic_fields(traffic: Traffic, hits: float) -> dict[str, Any]:
    return {
        "num_requests": len(traffic.calls),
        "counted": traffic.counted,
        "input_tokens": traffic.input._asdict(),
        "output_tokens": traffic.output._asdict(),
        "requests_per_s": traffic.rate,
        "peak_requests_per_s": traffic.peak_rate,
        "arrival_cv2": traffic.arrival_cv2,
        "shared_blocks": hits,
    }
