"""How well a calibrated plan predicts batches and contexts of this machine that it has not seen.

    python -m scripts.plan_unseen measure FILE   a round: every point once, in under a minute; repeat it
    python -m scripts.plan_unseen score FILE     best of the rounds; fit some points, predict the others

A line of the file is a point of a round: machine rates, batch, prompt, seconds of a decode step and of
prefill, and the share of the processors that others used just before.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenmill.cli.arguments import open_model
from tokenmill.cli.plan_points import PointSource, measure_points
from tokenmill.costs import (
    MachinePeak,
    Observation,
    calibrate,
    class_constants,
    decode_load,
    predict,
    prefill_load,
)
from tokenmill.costs.shape import ModelShape
from tokenmill.kernels.probe import WORKING_SETS_MB, busy_share, measure_machine

SEEN = ((1, 64), (8, 64), (1, 1024), (32, 64), (4, 512))
UNSEEN = ((2, 256), (16, 128), (3, 384), (24, 96), (1, 700), (6, 256))


def measure(path: Path, model_name: str) -> None:
    """Measure a round and append it; seen and unseen points take turns, so that both have the same luck."""
    busy = busy_share()
    limits = measure_machine(working_sets_mb=WORKING_SETS_MB)
    source = PointSource(model=open_model(model_name), weights="w8a8", limits=limits)
    turns = [point for pair in itertools.zip_longest(SEEN, UNSEEN) for point in pair if point is not None]
    with path.open("a", encoding="utf-8") as file:
        for point in measure_points(source, turns, budget_s=math.inf, num_runs=1):
            line = {
                "shape": asdict(source.shape),
                "bits": source.bits,
                "batch": point.batch,
                "prompt": point.prompt,
                "decode": point.decode.seconds,
                "prefill": point.prefill.seconds,
                "flops": source.flops,
                "bytes_per_s": point.decode.peak.bytes_per_s,
                "busy": busy,
            }
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(point.batch, point.prompt, f"{1e3 * point.decode.seconds:.2f} ms", flush=True)


def observation(lines: Sequence[dict[str, Any]], phase: str) -> Observation:
    """One point: the fastest of its rounds, for others slow a machine down and never speed it up."""
    first = lines[0]
    shape = ModelShape(**first["shape"])
    batch, prompt, bits = first["batch"], first["prompt"], first["bits"]
    if phase == "decode":
        load = decode_load(shape, bits=bits, batch=batch, context=prompt + 12)
    else:
        load = prefill_load(shape, bits=bits, num_tokens=prompt, batch=batch)
    flops, rate = (max(line[name] for line in lines) for name in ("flops", "bytes_per_s"))
    seconds = min(line[phase] for line in lines)
    peak = MachinePeak(flops=flops, bytes_per_s=rate)
    return Observation(load=load, peak=peak, seconds=seconds, group=shape.name)


def score(path: Path) -> None:
    """Fit the seen points, predict the others."""
    rounds: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        rounds.setdefault((line["batch"], line["prompt"]), []).append(line)
    print(f"rounds: {min(map(len, rounds.values()))} to {max(map(len, rounds.values()))}")
    for phase in ("decode", "prefill"):
        seen = [observation(rounds[point], phase) for point in SEEN]
        found = calibrate(seen, class_constants("cpu", "graph"), "seen points")
        print(f"{phase}: {len(seen)} points seen, left out one by one {found.median_error:.1%}")
        print(f"  {found.constants}")
        errors, inside = [], 0
        for batch, prompt in UNSEEN:
            each = observation(rounds[batch, prompt], phase)
            prediction = predict(each.load, each.peak, found)
            errors.append(abs(prediction.estimate_s / each.seconds - 1))
            inside += prediction.low_s <= each.seconds <= prediction.high_s
            print(
                f"  {batch:3} x {prompt:5} tokens: {1e3 * each.seconds:8.2f} ms measured, "
                f"{1e3 * prediction.estimate_s:8.2f} predicted ({errors[-1]:.1%})"
            )
        print(
            f"  unseen: median {statistics.median(errors):.1%}, worst {max(errors):.1%}, "
            f"{inside} of {len(errors)} in the interval of {math.expm1(found.log_width):.0%}"
        )


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("measure", "score"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    if args.action == "measure":
        measure(args.file, args.model)
    else:
        score(args.file)


if __name__ == "__main__":
    main()
