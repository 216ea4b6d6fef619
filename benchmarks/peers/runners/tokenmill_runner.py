"""tokenmill: the offline engine, with the settings that a user gets, and no cache of prefixes."""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenmill
from benchmarks.peers.runners.serve import Generated, Scored, Steps, System, serve
from tokenmill.core import SamplingParams
from tokenmill.engine import LLM, LLMConfig
from tokenmill.engine.bench import decoder_cost
from tokenmill.models.store.directory import ModelDirectory

__all__ = ["Tokenmill"]


class Tokenmill(System):
    """One `LLM` for all batch sizes."""

    def __init__(self, model: str, threads: int, options: Mapping[str, Any]) -> None:
        config = LLMConfig(num_threads=threads, prefix_cache=False, **options)
        directory = ModelDirectory.open(Path(model))
        self._llm = LLM(directory, config)
        self.cost = asdict(decoder_cost(directory.architecture, self._llm.plan, config.kv_dtype))
        self.version = f"tokenmill {tokenmill.__version__}"
        self.build = _digest(Path(tokenmill.__file__).parent)

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> Generated:
        """One call; its steps are timed where a caller sees their results."""
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        steps = Steps(len(prompts), time.perf_counter())
        self._llm.generate_tokens(
            prompts,
            params,
            on_progress=lambda progress: steps.add(time.perf_counter(), progress.step.num_out_rows),
        )
        return steps.generated()

    def score(self, tokens: Sequence[int]) -> Scored:
        """As `tokenmill score`."""
        [score] = self._llm.score_tokens(tokens, window=len(tokens))
        return Scored(logprob=math.fsum(score.logprobs), num_tokens=len(score.logprobs))


def _digest(folder: Path) -> str:
    """Of the installed package: its version alone does not tell two states of the kernels apart."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in {".py", ".so"}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    serve(Tokenmill)
