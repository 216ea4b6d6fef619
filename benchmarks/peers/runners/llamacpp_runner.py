"""llama.cpp through its C interface, as its own `llama-batched-bench` drives it.

All prompts go into one batch, which it cuts into parts of 512 tokens; then each step feeds one token a
sequence. Flash attention is on for a single prompt and off for what decodes, as is faster here.
Nothing is sampled: tokens that were drawn before are fed, so the figure is the best that any use of it could
reach.
"""

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from benchmarks.peers.runners.serve import Generated, Scored, System, serve

__all__ = ["LlamaCpp"]

_PART = 512
_CELLS = 256  # the cache of a sequence is a multiple of this


class LlamaCpp(System):
    """One model, and a context for the batch that was asked for last.

    `options`: fields of `llama_context_params`.
    """

    def __init__(self, model: str, threads: int, options: Mapping[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {model}")
        self._options = {"n_threads": threads, "n_threads_batch": threads, **options}
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._shape = (0, 0, False)
        self._context: Any = None
        self.version = f"llama.cpp ({version('llama_cpp_python')})"
        self.build = llama_cpp.llama_print_system_info().decode()

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> Generated:
        """The cache is emptied before; contexts are made before the clock starts."""
        batch, prompt = len(prompts), len(prompts[0])
        context = self._context_for(batch, prompt + output, flash=batch == 1 and output == 1)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        feed = _Feed(context, batch * prompt)
        drawn_OB = np.random.default_rng(1).integers(1000, self._num_vocab, (output, batch), np.int32)
        sequences = np.arange(batch, dtype=np.int32)
        last_T = np.tile(np.arange(prompt) == prompt - 1, batch)
        tokens_T = np.asarray(prompts, np.int32).ravel()
        positions_T = np.tile(np.arange(prompt, dtype=np.int32), batch)
        start = time.perf_counter()
        feed.run(tokens_T, positions_T, np.repeat(sequences, prompt), last_T)
        middle = time.perf_counter()
        for step in range(output - 1):
            feed.run(drawn_OB[step], np.full(batch, prompt + step), sequences, np.ones(batch, bool))
        end = time.perf_counter()
        feed.close()
        return Generated(prefill_s=middle - start, decode_s=end - middle, decode_tokens=batch * (output - 1))

    def score(self, tokens: Sequence[int]) -> Scored:
        """Logits of every position, in parts; log-softmax in float32, sums in float64."""
        context = self._context_for(1, len(tokens), flash=True)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        feed, ids, total = _Feed(context, _PART), np.asarray(tokens, np.int32), 0.0
        for first in range(0, len(ids), _PART):
            part = ids[first : first + _PART]
            positions = np.arange(first, first + len(part), dtype=np.int32)
            feed.run(part, positions, np.zeros(len(part), np.int32), np.ones(len(part), bool))
            pointer = llama_cpp.llama_get_logits(context)
            logits_TV = np.ctypeslib.as_array(pointer, (len(part), self._num_vocab))
            following = ids[first + 1 : first + len(part) + 1]
            total += _logprob(logits_TV[: len(following)], following)
        feed.close()
        return Scored(logprob=total, num_tokens=len(ids) - 1)

    def _context_for(self, batch: int, length: int, *, flash: bool) -> Any:
        """A context for so many sequences, the last one if that fits."""
        length = -(-length // _CELLS) * _CELLS
        if self._shape != (batch, length, flash):
            if self._context is not None:
                llama_cpp.llama_free(self._context)
            params = llama_cpp.llama_context_default_params()
            params.n_seq_max = batch
            params.n_ctx = batch * length
            params.n_batch = max(_PART, batch * length)
            params.n_ubatch = _PART
            params.flash_attn_type = int(flash)
            params.no_perf = True
            for name, value in self._options.items():
                setattr(params, name, value)
            self._context = llama_cpp.llama_init_from_model(self._model, params)
            if not self._context:
                raise ValueError(f"llama.cpp makes no context for {batch} sequences of {length} tokens")
            self._shape = (batch, length, flash)
        return self._context


class _Feed:
    """A batch of llama.cpp, written through arrays."""

    def __init__(self, context: Any, max_tokens: int) -> None:
        self._context = context
        self._batch = batch = llama_cpp.llama_batch_init(max_tokens, 0, 1)
        shape = (max_tokens,)
        self._token = np.ctypeslib.as_array(batch.token, shape)
        self._pos = np.ctypeslib.as_array(batch.pos, shape)
        self._logits = np.ctypeslib.as_array(batch.logits, shape)
        self._sequences = [np.ctypeslib.as_array(batch.seq_id[i], (1,)) for i in range(max_tokens)]
        np.ctypeslib.as_array(batch.n_seq_id, shape)[:] = 1

    def run(
        self,
        tokens: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        sequences: npt.NDArray[np.int32],
        wanted: npt.NDArray[np.bool_],
    ) -> None:
        """Compute a token a row; `wanted` rows give logits."""
        num = len(tokens)
        self._token[:num], self._pos[:num], self._logits[:num] = tokens, positions, wanted
        for cell, sequence in zip(self._sequences, sequences.tolist(), strict=False):
            cell[0] = sequence
        self._batch.n_tokens = num
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")
        llama_cpp.llama_synchronize(self._context)

    def close(self) -> None:
        """Free the batch."""
        llama_cpp.llama_batch_free(self._batch)


def _logprob(logits_TV: npt.NDArray[np.float32], tokens: npt.NDArray[np.int32]) -> float:
    top_T1 = logits_TV.max(axis=1, keepdims=True)
    sums_T = np.exp(logits_TV - top_T1).sum(axis=1, dtype=np.float64)
    chosen_T = (logits_TV - top_T1)[np.arange(len(tokens)), tokens]
    return float((chosen_T - np.log(sums_T)).sum(dtype=np.float64))


if __name__ == "__main__":
    serve(LlamaCpp)
