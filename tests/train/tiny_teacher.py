"""A tiny chat model with a real BPE vocabulary, as a model directory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.fast.model_files import CHATML
from tokenmill.core import Message
from tokenmill.models.architecture import Architecture, Layer
from tokenmill.models.formats.bfloat16 import round_to_bf16
from tokenmill.models.formats.safetensors import write_safetensors
from tokenmill.models.hf_config import architecture_to_config
from tokenmill.models.store.assemble import write_manifest
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.manifest import DeclaredCosts, Manifest
from tokenmill.train import ConversationEncoder, Example

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NAMES = ["anna", "berta", "carla", "doris", "edith", "frieda", "gerda", "hanna"]
TEXTS = [f"please play the song of {name} at {hour} hours" for name in NAMES for hour in range(12)]
ANSWERS = [f'{{"who": "{text.split()[5]}", "at": {text.split()[7]}}}' for text in TEXTS]


def tokenizer_json(vocab_size: int = 420, texts: list[str] | None = None) -> str:
    """A byte-level BPE vocabulary that was trained on these texts."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator((texts or [*TEXTS, *ANSWERS]) * 3, trainer)
    return str(inner.to_str())


def teacher_architecture(**changes: Any) -> Architecture:
    shape: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 420,
        "hidden_size": 64,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_positions": 128,
        "tied_embeddings": True,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    shape |= changes
    return Architecture(layers=(Layer(),) * shape["num_layers"], **shape)


def make_teacher(folder: Path, architecture: Architecture | None = None, seed: int = 0) -> ModelDirectory:
    """A model directory with random weights."""
    tokenizer = tokenizer_json()
    size = tokenizers.Tokenizer.from_str(tokenizer).get_vocab_size()
    architecture = architecture or teacher_architecture(vocab_size=size)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)

    def load(name: str) -> Any:
        shape = architecture.stored_shapes()[name]
        if len(shape) == 1:
            return round_to_bf16(rng.uniform(0.8, 1.2, shape).astype(np.float32))
        return round_to_bf16((rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32))

    write_safetensors(folder / "model.safetensors", architecture.stored_shapes(), "BF16", load)
    files = {
        "config.json": json.dumps(architecture_to_config(architecture)),
        "generation_config.json": json.dumps({"bos_token_id": 1, "eos_token_id": 2}),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.dumps({"bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}),
        "chat_template.jinja": CHATML,
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    manifest = Manifest(
        name=folder.name,
        source="random numbers",
        licences=("CC0-1.0",),
        files={},
        costs=DeclaredCosts.of(architecture),
    )
    write_manifest(folder, manifest)
    return ModelDirectory.open(folder)


def rendered(text: str, answer: str) -> str:
    """What the template makes of one question and its answer."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"


def examples_of(model: ModelDirectory, count: int = len(TEXTS)) -> list[Example]:
    """Questions and answers as examples."""
    encoder = ConversationEncoder(model)
    first = encoder.prompt([Message(role="user", content="@")])
    tokenizer = model.tokenizer()
    frame = tokenizer.decode(first, skip_special=False).split("@")
    pairs = list(zip(TEXTS, ANSWERS, strict=True))[:count]
    prompts = [tokenizer.encode(f"{frame[0]}{text}{frame[1]}", allow_special=True) for text, _ in pairs]
    return [encoder.from_answer(prompt, answer) for prompt, (_, answer) in zip(prompts, pairs, strict=True)]
