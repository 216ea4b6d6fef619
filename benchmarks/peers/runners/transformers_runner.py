"""transformers on torch: the eager model in bf16 with scaled dot-product attention and its own cache."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from benchmarks.peers.runners.serve import Generated, Scored, System, serve

__all__ = ["Transformers"]


class Transformers(System):
    """The model in its folder; `options` go to `from_pretrained`."""

    def __init__(self, model: str, threads: int, options: Mapping[str, Any]) -> None:
        torch.set_num_threads(threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa", local_files_only=True, **options
        ).eval()
        torch_version = torch.__version__.partition("+")[0]
        self.version = f"transformers {transformers.__version__}, torch {torch_version}"

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> Generated:
        """One pass over all prompts, then one a token; the likeliest token is fed back."""
        start = time.perf_counter()
        result = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        tokens = result.logits[:, -1].argmax(-1, keepdim=True)
        middle = time.perf_counter()
        for _ in range(output - 1):
            result = self._model(tokens, past_key_values=result.past_key_values, use_cache=True)
            tokens = result.logits[:, -1].argmax(-1, keepdim=True)
        end = time.perf_counter()
        num_tokens = len(prompts) * (output - 1)
        return Generated(prefill_s=middle - start, decode_s=end - middle, decode_tokens=num_tokens)

    @torch.inference_mode()
    def score(self, tokens: Sequence[int]) -> Scored:
        """Log-softmax in float32."""
        ids = torch.tensor([tokens])
        logits_TV = self._model(ids, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits_TV, ids[0, 1:], reduction="sum")
        return Scored(logprob=-float(loss), num_tokens=len(tokens) - 1)


if __name__ == "__main__":
    serve(Transformers)
