"""What the fuzzer feeds: the readers of model files, sound seeds, mutations that know their structure.

A reader may take its input or raise an error of ours; any other exception, a second of processor time or
64 MiB more memory for one input is a finding. Sound seeds come from the corpora of the scorecard.
"""

import base64
import copy
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scripts.scorecard.gguf_borders import borders
from scripts.scorecard.gguf_cases import small_gguf
from scripts.scorecard.hostile_gguf_kinds import small_charsmap
from scripts.scorecard.hostile_safetensors import sound_folder
from scripts.scorecard.hostile_shards import hostile_shards
from scripts.scorecard.vocabularies import KINDS, description, unknown_id
from tokenmill.core import TokenmillError
from tokenmill.models.families import FAMILIES
from tokenmill.models.formats.convert import GgufWeights, gguf_architecture
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.formats.safetensors import SafetensorsFile
from tokenmill.models.hf_config import architecture_to_config, load_json_object, read_architecture
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.text.tokenizer import Tokenizer

__all__ = ["TARGETS", "Finding", "Target", "try_input", "working_folder"]

_MAX_CPU_S = 1.0
_MAX_BYTES = 64 << 20
_INDEX = "model.safetensors.index.json"
_NUMBERS = (0, 1, 7, 8, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 64, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf")),
    *("", "x", "\x00", "\ud800", "../x", "llama", "mixtral", "x" * 9000, [], [[]], [1], ["x"], {}, {"a": 1}),
)  # fmt: skip


class Finding(Exception):
    """An input on which a reader does what it must not."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A reader: the name of its file, sound inputs, a mutation, and what is done with the file."""

    file: str
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], object]


def try_input(target: Target, data: bytes, folder: Path) -> bool:
    """Whether the reader takes this input. Raises Finding for anything but an error of ours."""
    path = folder / target.file
    path.write_bytes(data)
    cpu_s, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    is_taken = True
    try:
        target.read(path)
    except TokenmillError as error:
        is_taken = False
        if str(path.parent) not in error.message:
            raise Finding(f"an error that names no file: {error.message}") from error
    except BaseException as error:
        raise Finding(f"{type(error).__name__}: {str(error)[:300]}") from error
    cpu_s = time.process_time() - cpu_s
    grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
    if cpu_s > _MAX_CPU_S or grew > _MAX_BYTES:
        raise Finding(f"{cpu_s:.2f} s, {grew >> 20} MiB")
    return is_taken


def _read_gguf(path: Path) -> None:
    with GgufFile.open(path) as file:
        architecture = gguf_architecture(file)
        weights = GgufWeights(file, architecture)
        for name in weights.names():
            weights.bf16(name)
        _use(Tokenizer.from_gguf(file))


def _read_safetensors(path: Path) -> None:
    with SafetensorsFile.open(path) as file:
        for name in file.names():
            file.bf16(name)


def _read_config(path: Path) -> None:
    architecture = read_architecture(load_json_object(path), str(path))
    architecture.tensor_shapes()
    assert read_architecture(architecture_to_config(architecture), "again") == architecture


def _read_index(path: Path) -> None:
    weights = ModelDirectory.open(path.parent).weights()
    for name in weights.names():
        weights.bf16(name)


def _read_tokenizer(path: Path) -> None:
    _use(Tokenizer.from_file(path))


def _use(tokens: Tokenizer) -> None:
    ids = tokens.encode("Hello, w\u00f6rld 12\n")
    assert not any(tokens.is_special(each) and each != unknown_id(tokens.to_json()) for each in ids)
    tokens.decode(ids)


def _file_seeds(name: str) -> Callable[[], list[bytes]]:
    return lambda: [sound_folder()[name]]


def _config_seeds() -> list[bytes]:
    """One configuration a family, with all fields that any family reads."""
    fields = json.loads(sound_folder()["config.json"])
    fields |= {
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "no_rope_layers": [1, 0],
    }
    fields |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0], "head_dim": 16}
    fields["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    configs = []
    for name, family in FAMILIES.items():
        config = {**fields, "model_type": name}
        if family.window == "none":
            config["sliding_window"] = None
        if family.experts_field:
            config[family.experts_field] = 4
        configs.append(json.dumps(config).encode())
    return configs


@cache
def _sharded() -> dict[str, bytes]:
    case = next(case for case in hostile_shards() if case.title == "shards: as it is")
    files = {path.removeprefix("in/folder/"): content for path, content in case.files.items()}
    return {name: content for name, content in files.items() if isinstance(content, bytes)}


def _index_seeds() -> list[bytes]:
    return [_sharded()[_INDEX]]


def _tokenizer_seeds() -> list[bytes]:
    """One of each kind, and one with a table of characters."""
    table = base64.b64encode(small_charsmap()).decode()
    unigram = {**description("unigram"), "normalizer": {"type": "Precompiled", "precompiled_charsmap": table}}
    kinds = [json.dumps(description(kind)).encode() for kind in KINDS]
    return [sound_folder()["tokenizer.json"], json.dumps(unigram).encode(), *kinds]


def _neighbours(name: str) -> dict[str, bytes]:
    """The files that a target's file lies beside."""
    return _sharded() if name == _INDEX else {}


@cache
def _fields() -> list[tuple[int, int]]:
    return [(border.at, border.size) for border in borders(small_gguf())]


def _mutate_gguf(__: bytes, rng: random.Random) -> bytes:
    """Lies in a few fields of the header of the sound file, its end cut off, or a part of it twice."""
    data = bytearray(small_gguf())
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, size = rng.choice(_fields())
        if size in (4, 8) and rng.random() < 0.7:
            value = rng.choice((rng.choice(_NUMBERS), rng.randrange(20), rng.getrandbits(8 * size)))
            data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        elif rng.random() < 0.2:
            data[at:at] = data[at : at + rng.randrange(200)]
        elif rng.random() < 0.1:
            del data[at:]
        elif (place := at + rng.randrange(max(1, size))) < len(data):
            data[place] = rng.randrange(256)
    return bytes(data)


def _mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A few values of the text changed, taken away or doubled; now and then its bytes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    for _ in range(rng.choice((1, 1, 2, 3))):
        _spoil(value, rng)
    text = json.dumps(value).encode()
    if rng.random() < 0.1:
        key = rng.choice(list(value)) if isinstance(value, dict) and value else "a"
        text = b"{%b: %b, %b" % (json.dumps(key).encode(), json.dumps(rng.choice(_VALUES)).encode(), text[1:])
    return text[: rng.randrange(len(text))] if rng.random() < 0.02 else text


def _spoil(value: Any, rng: random.Random) -> None:
    """Walk down a random way, and change what is at its end."""
    while isinstance(value, dict | list) and value:
        key: Any = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.85:
            value = value[key]
            continue
        kind = rng.random()
        if kind < 0.15:
            del value[key]
        elif kind < 0.3 and isinstance(value, dict):
            value[rng.choice(("x", "evil", "type", f"{key}x"))] = copy.deepcopy(value[key])
        elif kind < 0.3 and isinstance(value, list):
            value.append(copy.deepcopy(value[key]))
        elif kind < 0.45 and isinstance(value[key], int) and not isinstance(value[key], bool):
            value[key] += rng.choice((-1, 1, 2, 64, -64))
        else:
            value[key] = copy.deepcopy(rng.choice(_VALUES))
        return


def _mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header's text changed as above, and sometimes its length and the data."""
    sound = sound_folder()["model.safetensors"]
    size = int.from_bytes(data[:8], "little")
    source = data if 2 <= size <= len(data) - 8 and rng.random() < 0.5 else sound
    size = int.from_bytes(source[:8], "little")
    text = _mutate_json(source[8 : 8 + size], rng)
    length = len(text) if rng.random() < 0.95 else rng.choice(_NUMBERS)
    rest = source[8 + size :]
    return (
        length.to_bytes(8, "little")
        + text
        + (rest[: rng.randrange(len(rest) + 1)] if rng.random() < 0.1 else rest)
    )


TARGETS = {
    "gguf": Target(file="x.gguf", seeds=lambda: [small_gguf()], mutate=_mutate_gguf, read=_read_gguf),
    "safetensors": Target(
        file="model.safetensors",
        seeds=_file_seeds("model.safetensors"),
        mutate=_mutate_safetensors,
        read=_read_safetensors,
    ),
    "config": Target(file="config.json", seeds=_config_seeds, mutate=_mutate_json, read=_read_config),
    "index": Target(file=_INDEX, seeds=_index_seeds, mutate=_mutate_json, read=_read_index),
    "tokenizer": Target(
        file="tokenizer.json", seeds=_tokenizer_seeds, mutate=_mutate_json, read=_read_tokenizer
    ),
}
"""By what they read."""


def working_folder(target: Target) -> Path:
    """A new folder with what the target's file lies beside."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for name, content in _neighbours(target.file).items():
        with suppress(OSError):
            (folder / name).write_bytes(content)
    return folder
