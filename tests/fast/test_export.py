"""Exports: what is written is pulled back as the same model, and nothing half-written or replaced."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest

from tests.fast.cli_tools import Runner, make_home, make_runner
from tests.fast.model_files import CHATML, Tensor, floats, gguf_bytes, quantised, tiny_llama
from tokenmill.cli.export import TYPES
from tokenmill.core import ModelFormatError, NotFoundError, StorageError, UsageError
from tokenmill.models.formats.bfloat16 import round_to_bf16
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.formats.safetensors import write_safetensors
from tokenmill.models.store import export as exporting
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.export import GGUF_TYPES, GgufType, export_gguf, export_hf
from tokenmill.models.store.library import Library
from tokenmill.models.store.pull import import_model

TEXTS = ("hell the théâtre 12 34\n\n  x", "<|im_end|> is text", "\U0001f600 <0x0A>")


def make(folder: Path, dtype: str = "Q4_1", **metadata: Any) -> ModelDirectory:
    """A tiny model whose matrices are stored as `dtype`, with a head of its own."""
    fields, tensors = tiny_llama(**metadata)
    rng = np.random.default_rng(7)
    stored = [each if each.dtype == "F32" else remade(rng, each, dtype) for each in tensors]
    head = dataclasses.replace(tensors[0], name="output.weight")
    stored.append(remade(rng, head, "F32" if dtype == "F32" else "Q8_0"))
    path = folder / f"{dtype}.gguf"
    path.write_bytes(gguf_bytes(fields, stored))
    return import_model(path, Library(folder / "home"), dtype)


def remade(rng: np.random.Generator, tensor: Tensor, dtype: str) -> Tensor:
    if dtype == "F32":
        return floats(rng, tensor.name, tensor.shape)
    return quantised(rng, tensor.name, (tensor.shape[0], tensor.shape[1]), dtype)


def pulled(folder: Path, path: Path) -> ModelDirectory:
    return import_model(path, Library(folder / "home"), f"back-{path.stem.lower()}")


def same_description(found: ModelDirectory, expected: ModelDirectory) -> None:
    assert found.architecture == expected.architecture
    assert found.manifest is not None and expected.manifest is not None
    assert found.manifest.licences == expected.manifest.licences
    assert found.tokenizer().to_json() == expected.tokenizer().to_json()
    for text in TEXTS:
        for allow in (False, True):
            assert found.tokenizer().encode(text, allow) == expected.tokenizer().encode(text, allow)
    template, original = found.chat_template(), expected.chat_template()
    assert template is not None and original is not None and template.source == original.source == CHATML
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        assert json.loads((found.path / name).read_text()) == json.loads((expected.path / name).read_text())


@pytest.mark.parametrize("gguf_type", GGUF_TYPES)
def test_gguf_comes_back_as_the_same_model(tmp_path: Path, gguf_type: GgufType) -> None:
    metadata = {
        "tokenizer__ggml__unknown_token_id": 0,
        "tokenizer__ggml__padding_token_id": 2,
        "tokenizer__ggml__add_bos_token": True,
        "tokenizer__ggml__eot_token_id": 0,
    }
    model = make(tmp_path, "F32", **metadata)
    assert model.architecture.eos_token_ids == (2, 0)
    exported = export_gguf(model, tmp_path / "out.gguf", gguf_type)
    assert exported.num_bytes == exported.path.stat().st_size and not exported.notes
    back = pulled(tmp_path, exported.path)
    same_description(back, model)
    weights, original = back.weights(), model.weights()
    kinds = {each.name: each.tensor_type for each in reference.GGUFReader(exported.path).tensors}
    matrix = reference.GGMLQuantizationType[gguf_type.upper()]
    assert kinds["blk.1.attn_q.weight"] == matrix and kinds["output_norm.weight"].name == "F32"
    assert kinds["token_embd.weight"].name == ("Q8_0" if gguf_type == "q4_0" else gguf_type.upper())
    for name in original.names():
        expected = original.float32(name)
        if expected.ndim > 1 and gguf_type != "bf16":
            kind = kinds["token_embd.weight"] if name.startswith(("lm_head", "model.embed")) else matrix
            expected = reference.quants.dequantize(reference.quants.quantize(expected, kind), kind)
        np.testing.assert_array_equal(weights.bf16(name), round_to_bf16(expected), name)


@pytest.mark.parametrize(("dtype", "gguf_type"), [("Q4_0", "q4_0"), ("Q8_0", "q8_0"), ("Q4_0", "q8_0")])
def test_a_grid_that_fits_is_written_as_it_is(tmp_path: Path, dtype: str, gguf_type: GgufType) -> None:
    """To the bit, query and key rows in the order of the file; not the rounding of its bf16 rounding."""
    model = make(tmp_path, dtype)
    exported = export_gguf(model, tmp_path / "out.gguf", gguf_type)
    with GgufFile.open(tmp_path / f"{dtype}.gguf") as before, GgufFile.open(exported.path) as after:
        assert set(before.tensors) == set(after.tensors)
        for name in before.tensors:
            if len(before.tensor(name).shape) == 2:
                np.testing.assert_array_equal(after.float32(name), before.float32(name), name)


def test_metadata_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    model = make(tmp_path)
    export_gguf(model, tmp_path / "out.gguf", "q4_0")
    with GgufFile.open(tmp_path / "out.gguf") as file:
        found = dict(file.metadata)
    assert found["general.architecture"] == "llama" and found["general.name"] == "Q4_1"
    assert found["general.license"] == "apache-2.0" and found["general.quantization_version"] == 2
    assert found["general.file_type"] == reference.LlamaFileType.MOSTLY_Q4_0
    assert found["llama.attention.head_count"] == 4 and found["llama.attention.key_length"] == 16
    assert found["llama.rope.dimension_count"] == 16 and found["llama.vocab_size"] == 263
    assert found["tokenizer.ggml.pre"] == "smollm" and found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.merges"] == ["h e", "l l", "he ll", "Ġ t"]
    assert found["tokenizer.ggml.bos_token_id"] == 1 and found["tokenizer.ggml.eos_token_id"] == 2
    assert all(
        int(getattr(reference.LlamaFileType, f"MOSTLY_{name.upper()}")) == exporting._FILE_TYPES[name]
        for name in GGUF_TYPES
    )


def test_hf_is_the_directory_without_our_own_files(tmp_path: Path) -> None:
    model = make(tmp_path)
    exported = export_hf(model, tmp_path / "out")
    names = {file.name for file in exported.path.iterdir()}
    assert names == {file.name for file in model.path.iterdir()} - {"model.gguf", "tokenmill.json"}
    for name in names:
        assert (exported.path / name).read_bytes() == (model.path / name).read_bytes()
    back = pulled(tmp_path, exported.path)
    assert model.manifest is not None and back.manifest is not None
    assert dict(back.manifest.files).items() <= dict(model.manifest.files).items()
    (model.path / "tokenmill.json").unlink()
    export_hf(ModelDirectory.open(model.path), tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").iterdir()} == names


def test_a_changed_file_is_not_exported(tmp_path: Path) -> None:
    model = make(tmp_path)
    data = bytearray((model.path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model.path / "model.safetensors").write_bytes(data)
    with pytest.raises(StorageError, match=r"model\.safetensors does not match"):
        export_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def huge(model: ModelDirectory, value: float) -> None:
    """Put one value into the model's weights."""
    weights = model.weights()
    tensors = {name: weights.bf16(name) for name in weights.names()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = round_to_bf16(np.array([value], np.float32))[0]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_safetensors(model.path / "model.safetensors", shapes, "BF16", tensors.__getitem__)


@pytest.mark.parametrize(
    ("gguf_type", "value", "is_refused"),
    [
        ("f16", 65280.0, False),
        ("f16", 65536.0, True),
        ("f16", float("nan"), True),
        ("q8_0", 8e6, False),
        ("q8_0", -9e6, True),
        ("q4_0", 6e5, True),
        ("bf16", 1e30, False),
        ("bf16", float("inf"), True),
    ],
)
def test_a_weight_that_the_type_cannot_hold(
    tmp_path: Path, gguf_type: GgufType, value: float, is_refused: bool
) -> None:
    model = make(tmp_path, "F32")
    huge(model, value)
    if not is_refused:
        export_gguf(model, tmp_path / "out.gguf", gguf_type)
        pulled(tmp_path, tmp_path / "out.gguf")
        return
    with pytest.raises(ModelFormatError, match=r"blk\.1\.ffn_up\.weight has a weight of"):
        export_gguf(model, tmp_path / "out.gguf", gguf_type)
    assert not (tmp_path / "out.gguf").exists() and not list(tmp_path.glob(".out*"))


def test_nothing_is_replaced_and_no_folder_is_made(tmp_path: Path) -> None:
    model = make(tmp_path)
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "home", "dangling"):
        for export in (export_gguf, export_hf):
            with pytest.raises(UsageError, match="exists already"):
                export(model, tmp_path / name)
    for export in (export_gguf, export_hf):
        with pytest.raises(NotFoundError, match="is no folder"):
            export(model, tmp_path / "absent/x")
    assert (tmp_path / "file").read_bytes() == b"mine" and not (tmp_path / "absent").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    model = make(tmp_path)

    def copy(*_: object) -> None:
        raise error

    monkeypatch.setattr(exporting, "copy_file", copy)
    with pytest.raises((StorageError, KeyboardInterrupt)) as caught:
        export_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    if isinstance(caught.value, StorageError):
        assert "--output" in caught.value.hint and "TOKENMILL_HOME" not in caught.value.hint


def test_rows_of_no_whole_blocks_are_f16(tmp_path: Path) -> None:
    fields, tensors = tiny_llama()
    fields["llama.feed_forward_length"] = 80
    shapes = {"ffn_gate": (80, 64), "ffn_up": (80, 64), "ffn_down": (64, 80)}
    rng = np.random.default_rng(1)
    stored = [floats(rng, each.name, shapes.get(each.name.split(".")[-2], each.shape)) for each in tensors]
    (tmp_path / "odd.gguf").write_bytes(gguf_bytes(fields, stored))
    exported = export_gguf(pulled(tmp_path, tmp_path / "odd.gguf"), tmp_path / "out.gguf", "q8_0")
    assert "2 matrices are F16" in exported.notes[0] and "ffn_down" in exported.notes[0]
    with GgufFile.open(exported.path) as file:
        assert file.tensor("blk.0.ffn_down.weight").dtype == "F16"
        assert file.tensor("blk.0.ffn_up.weight").dtype == "Q8_0"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    monkeypatch.chdir(tmp_path)
    return make_runner(monkeypatch, capsys, make_home(tmp_path))


def test_the_command_knows_the_types() -> None:
    assert TYPES == GGUF_TYPES


def test_the_command(run: Runner, tmp_path: Path) -> None:
    assert run("export", "tiny", "--to", "gguf").out.startswith("tiny is written: ")
    document = run("export", "tiny", "--to", "hf", "--json").document
    assert document["path"] == str(tmp_path / "tiny-hf") and document["type"] is None
    (tmp_path / "folder").mkdir()
    words = ("export", "tiny", "--to", "gguf", "--type", "f16", "--output", "folder", "--json")
    document = run(*words).document
    assert document["path"] == str(tmp_path / "folder/tiny-f16.gguf")
    assert document["num_bytes"] == (tmp_path / "folder/tiny-f16.gguf").stat().st_size
    assert run("pull", "folder/tiny-f16.gguf").code == 0 and run("pull", "tiny-hf").code == 0
    assert run("pull", "tiny-q8_0.gguf").code == 0
    named = ("export", str(tmp_path / "home/models/tiny"), "--to", "gguf", "--output", "mine.gguf")
    assert run(*named).code == 0 and (tmp_path / "mine.gguf").is_file()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("nothing", "--to", "gguf"), 3, "no model named 'nothing'"),
        (("tiny",), 2, "--to"),
        (("tiny", "--to", "gguf", "--type", "q5_0"), 2, "invalid choice: 'q5_0'"),
        (("tiny", "--to", "hf", "--type", "f16"), 2, "--type is for --to gguf"),
        (("tiny", "--to", "gguf", "--output", "tiny.gguf"), 2, "exists already"),
        (("tiny", "--to", "hf", "--output", "tiny.gguf"), 2, "exists already"),
        (("tiny", "--to", "hf", "--output", "absent/x"), 3, "absent is no folder"),
    ],
)
def test_what_the_command_refuses(
    run: Runner, tmp_path: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run("export", *words)
    assert result.code == code and says in result.error_line and result.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before
