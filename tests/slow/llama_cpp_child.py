"""Runs under a Python that has llama_cpp, which need not be the one of the tests: logits of a GGUF file.

    python llama_cpp_child.py FILE IDS.json LOGITS.npy

IDS.json holds a list of windows of token ids, each computed from an empty cache; what is written is float32
[windows, tokens, vocabulary]. Keys and values are kept in float32, so that what is compared is the weights.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np

__all__ = ["main"]


def main(gguf: str, ids: str, target: str) -> None:
    """Compute and save."""
    windows = json.loads(Path(ids).read_text())
    size = len(windows[0])
    llama = importlib.import_module("llama_cpp").Llama(
        model_path=gguf,
        n_ctx=size,
        n_batch=size,
        n_threads=1,
        n_gpu_layers=0,
        logits_all=True,
        type_k=0,
        type_v=0,
        verbose=False,
    )
    logits = []
    for window in windows:
        llama.reset()
        llama.eval(window)
        logits.append(np.array(llama.scores[:size], dtype=np.float32))
    np.save(target, np.stack(logits))


if __name__ == "__main__":
    main(*sys.argv[1:])
