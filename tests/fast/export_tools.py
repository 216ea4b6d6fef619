"""Small models of any architecture as Hugging Face folders, made without torch, for exports."""

import json
from pathlib import Path

import numpy as np

from tests.fast.model_files import CHATML, byte_characters
from tokenmill.models.architecture import Architecture
from tokenmill.models.formats.bfloat16 import round_to_bf16
from tokenmill.models.formats.safetensors import StoredArray, write_safetensors
from tokenmill.models.hf_config import architecture_to_config
from tokenmill.models.store.directory import ModelDirectory

__all__ = ["random_folder", "write_tokenizer"]


def random_folder(folder: Path, architecture: Architecture) -> ModelDirectory:
    """Random bfloat16 weights, a configuration and a tokenizer with fewer tokens than the model."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(11)

    def load(name: str) -> StoredArray:
        shape = architecture.stored_shapes()[name]
        return round_to_bf16(rng.normal(0, 0.1, shape).astype(np.float32))

    write_safetensors(folder / "model.safetensors", architecture.stored_shapes(), "BF16", load)
    (folder / "config.json").write_text(json.dumps(architecture_to_config(architecture)))
    write_tokenizer(folder, architecture.vocab_size - 7)
    return ModelDirectory.open(folder)


def write_tokenizer(folder: Path, num_tokens: int) -> None:
    """A byte-level tokenizer of that many tokens, as SmolLM's pipeline; some bytes may have none."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*specials, *byte_characters()][:num_tokens]
    tokens += [f"{chr(0x4E00 + index)}" for index in range(num_tokens - len(tokens))]
    steps = [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
    pipeline = {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": text, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for id, text in enumerate(specials)
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": steps[1],
        "model": {"type": "BPE", "vocab": {text: id for id, text in enumerate(tokens)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(pipeline))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text(CHATML)
