"""Checkpoints in shards: read as one, moved as one, and refused unless index and shards agree exactly."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.fast.model_files import tiny_gguf
from tests.fast.shard_files import read_map, shard_name, sharded_copy, write_index
from tests.fast.test_directory import make
from tokenmill.core import ModelFormatError, StorageError
from tokenmill.models.formats.checkpoint import INDEX_NAME, Checkpoint
from tokenmill.models.formats.safetensors import write_safetensors
from tokenmill.models.packing.compile import load_packed
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.library import Library
from tokenmill.models.store.pull import import_model

FIRST, SECOND = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"


@pytest.fixture
def whole(tmp_path: Path) -> ModelDirectory:
    return make(tmp_path / "whole", tiny_gguf())


@pytest.fixture
def folder(whole: ModelDirectory, tmp_path: Path) -> Path:
    return sharded_copy(whole.path, tmp_path / "shards")


def test_shards_are_the_same_weights(whole: ModelDirectory, folder: Path) -> None:
    one, many = whole.weights(), ModelDirectory.open(folder).weights()
    assert set(many.names()) == set(one.names())
    for name in one.names():
        assert many.shape(name) == one.shape(name)
        np.testing.assert_array_equal(many.bf16(name), one.bf16(name))
        np.testing.assert_array_equal(many.float32(name), one.float32(name))


def test_a_sharded_folder_is_pulled_verified_and_removed(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    library = Library(tmp_path / "home")
    model = import_model(folder, library)
    shards = {shard_name(number, 3) for number in (1, 2, 3)}
    assert model.manifest is not None
    assert set(model.manifest.files) >= {INDEX_NAME, *shards}
    assert {path.name for path in model.path.iterdir()} == {*model.manifest.files, "tokenmill.json"}
    model.verify()
    (model.path / shard_name(2, 3)).write_bytes(b"")
    with pytest.raises(StorageError, match=shard_name(2, 3)):
        model.verify()
    library.remove("shards")
    assert library.names() == []


def test_a_shard_that_is_not_in_the_manifest_is_found(folder: Path, tmp_path: Path) -> None:
    model = import_model(folder, Library(tmp_path / "home"))
    (model.path / shard_name(1, 9)).write_bytes(b"")
    with pytest.raises(StorageError, match="is not listed"):
        model.verify()


def test_the_single_file_counts_where_both_are(whole: ModelDirectory, folder: Path, tmp_path: Path) -> None:
    os.link(whole.path / "model.safetensors", folder / "model.safetensors")
    (folder / INDEX_NAME).write_text("nonsense")
    model = import_model(folder, Library(tmp_path / "home"))
    assert model.manifest is not None and INDEX_NAME not in model.manifest.files


def test_the_cache_follows_every_shard(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "home"))
    model = ModelDirectory.open(folder)
    before = load_packed(model, "bf16").embed.data.copy()
    shard = folder / read_map(folder)[FIRST]
    with_shapes = Checkpoint.open(folder)
    names = [name for name, holder in read_map(folder).items() if holder == shard.name]
    tensors = {name: with_shapes.bf16(name) ^ np.uint16(1) for name in names}
    with_shapes.close()
    write_safetensors(
        shard, {name: each.shape for name, each in tensors.items()}, "BF16", tensors.__getitem__
    )
    assert not np.array_equal(load_packed(ModelDirectory.open(folder), "bf16").embed.data, before)


def test_a_weight_that_is_not_finite_is_refused_at_import(folder: Path, tmp_path: Path) -> None:
    shard = folder / read_map(folder)[SECOND]
    data = bytearray(shard.read_bytes())
    data[-2:] = b"\xc0\x7f"  # a NaN
    shard.write_bytes(data)
    with pytest.raises(ModelFormatError, match="is not finite"):
        import_model(folder, Library(tmp_path / "home"))
    assert Library(tmp_path / "home").names() == []


def _moved(folder: Path) -> None:
    write_index(folder, {**read_map(folder), FIRST: shard_name(2, 3)})


def _unlisted(folder: Path) -> None:
    write_index(folder, {name: shard for name, shard in read_map(folder).items() if name != FIRST})


def _beyond(folder: Path) -> None:
    write_index(folder, {**read_map(folder), "more.weight": shard_name(1, 3)})


def _in_two(folder: Path) -> None:
    (folder / shard_name(2, 3)).write_bytes((folder / shard_name(1, 3)).read_bytes())


def _named(shard: object) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, {**read_map(folder), FIRST: shard})


def _weight_map(value: object) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, value)


def _text(data: bytes) -> Callable[[Path], None]:
    return lambda folder: _write(folder / INDEX_NAME, data)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _twice(folder: Path) -> None:
    text = (folder / INDEX_NAME).read_text()
    (folder / INDEX_NAME).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{FIRST}": "x", '))


def _typed(folder: Path) -> None:
    shard = folder / shard_name(1, 3)
    shard.write_bytes(shard.read_bytes().replace(b'"BF16"', b'"I16" ', 1))


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard is missing": (lambda folder: (folder / shard_name(2, 3)).unlink(), shard_name(2, 3)),
    "a shard too many": (lambda folder: _write(folder / shard_name(1, 4), b""), "which lies beside it"),
    "a tensor in another shard": (_moved, f"tensor {FIRST} is here, which the index says"),
    "a tensor the index has not": (_unlisted, f"tensor {FIRST} is here, which the index has not"),
    "a tensor no shard has": (_beyond, "weight_map: more.weight is not in"),
    "a tensor in two shards": (_in_two, "is here, which the index says"),
    "a shard cut short": (lambda folder: _write(folder / shard_name(3, 3), b"12345678"), shard_name(3, 3)),
    "an integer type": (_typed, "has the type I16"),
    "up and away": (_named("../model-00001-of-00003.safetensors"), "which is no shard"),
    "absolute": (_named("/etc/passwd"), "which is no shard"),
    "another repository": (_named("owner/model-00001-of-00003.safetensors"), "which is no shard"),
    "digits of another script": (_named("model-0000१-of-00003.safetensors"), "which is no shard"),
    "a newline": (_named("model-00001-of-00003.safetensors\n"), "which is no shard"),
    "two totals": (_named(shard_name(1, 4)), "names no set of"),
    "number nought": (_named(shard_name(0, 3)), "names a shard beyond"),
    "beyond the last": (_named(shard_name(4, 3)), "names a shard beyond"),
    "not a name": (_named(7), "is no name of a file"),
    "99,999 shards": (_weight_map({"a": shard_name(1, 99_999)}), "names no set of 1 to 1000"),
    "no weights": (_weight_map({}), "weight_map is missing, empty"),
    "weights no object": (_weight_map([]), "weight_map is missing, empty"),
    "a hostile tensor name": (_weight_map({"../../x": shard_name(1, 1)}), "other characters"),
    "a key twice": (_twice, "has a key twice"),
    "not JSON": (_text(b"{"), "is not JSON"),
    "nested": (_text(b"[" * 100_000), "is not JSON"),
    "no object": (_text(b"[]"), "is not a JSON object"),
    "too large": (_text(b" " * (17 << 20)), "is larger than"),
}


@pytest.mark.parametrize(("damage", "says"), BAD.values(), ids=BAD)
def test_an_index_that_does_not_agree_is_refused(
    folder: Path, damage: Callable[[Path], None], says: str
) -> None:
    Checkpoint.open(folder).close()
    damage(folder)
    started = time.monotonic()
    with pytest.raises(ModelFormatError) as caught:
        Checkpoint.open(folder)
    assert says in caught.value.message and str(folder) in caught.value.message
    assert time.monotonic() - started < 2.0


def test_a_hundred_thousand_tensors_are_read_or_refused_soon(folder: Path) -> None:
    write_index(folder, {f"t.{number}": shard_name(1, 1) for number in range(100_000)})
    started = time.monotonic()
    with pytest.raises(ModelFormatError):
        Checkpoint.open(folder)
    assert time.monotonic() - started < 3.0
    assert json.loads((folder / INDEX_NAME).read_text())
