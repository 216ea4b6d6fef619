"""Logits of one model by every runner, and how far they are from what transformers says.

The measures are those that llama.cpp prints for a quantised model: the mean Kullback-Leibler divergence of
the next token's distribution in nats, and how often the most likely token is the same.
"""

from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from tokenmill.kernels import KV_BLOCK, F32Array, Route, StepBatch, create_executor
from tokenmill.models.packing.compile import load_packed
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder

__all__ = ["Distance", "measure", "native_logits", "same_experts", "twin_logits"]

BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Distance:
    """`worst`: largest difference of a logit. `relative`: root mean square over the logits' own spread.

    `median`: the same of the middle position, which a token that goes to another expert hardly moves.
    `kl`: mean divergence, nats. `agreement`: share of positions with the same most likely token; `decided`:
    where the two best logits lie further apart than six times the root mean square.
    """

    worst: float
    relative: float
    median: float
    kl: float
    agreement: float
    decided: float


def measure(logits_TV: F32Array, wanted_TV: F32Array) -> Distance:
    """How far the logits of a runner are from those of the original."""
    difference = logits_TV - wanted_TV
    size = float(np.sqrt((difference**2).mean()))
    got, wanted = torch.from_numpy(logits_TV).log_softmax(-1), torch.from_numpy(wanted_TV).log_softmax(-1)
    same_T = logits_TV.argmax(-1) == wanted_TV.argmax(-1)
    best_T2 = np.sort(wanted_TV, axis=-1)[:, -2:]
    is_decided_T = best_T2[:, 1] - best_T2[:, 0] > 6 * size
    return Distance(
        worst=float(np.abs(difference).max()),
        relative=size / float(wanted_TV.std()),
        median=float(np.median(np.sqrt((difference**2).mean(axis=1)))) / float(wanted_TV.std()),
        kl=float(functional.kl_div(got, wanted, log_target=True, reduction="sum")) / len(same_T),
        agreement=float(same_T.mean()),
        decided=float(same_T[is_decided_T].mean()) if is_decided_T.any() else 1.0,
    )


def twin_logits(directory: ModelDirectory, tokens: list[int]) -> F32Array:
    """Logits [T, V] of the torch twin in float32."""
    twin = TorchDecoder.load(directory.architecture, directory.weights())
    with torch.inference_mode():
        logits_TV: F32Array = twin(torch.tensor([tokens]))[0].numpy()
    return logits_TV


def native_logits(
    directory: ModelDirectory, weights: WeightFormat, tokens: list[int], chunk: int = 48
) -> F32Array:
    """Logits [T, V] of the engine's executor, which reads the tokens in chunks, the last ones one by one."""
    plan = compile_plan(directory.architecture, load_packed(directory, weights))
    num_blocks = -(-len(tokens) // KV_BLOCK)
    executor = create_executor(plan, max_rows=chunk, max_out_rows=chunk, num_blocks=num_blocks)
    parts: list[F32Array] = []
    done = 0
    while done < len(tokens):
        count = min(chunk, len(tokens) - done) if done < len(tokens) - 8 else 1
        count = min(count, max(1, len(tokens) - 8 - done))
        executor.run(_batch(tokens, done, count, count))
        parts.append(executor.buffer("logits")[:count].copy())
        done += count
    return np.concatenate(parts)


def same_experts(directory: ModelDirectory, weights: WeightFormat, tokens: list[int]) -> BoolArray:
    """Positions [T] that the native runner sends to the twin's experts in every layer.

    Where two experts nearly tie a rounding decides, and what follows is another computation.
    """
    twin = TorchDecoder.load(directory.architecture, directory.weights())
    routes: dict[str, torch.Tensor] = {}
    points = [name for name in twin.hook_names if name.endswith("hook_route")]
    with torch.inference_mode():
        twin(torch.tensor([tokens]), {name: partial(routes.__setitem__, name) for name in points})
    plan = compile_plan(directory.architecture, load_packed(directory, weights))
    num_blocks = -(-len(tokens) // KV_BLOCK)
    executor = create_executor(plan, max_rows=len(tokens), max_out_rows=1, num_blocks=num_blocks)
    same_T = np.ones(len(tokens), bool)
    first = 0
    for index, op in enumerate(plan.ops):
        if isinstance(op, Route):
            executor.run(_batch(tokens, 0, len(tokens), 1), first, index + 1)
            first = index + 1
            wanted_TX = routes[op.name][0].numpy() != 0
            same_T &= ((executor.buffer("route")[: len(tokens)] != 0) == wanted_TX).all(axis=1)
    return same_T


def _batch(tokens: list[int], done: int, count: int, num_outs: int) -> StepBatch:
    """One sequence's next `count` tokens; its blocks are in order."""
    total = done + count
    starts = np.arange(0, total, KV_BLOCK, dtype=np.int32)
    used = np.minimum(total - starts, KV_BLOCK)
    positions = np.arange(done, total, dtype=np.int32)
    return StepBatch(
        tokens=np.array(tokens[done:total], np.int32),
        positions=positions,
        kv_slots=positions,
        row_starts=np.array([0, count], np.int32),
        block_starts=np.array([0, len(starts)], np.int32),
        blocks=np.stack([starts // KV_BLOCK, starts, used], axis=1).astype(np.int32),
        out_rows=np.arange(min(count, num_outs), dtype=np.int32),
    )
