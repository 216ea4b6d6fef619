"""`tokenmill plan compare` and `tiers`: hosting against a price list, and speed against cost."""

import argparse
from dataclasses import asdict
from typing import Any, NamedTuple

from tokenmill.cli.output import Output, format_count
from tokenmill.cli.plan_target import Target, check_memory, open_target, price_fields, speed_fields
from tokenmill.core import UsageError
from tokenmill.costs import (
    ApiRates,
    BreakEven,
    HourlyCost,
    Price,
    break_even,
    break_even_utilisation,
    find_price,
    load_prices,
    usd_per_million,
)
from tokenmill.costs import tiers as tier_rows

__all__ = ["compare", "tiers"]

_CHANGES = (
    ("as estimated", False, 1.0),
    ("slow end of the interval", True, 1.0),
    ("the provider's price halves", False, 0.5),
    ("the provider's price falls to a tenth", False, 0.1),
)


class _Outcome(NamedTuple):
    """Hosting against the provider under one assumption."""

    name: str
    output_tokens_per_s: float
    usd_per_1m_output: float
    utilisation: float | None
    volume: BreakEven


def compare(args: argparse.Namespace, out: Output) -> int:
    """Print what hosting costs beside what the provider asks."""
    target = open_target(args)
    hour = _hour(target)
    problem = check_memory(target, args.batch, args.context)
    if problem:
        raise UsageError(problem, hint="use fewer bits, more --devices, or a smaller --batch or --context")
    price = find_price(load_prices(), args.api)
    rates = ApiRates(input_usd=price.input_usd, output_usd=price.output_usd, cached_usd=price.cached_usd)
    outcomes = [_outcome(args, target, hour, rates, change) for change in _CHANGES]
    out.text(f"{target.shape.name}, {target.bits:g} bits, on {target.machine.count} x {target.machine.name}")
    out.text(f"hosting: {target.machine.price}; {target.machine.decode.basis}")
    out.text(f"provider: {price}")
    out.table(
        ("", "output tok/s", "$/1M output, full", "break-even at", "of capacity", "systems"),
        [_cells(outcome) for outcome in outcomes],
    )
    out.text(
        f"{args.ratio:g} input tokens for one of output, {args.cached:.0%} of them cached by the provider; "
        "of hosting, input is computed anew and its time is in the output's price; "
        "break-even is in output tokens a month"
    )
    out.document(_compare_fields(args, target, price, outcomes))
    return 0


def _hour(target: Target) -> HourlyCost:
    hour = target.machine.hour
    if hour is None:
        raise UsageError(f"no price is known of {target.machine.name}", hint="give --hour-usd")
    return hour


def _outcome(
    args: argparse.Namespace,
    target: Target,
    hour: HourlyCost,
    rates: ApiRates,
    change: tuple[str, bool, float],
) -> _Outcome:
    name, slow, fall = change
    speed = _output_speed(args, target, slow=slow)
    cheaper = ApiRates(
        input_usd=rates.input_usd * fall,
        output_usd=rates.output_usd * fall,
        cached_usd=None if rates.cached_usd is None else rates.cached_usd * fall,
    )
    utilisation = break_even_utilisation(
        cheaper, hour, speed, input_per_output=args.ratio, cached=args.cached
    )
    volume = break_even(
        cheaper,
        hour,
        speed,
        utilisation=args.utilisation,
        input_per_output=args.ratio,
        cached=args.cached,
        spare=args.spare,
        fixed_usd=args.fixed,
    )
    return _Outcome(name, speed, usd_per_million(hour, speed), utilisation, volume)


def _output_speed(args: argparse.Namespace, target: Target, *, slow: bool) -> float:
    """Output tokens a second, the prefill of `ratio` input tokens for each of them counted in."""
    decode = target.machine.forecast(target.decode(args.batch, args.context), "decode")
    prefill = target.machine.forecast(target.prefill(args.context), "prefill")
    per_output, per_input = (
        (decode.high_s, prefill.high_s) if slow else (decode.estimate_s, prefill.estimate_s)
    )
    seconds: float = per_output / args.batch + args.ratio * per_input / args.context
    return 1 / seconds


def _cells(outcome: _Outcome) -> list[str]:
    volume, used = outcome.volume.output_tokens, outcome.utilisation
    return [
        outcome.name,
        f"{outcome.output_tokens_per_s:.0f}",
        f"{outcome.usd_per_1m_output:.3g}",
        "never" if volume is None else format_count(volume),
        f"{used:.0%}" if used is not None and used <= 1 else "more than all",
        "-" if volume is None else str(outcome.volume.num_systems),
    ]


def _compare_fields(
    args: argparse.Namespace, target: Target, price: Price, outcomes: list[_Outcome]
) -> dict[str, Any]:
    assert target.machine.price is not None
    return {
        "model": target.shape.name,
        "hardware": target.machine.name,
        "devices": target.machine.count,
        "batch": args.batch,
        "context": args.context,
        "input_per_output": args.ratio,
        "hour_price": price_fields(target.machine.price),
        "api_price": asdict(price),
        "outcomes": [
            {
                "assumption": each.name,
                "output_tokens_per_s": each.output_tokens_per_s,
                "usd_per_1m_output": each.usd_per_1m_output,
                "break_even_output_tokens_per_month": each.volume.output_tokens,
                "break_even_utilisation": each.utilisation,
                "systems": each.volume.num_systems,
            }
            for each in outcomes
        ],
    }


def tiers(args: argparse.Namespace, out: Output) -> int:
    """Print the curve of batches; those that do not fit in memory are named and left out."""
    target = open_target(args)
    most = target.max_batch(args.context)
    batches = [batch for batch in args.batches if batch <= most]
    if not batches:
        raise UsageError(
            f"not even {min(args.batches)} sequences of {args.context} tokens fit on {target.machine.name}",
            hint="use fewer bits, more --devices or a shorter --context",
        )
    standard = args.standard or max(batches)
    if standard > most:
        raise UsageError(
            f"memory holds {most} sequences of {args.context} tokens, not {standard}", hint="lower --standard"
        )
    forecasts = {
        batch: target.machine.forecast(target.decode(batch, args.context), "decode")
        for batch in {*batches, standard}
    }
    rows = tier_rows(batches, lambda batch: forecasts[batch].estimate_s, standard)
    fields = []
    for row in rows:
        usd = None if target.machine.hour is None else usd_per_million(target.machine.hour, row.tokens_per_s)
        speeds = speed_fields(forecasts[row.batch], 1.0)
        fields.append({**row._asdict(), "user_speed": speeds, "usd_per_1m_output": usd})
    out.text(f"{target.shape.name}, {target.bits:g} bits, on {target.machine.name}, against batch {standard}")
    out.table(
        ("batch", "tok/s", "of one user", "80 % interval", "bound", "speed", "cost", "$/1M out"),
        [_tier_cells(each) for each in fields],
    )
    price = target.machine.price
    out.text("price: none is known; give --hour-usd" if price is None else f"price: {price}, always at work")
    if len(batches) < len(args.batches):
        out.warn(f"memory holds {most} sequences of {args.context} tokens; larger batches are left out")
    out.document(
        {
            "model": target.shape.name,
            "hardware": target.machine.name,
            "context": args.context,
            "standard_batch": standard,
            "tiers": fields,
            "price": None if price is None else price_fields(price),
        }
    )
    return 0


def _tier_cells(row: dict[str, Any]) -> list[str]:
    speeds, usd = row["user_speed"], row["usd_per_1m_output"]
    return [
        str(row["batch"]),
        f"{row['tokens_per_s']:.0f}",
        f"{row['user_tokens_per_s']:.1f}",
        f"{speeds['low']:.1f}-{speeds['high']:.1f}",
        f"{speeds['bound']:.1f}",
        f"{row['speed']:.2f}x",
        f"{row['cost']:.2f}x",
        "-" if usd is None else f"{usd:.3g}",
    ]
