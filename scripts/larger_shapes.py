"""Packs and runs models of larger shapes, with random weights, inside a limit of memory.

    python -m scripts.larger_shapes --limit 3GB --folder /tmp/larger_shapes [--json]

Every shape is made in bf16 on the disk, tensor by tensor. Then each form that `tokenmill show --fit` says
fits is packed in one process and run in another, both held to the limit by a control group (as root), or else
by RLIMIT_DATA, which does not count mapped files. A row says what was predicted for the run and the peak that
the run had. Needs three times the size of the largest model on the disk; everything is removed in the end.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from scripts.memory_group import forget_pages, limiter, memory_group
from tokenmill.cli.arguments import byte_size
from tokenmill.cli.output import format_table
from tokenmill.core import SamplingParams
from tokenmill.engine import LLM, LLMConfig
from tokenmill.models.architecture import Architecture
from tokenmill.models.formats.bfloat16 import U16Array, round_to_bf16
from tokenmill.models.formats.safetensors import write_safetensors
from tokenmill.models.hf_config import read_architecture
from tokenmill.models.packing.compile import load_packed
from tokenmill.models.packing.fit import Fit, StepSizes, find_fits, footprint
from tokenmill.models.store.directory import ModelDirectory

_LLAMA: Final[dict[str, Any]] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}
_QWEN: Final[dict[str, Any]] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def _sizes(hidden: int, inner: int, layers: int, **others: int) -> dict[str, int]:
    return {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, **others}


SHAPES: Final[dict[str, dict[str, Any]]] = {
    "Llama-3.2-1B": _LLAMA | _sizes(2048, 8192, 16, num_attention_heads=32, head_dim=64),
    "Llama-3.2-3B": _LLAMA | _sizes(3072, 8192, 28, num_attention_heads=24, head_dim=128),
    "Qwen3-0.6B": _QWEN | _sizes(1024, 3072, 28),
    "Qwen3-1.7B": _QWEN | _sizes(2048, 6144, 28),
}
_PROMPT_TOKENS: Final = 600
_OUTPUT_TOKENS: Final = 16
_CONTEXT: Final = 640
_POOL: Final = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one form: seconds to pack and to run, and bytes: peaks, and what was predicted.

    A peak counts mapped files, which the kernel may take back; an anonymous one does not. Packing is the same
    for every form of the cache and is done once.
    """

    shape: str
    weights: str
    kv_dtype: str
    longest_context: int
    predicted_bytes: int
    run_peak_bytes: int
    run_anonymous_bytes: int
    pack_peak_bytes: int
    pack_anonymous_bytes: int
    pack_s: float
    run_s: float
    error: str = ""


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A model directory with random weights in bf16 and a tokenizer with as many tokens."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder / "tokenizer.json", config["vocab_size"])
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(_POOL, np.float32)
    shapes = read_architecture(config, "config.json").stored_shapes()

    def load(name: str) -> U16Array:
        shape = shapes[name]
        if len(shape) == 1:
            return np.full(shape, 0x3F80, np.uint16)
        values = round_to_bf16(np.roll(pool, int(rng.integers(_POOL))) / np.float32(shape[1] ** 0.5))
        return np.resize(values, shape)

    write_safetensors(folder / "model.safetensors", shapes, "BF16", load)


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer: all bytes, then pairs of them, then pairs of the first of those."""
    vocab = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    parts = list(vocab)
    for left in parts * 3:
        for right in list(vocab)[: 2 * len(parts)]:
            if len(vocab) < vocab_size and left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


def child(action: str, folder: Path, weights: Any, kv_dtype: Any) -> dict[str, float]:
    """In a process of its own: pack, or run a prompt; seconds, and the peak of resident memory."""
    model = ModelDirectory.open(folder)
    peaks: list[int] = [0]
    threading.Thread(target=_watch_anonymous, args=(peaks,), daemon=True).start()
    started = time.perf_counter()
    if action == "pack":
        load_packed(model, weights)
    else:
        config = LLMConfig(weights=weights, kv_dtype=kv_dtype, kv_tokens=_CONTEXT, max_batch=1)
        params = SamplingParams(max_tokens=_OUTPUT_TOKENS, temperature=0.0)
        prompt = np.random.default_rng(1).integers(0, model.architecture.vocab_size, _PROMPT_TOKENS)
        [completion] = LLM(model, config).generate_tokens([[int(token) for token in prompt]], params)
        assert len(completion.token_ids) == _OUTPUT_TOKENS
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": _status("VmHWM"), "anonymous": max(*peaks, _status("RssAnon"))}


def _watch_anonymous(peaks: list[int]) -> None:
    """The kernel keeps no peak of the memory that is no mapped file, so that it is looked at often."""
    while True:
        peaks[0] = max(peaks[0], _status("RssAnon"))
        time.sleep(0.02)


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"^{name}:\s+(\d+) kB", text, flags=re.MULTILINE)[0])


def run_child(words: Sequence[str], limit: int) -> dict[str, Any]:
    """What `child` returns, run under the limit; `error` if it did not end well."""
    forget_pages(Path(words[1]).parent)
    command = [sys.executable, "-m", "scripts.larger_shapes", "--child", *words]
    with memory_group(limit) as group:
        done = subprocess.run(
            command, capture_output=True, text=True, preexec_fn=limiter(group, limit), check=False
        )
    if done.returncode:
        return {"error": f"exit {done.returncode}: {done.stderr.strip()[-200:]}"}
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(name: str, folder: Path, architecture: Architecture, fit: Fit, packed: dict[str, Any]) -> Row:
    """Run one form, which was packed before."""
    ran: dict[str, Any] = {}
    if "error" not in packed:
        ran = run_child(["run", str(folder), fit.weights, fit.kv_dtype], packed["limit"])
    here = footprint(architecture, fit.kv_dtype, _CONTEXT, StepSizes())
    here = replace(here, weights=fit.footprint.weights, embeddings=fit.footprint.embeddings)
    return Row(
        shape=name,
        weights=fit.weights,
        kv_dtype=fit.kv_dtype,
        longest_context=fit.context,
        predicted_bytes=here.total,
        run_peak_bytes=int(ran.get("peak", 0)),
        run_anonymous_bytes=int(ran.get("anonymous", 0)),
        pack_peak_bytes=int(packed.get("peak", 0)),
        pack_anonymous_bytes=int(packed.get("anonymous", 0)),
        pack_s=round(packed.get("seconds", 0.0), 1),
        run_s=round(ran.get("seconds", 0.0), 1),
        error=packed.get("error", "") or ran.get("error", ""),
    )


def rows_of(name: str, base: Path, limit: int) -> Iterator[Row]:
    """Every form of one shape that is said to fit."""
    folder = base / name
    os.environ["TOKENMILL_HOME"] = str(base / "home")
    try:
        write_model(folder, SHAPES[name])
        architecture = ModelDirectory.open(folder).architecture
        fits = [fit for fit in find_fits(architecture, limit) if fit.context >= _CONTEXT]
        for weights in dict.fromkeys(fit.weights for fit in fits):
            packed = run_child(["pack", str(folder), weights, "bf16"], limit) | {"limit": limit}
            for fit in fits:
                if fit.weights == weights:
                    yield measure(name, folder, architecture, fit, packed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(base / "home", ignore_errors=True)


def main() -> None:
    """Measure the shapes and print a table, or with `--json` the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=byte_size, default=3 * 10**9)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/larger_shapes"))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        action, folder, weights, kv_dtype = args.child
        print(json.dumps(child(action, Path(folder), weights, kv_dtype)))
        return
    rows = []
    for name in args.shapes:
        for row in rows_of(name, args.folder, args.limit):
            print(row, file=sys.stderr)
            rows.append(row)
    if args.json:
        print(json.dumps({"limit_bytes": args.limit, "rows": [vars(row) for row in rows]}, indent=2))
    else:
        cells = [[str(value) for value in vars(row).values()] for row in rows]
        print(format_table(list(Row.__dataclass_fields__), cells))
    if any(row.error for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
