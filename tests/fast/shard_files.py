"""Splitting a model directory's weights into shards, the way they are published."""

import json
import shutil
from pathlib import Path

from tokenmill.models.formats.safetensors import SafetensorsFile, write_safetensors

SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def shard_name(number: int, total: int) -> str:
    return f"model-{number:05}-of-{total:05}.safetensors"


def sharded_copy(folder: Path, target: Path, total: int = 3) -> Path:
    """A Hugging Face folder like `folder`, its tensors dealt out to `total` shards."""
    target.mkdir()
    for name in (*SMALL, "chat_template.jinja"):
        if (folder / name).is_file():
            shutil.copy(folder / name, target / name)
    weight_map: dict[str, str] = {}
    with SafetensorsFile.open(folder / "model.safetensors") as file:
        for number in range(1, total + 1):
            names = file.names()[number - 1 :: total]
            shapes = {name: file.shape(name) for name in names}
            write_safetensors(target / shard_name(number, total), shapes, "BF16", file.bf16)
            weight_map |= dict.fromkeys(names, shard_name(number, total))
    write_index(target, weight_map)
    return target


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_map(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    return weight_map
