"""The same endpoint measured by tokenmill and by guidellm, in turns, with the same settings.

    python -m benchmarks.load.agreement --guidellm VENV/bin/guidellm --tokenizer MODEL \\
        --tokenizer-folder FOLDER --url http://127.0.0.1:8100/v1 --served-model scripted --streams 8

Both send prompts of the same length, ask for answers of the same length, and keep the same number of requests
in flight. guidellm lives in an environment of its own, because its requirements are many. The table has the
medians over rounds, and the ratio; its reasons are in docs/load.md.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["main"]

_TIMEOUT_S = 120

_NAMES = (
    "TTFT p50",
    "TTFT p99",
    "TPOT p50",
    "TPOT p99",
    "end to end p50",
    "end to end p99",
    "req/s",
    "out tok/s",
)


def tokenmill_figures(args: argparse.Namespace) -> dict[str, float]:
    """One run of `tokenmill load`."""
    command = [
        sys.executable,
        "-m",
        "tokenmill",
        "load",
        args.url,
        "--endpoint-model",
        args.served_model,
        "--json",
    ]
    command += ["--concurrency", str(args.streams), "--requests", str(args.requests), "--warmup", "0"]
    command += ["--input", str(args.input), "--output", str(args.output), "--tokenizer", args.tokenizer]
    command += ["--ignore-eos"] if args.ignore_eos else []
    command += ["--completions"] if args.completions else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    (level,) = json.loads(done.stdout)["levels"]
    times = [level[name][place][0] for name in ("ttft_ms", "tpot_ms", "e2e_ms") for place in ("p50", "p99")]
    return dict(zip(_NAMES, [*times, level["requests_per_s"], level["output_tokens_per_s"]], strict=True))


def guidellm_figures(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One run of `guidellm run`."""
    result = folder / "guidellm.json"
    root = args.url.removesuffix("/v1")
    lengths = f"prompt_tokens={args.input},output_tokens={args.output}"
    path = "/v1/completions" if args.completions else "/v1/chat/completions"
    command = [args.guidellm, "run", "--disable-console"]
    command += [
        "--backend",
        f"kind=openai_http,target={root},model={args.served_model},validate_backend=false,"
        f"request_format={path}",
    ]
    command += ["--profile", f"kind=concurrent,streams={args.streams}"]
    command += ["--constraint", f"kind=max_requests,count={args.requests}"]
    command += ["--data", f"kind=synthetic_text,{lengths}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={args.tokenizer_folder}"]
    command += ["--output", f"kind=json,path={result}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode or not result.exists():
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    (benchmark,) = json.loads(result.read_text(encoding="utf-8"))["benchmarks"]
    metrics = benchmark["metrics"]

    def at(name: str, place: str, scale: float = 1.0) -> float:
        found: dict[str, Any] = metrics[name]["successful"]
        return scale * float(found["percentiles"][place] if place.startswith("p") else found[place])

    names = (("time_to_first_token_ms", 1.0), ("inter_token_latency_ms", 1.0), ("request_latency", 1e3))
    times = [at(name, place, scale) for name, scale in names for place in ("p50", "p99")]
    rates = [at("requests_per_second", "mean"), at("output_tokens_per_second", "mean")]
    return dict(zip(_NAMES, [*times, *rates], strict=True))


def endpoint_figures(args: argparse.Namespace) -> dict[str, float]:
    """The scripted endpoint's own TTFTs in milliseconds since the last call; nothing of another endpoint."""
    if args.served_model != "scripted":
        return {}
    with urllib.request.urlopen(f"{args.url}/ttfts", timeout=10) as answer:
        ttfts = sorted(1e3 * ttft_s for ttft_s in json.load(answer)["ttfts_s"])
    places = {"its own TTFT p50": 0.5, "its own TTFT p99": 0.99}
    return {name: ttfts[int(level * (len(ttfts) - 1))] for name, level in places.items() if ttfts}


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description="tokenmill and guidellm on one endpoint")
    for flag in ("--guidellm", "--tokenizer", "--tokenizer-folder", "--url", "--served-model"):
        parser.add_argument(flag, required=True)
    for flag, default in (
        ("--streams", 8),
        ("--requests", 200),
        ("--input", 64),
        ("--output", 32),
        ("--rounds", 3),
    ):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--completions", action="store_true", help="plain prompts, no conversations")
    parser.add_argument("--results", type=Path, help="rounds of earlier calls, and of this one")
    args = parser.parse_args()
    rounds: list[list[dict[str, float]]] = []
    if args.results is not None and args.results.exists():
        rounds += [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            ours_now = tokenmill_figures(args) | endpoint_figures(args)
            rounds.append([ours_now, guidellm_figures(args, Path(folder)) | endpoint_figures(args)])
    if args.results is not None:
        args.results.write_text("".join(json.dumps(each) + "\n" for each in rounds), encoding="utf-8")
    print(f"| {args.streams} streams | tokenmill | guidellm | ratio | spread of tokenmill over rounds |")
    print("|---|---:|---:|---:|---|")
    for name in rounds[-1][0]:
        ours, theirs = ([each[side][name] for each in rounds if name in each[side]] for side in (0, 1))
        ratio = median(ours) / (median(theirs) or math.nan)
        spread = f"{min(ours):.2f} to {max(ours):.2f}"
        print(f"| {name} | {median(ours):.2f} | {median(theirs):.2f} | {ratio:.3f} | {spread} |")


if __name__ == "__main__":
    main()
