"""OpenVINO GenAI: its pipeline for continuous batching, on 8-bit weights with a scale a channel.

It reads a GGUF file in f16, which NNCF, OpenVINO's own tool, compresses once: its documentation prefers that
to reading 8-bit GGUF files, and it was faster here. Prompts are computed whole and all at once before
anything is decoded, which is its fastest order.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.peers.runners.serve import Generated, Scored, System, serve

__all__ = ["OpenVino"]

_MAX_TOKENS = 8192  # of a step: the prompts of the largest batch
_MAX_SEQUENCES = 64
_CACHE_GB = 2


class OpenVino(System):
    """One pipeline. `options` are properties of the device, such as KV_CACHE_PRECISION."""

    def __init__(self, model: str, threads: int, options: Mapping[str, Any]) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GB
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = False
        scheduler.max_num_batched_tokens = _MAX_TOKENS
        scheduler.max_num_seqs = _MAX_SEQUENCES
        properties = {"INFERENCE_NUM_THREADS": threads, **options}
        folder = _compressed(Path(model))
        self._pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)
        self._num_requests = 0
        self.version = f"OpenVINO GenAI {version('openvino-genai')}"
        self.build = f"nncf {version('nncf')}"

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> Generated:
        """Steps until every request has a token, then the steps of the rest."""
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = output, True, False
        start = time.perf_counter()
        handles = [self._add(prompt, config) for prompt in prompts]
        waiting = list(handles)
        num_steps = 0
        while waiting:
            self._pipeline.step()
            num_steps += 1
            waiting = [handle for handle in waiting if not handle.can_read()]
        middle = time.perf_counter()
        num_rest = 0
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            num_rest += 1
        end = time.perf_counter()
        num_made = sum(len(handle.read_all()[0].generated_ids) for handle in handles)
        assert num_made == output * len(prompts), f"{num_made} tokens"
        assert num_steps == 1 and num_rest == output - 1, f"{num_steps} and {num_rest} steps"
        return Generated(
            prefill_s=middle - start, decode_s=end - middle, decode_tokens=num_rest * len(prompts)
        )

    def score(self, tokens: Sequence[int]) -> Scored:
        """It gives the log-probabilities of a prompt that it is told to repeat."""
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = 1, True, False
        config.echo, config.logprobs = True, 1
        handle = self._add(tokens, config)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        [output] = handle.read_all()
        assert list(output.generated_ids[:-1]) == list(tokens), "another text was repeated"
        # The first token has none, the last is not of the text.
        values = output.generated_log_probs[1:-1]
        return Scored(logprob=float(np.sum(values, dtype=np.float64)), num_tokens=len(values))

    def _add(self, tokens: Sequence[int], config: Any) -> Any:
        self._num_requests += 1
        ids = ov.Tensor(np.asarray([tokens], np.int64))
        return self._pipeline.add_request(self._num_requests, ids, config)


def _compressed(gguf: Path) -> Path:
    """The model in OpenVINO's own format with 8-bit weights, beside the file; made once."""
    folder = gguf.with_suffix(".int8")
    if folder.is_dir():
        return folder
    import nncf  # takes seconds, and only here

    with tempfile.TemporaryDirectory(dir=gguf.parent) as temporary:
        wide, narrow = Path(temporary, "wide"), Path(temporary, "narrow")
        wide.mkdir()
        os.link(gguf, wide / "model.gguf")
        genai.LLMPipeline(
            str(wide / "model.gguf"), "CPU", {"ATTENTION_BACKEND": "SDPA", "enable_save_ov_model": True}
        )
        model = ov.Core().read_model(wide / "openvino_model.xml")
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        narrow.mkdir()
        ov.save_model(model, narrow / "openvino_model.xml", compress_to_fp16=False)
        for path in wide.glob("openvino_*tokenizer.*"):
            shutil.copy(path, narrow)
        narrow.rename(folder)
    return folder


if __name__ == "__main__":
    serve(OpenVino)
