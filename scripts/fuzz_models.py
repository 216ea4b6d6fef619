"""Mutations of model files against their readers: only errors of ours, under a second and 64 MiB each.

    python -m scripts.fuzz_models --runs 100000 --seed 1 --folder build/fuzz

Guided by coverage where atheris is installed (the extra `fuzz`, for Linux on x86-64), else by the structure
of the files alone. Each target (GGUF, safetensors, config.json, shard index, tokenizer.json) runs in a child
of its own, with its share of the runs. An input that breaks a reader is written to the folder and named.
"""

import argparse
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

NAMES = ("gguf", "safetensors", "config", "index", "tokenizer")
_ROOT = Path(__file__).parents[1]
_MAX_INPUT = 1 << 17
_HANG_S = 20
_RSS_MIB = 1500


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every target's child; 0 if no input was found."""
    parser = argparse.ArgumentParser(prog="python -m scripts.fuzz_models", description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000, help="mutations of all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=_ROOT / "build" / "fuzz", help="where findings go")
    parser.add_argument("--target", choices=NAMES, action="append", help="only this one; may be repeated")
    parser.add_argument("--plain", action="store_true", help="without coverage, even with atheris")
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    is_guided = not options.plain and importlib.util.find_spec("atheris") is not None
    if options.child:
        run = _guided if is_guided else _plain
        return run(options.child, options.runs, options.seed, options.folder)
    names = options.target or NAMES
    codes = [_run_child(name, options.runs // len(names), options, is_guided) for name in names]
    return max(codes)


def _run_child(name: str, runs: int, options: argparse.Namespace, is_guided: bool) -> int:
    before = set(options.folder.iterdir())
    command = [sys.executable, "-m", "scripts.fuzz_models", "--child", name, "--runs", str(runs)]
    command += ["--seed", str(options.seed), "--folder", str(options.folder)]
    command += ["--plain"] if not is_guided else []
    began = time.monotonic()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as temporary:  # the fuzzer cleans nothing up
        # A backtrace of the library takes time and memory that the input does not.
        environment = {**os.environ, "TMPDIR": temporary, "RUST_BACKTRACE": "0"}
        done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, check=False)
    how = "guided by coverage" if is_guided else "by structure"
    print(f"{name}: {runs} mutations {how}, {time.monotonic() - began:.0f} s, exit code {done.returncode}")
    found = sorted(str(path) for path in set(options.folder.iterdir()) - before)
    if not is_guided and not done.returncode:
        print(f"  {done.stdout.decode().strip()}")
    if done.returncode:
        print(f"  found: {', '.join(found) or 'nothing was written'}")
        print("\n".join((done.stdout + done.stderr).decode(errors="replace").splitlines()[-25:]))
    return 1 if done.returncode else 0


def _plain(name: str, runs: int, seed: int, folder: Path) -> int:
    from scripts.fuzz_targets import TARGETS, Finding, try_input, working_folder

    target, rng, work = TARGETS[name], random.Random(seed), working_folder(TARGETS[name])
    seeds = target.seeds()
    num_taken = 0
    for run in range(runs):
        data = target.mutate(rng.choice(seeds), rng)
        try:
            num_taken += try_input(target, data, work)
        except Finding as finding:
            path = folder / f"{name}-plain-{seed}-{run}"
            path.write_bytes(data)
            print(f"{path}: {finding}")
            return 1
    print(f"{num_taken} of {runs} were taken")
    return 0


def _guided(name: str, runs: int, seed: int, folder: Path) -> int:
    """In a child: never returns, as the fuzzer ends the process."""
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

    with atheris.instrument_imports(include=["tokenmill.models", "scripts.fuzz_targets"]):
        from scripts.fuzz_targets import TARGETS, try_input, working_folder
    target, work = TARGETS[name], working_folder(TARGETS[name])
    corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
    for index, data in enumerate(target.seeds()):
        (corpus / f"seed{index}").write_bytes(data)

    def try_one(data: bytes) -> None:
        try_input(target, data, work)

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        rng = random.Random(number)
        changed = target.mutate(data, rng) if rng.random() < 0.6 else bytes(atheris.Mutate(data, max_size))
        return changed[:max_size]

    options = [f"-runs={runs}", f"-seed={seed}", f"-max_len={_MAX_INPUT}", f"-timeout={_HANG_S}"]
    options += [f"-rss_limit_mb={_RSS_MIB}", f"-artifact_prefix={folder}/{name}-", "-len_control=0"]
    atheris.Setup(["fuzz", *options, str(corpus)], try_one, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
