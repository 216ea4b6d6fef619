"""Models with random 8-bit weights for the tables of docs/performance.md: a student, and larger shapes.

What decides speed is real: shapes, formats, a mapped file in which every matrix has its own bytes. The text
of such a model is noise. A folder is made once and found again; nothing here is smoothed, which costs no time
when a model runs.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from scripts.larger_shapes import SHAPES as _DENSE
from scripts.larger_shapes import write_tokenizer
from tokenmill.costs import DecoderCost
from tokenmill.engine.bench import decoder_cost
from tokenmill.kernels import (
    KV_BLOCK,
    EmbedTable,
    Executor,
    ExpertLinear,
    KvDtype,
    PackedLinear,
    Route,
    StepPlan,
    create_executor,
)
from tokenmill.kernels.packing import pack_i8c
from tokenmill.kernels.twin import bf16_bits
from tokenmill.models.architecture import Architecture
from tokenmill.models.packing.compile import ExecutorConfig
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.packed import ExpertParts, Piece, read_packed, write_packed
from tokenmill.models.store.directory import ModelDirectory

__all__ = ["SHAPES", "STUDENT", "create", "random_directory", "sparse_cost"]

_PACKED: Final = "w8a8.packed"
_MOE: Final[dict[str, Any]] = {
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}

STUDENT: Final[dict[str, Any]] = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
"""3.9 million multiply-adds a token, head included."""

SHAPES: Final[dict[str, dict[str, Any]]] = {
    **{name: _DENSE[name] for name in ("Llama-3.2-1B", "Qwen3-1.7B", "Llama-3.2-3B")},
    # Half of Mixtral 8x7B's width and six of its layers; four layers of Qwen3-30B-A3B.
    "Mixtral-shaped": _MOE
    | {
        "model_type": "mixtral",
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "Qwen3-MoE-shaped": _MOE
    | {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


def random_directory(folder: Path, config: dict[str, Any]) -> ModelDirectory:
    """A folder with configuration, tokenizer and packed random weights; made if it is not there."""
    if not (folder / _PACKED).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        write_tokenizer(folder / "tokenizer.json", config["vocab_size"])
        write_packed(folder / _PACKED, _pieces(ModelDirectory.open(folder).architecture))
    return ModelDirectory.open(folder)


def create(directory: ModelDirectory, config: ExecutorConfig) -> Executor:
    """An executor for a folder of `random_directory`, in w8a8 whatever is asked for."""
    packed = read_packed(directory.path / _PACKED)
    if packed is None:
        raise SystemExit(f"{directory.path / _PACKED} is damaged: delete the folder")
    return create_executor(
        compile_plan(directory.architecture, packed, config.num_blocks * KV_BLOCK),
        max_rows=config.max_rows,
        max_out_rows=config.max_out_rows,
        num_blocks=config.num_blocks,
        num_threads=config.num_threads,
        kv_dtype=config.kv_dtype,
    )


def sparse_cost(architecture: Architecture, plan: StepPlan, kv_dtype: KvDtype, num_rows: int) -> DecoderCost:
    """As `decoder_cost`, and of a mixture of experts what `num_rows` rows read of the experts and routers."""
    cost = decoder_cost(architecture, plan, kv_dtype)
    num_bytes = sum(op.weight.nbytes for op in plan.ops if isinstance(op, Route))
    for op in plan.ops:
        if isinstance(op, ExpertLinear):
            num_used = min(op.weight.num_experts, num_rows * plan.shape.num_active)
            num_bytes += num_used * op.weight.linear.num_bytes // op.weight.num_experts
    return DecoderCost(**vars(cost) | {"block_bytes": cost.block_bytes + num_bytes})


def _pieces(architecture: Architecture) -> Iterator[tuple[str, Piece]]:
    """Packed matrices of random numbers; layers share numbers, and each has its own place in the file."""
    rng = np.random.default_rng(1)
    made: dict[tuple[int, int], PackedLinear] = {}

    def matrix(num_out: int, num_in: int) -> PackedLinear:
        if (num_out, num_in) not in made:
            weight = rng.standard_normal((num_out, num_in), np.float32)
            made[num_out, num_in] = pack_i8c(weight / np.float32(num_in**0.5))
        return made[num_out, num_in]

    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    ones = np.ones(hidden, np.float32)
    table = rng.standard_normal((architecture.vocab_size, hidden), np.float32)
    yield "embed", EmbedTable(data=bf16_bits(table), scales=np.zeros(0, np.float16))
    yield "head", matrix(architecture.vocab_size, hidden)
    yield "float.ln_final", ones
    experts = architecture.experts
    for layer, kind in enumerate(architecture.layers):
        name = f"blocks.{layer}"
        yield f"{name}.qkv", matrix(architecture.query_size + 2 * architecture.kv_size, hidden)
        yield f"{name}.out", matrix(hidden, architecture.query_size)
        yield from ((f"float.{name}.{norm}", ones) for norm in ("ln1", "ln2"))
        for norm, size in zip(("q_norm", "k_norm"), architecture.qk_norm_sizes(), strict=True):
            if size:
                yield f"float.{name}.{norm}", np.ones(size, np.float32)
        if kind.routed and experts is not None:
            inner, num = experts.intermediate_size, experts.num_experts
            yield f"float.{name}.router", rng.standard_normal((num, hidden), np.float32)
            yield f"float.{name}.router.norm", ones
            for part, (num_out, num_in) in _gated(inner, hidden).items():
                linears = [matrix(num_out, num_in)] * num
                yield f"{name}.{part}", ExpertParts(num_experts=num, linears=linears)
        else:
            yield from ((f"{name}.{part}", matrix(*shape)) for part, shape in _gated(inner, hidden).items())


def _gated(inner: int, hidden: int) -> dict[str, tuple[int, int]]:
    return {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
