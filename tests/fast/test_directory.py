"""Model directories: made from a GGUF file, opened, verified; weights equal to the file they came from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fast.model_files import Tensor, floats, gguf_bytes, tiny_gguf, tiny_llama
from tokenmill.core import Message, ModelFormatError, NotFoundError, StorageError
from tokenmill.models.formats.bfloat16 import round_to_bf16
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.formats.gguf_names import split_head_rows
from tokenmill.models.store.assemble import Origin, from_gguf, from_hf_folder
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.manifest import Manifest, is_plain_name

LAYER = "model.layers.1.self_attn"


def quiet(_: str, __: int, ___: int) -> None:
    pass


def make(folder: Path, data: bytes) -> ModelDirectory:
    folder.mkdir(exist_ok=True)
    (folder / "model.gguf").write_bytes(data)
    from_gguf(folder, Origin(name="tiny", source="a test"), quiet)
    return ModelDirectory.open(folder)


@pytest.fixture
def model(tmp_path: Path) -> ModelDirectory:
    return make(tmp_path / "tiny", tiny_gguf())


def permute_as_llama_cpp_does(rows: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Hugging Face row order to GGUF row order, written the way the converter of that format does it."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def test_row_order_undoes_the_converter() -> None:
    rows = np.arange(64 * 3).reshape(64, 3)
    np.testing.assert_array_equal(permute_as_llama_cpp_does(rows, 4)[split_head_rows(4, 16)], rows)


def test_weights_are_the_grid_rounded_with_rows_in_order(model: ModelDirectory) -> None:
    weights = model.weights()
    assert weights.names() == tuple(model.architecture.tensor_shapes())
    with GgufFile.open(model.path / "model.gguf") as gguf:
        for name, stored, num_heads in (
            ("q_proj", "attn_q", 4),
            ("k_proj", "attn_k", 2),
            ("v_proj", "attn_v", 0),
        ):
            expected = gguf.float32(f"blk.1.{stored}.weight")
            found = weights.grid(f"{LAYER}.{name}.weight")
            assert found is not None
            exact = found.float32()
            restored = permute_as_llama_cpp_does(exact, num_heads) if num_heads else exact
            np.testing.assert_array_equal(restored, expected)
            np.testing.assert_array_equal(weights.bf16(f"{LAYER}.{name}.weight"), round_to_bf16(exact))
            assert (
                np.abs(weights.float32(f"{LAYER}.{name}.weight") - exact).max() <= np.abs(exact).max() / 256
            )
    assert weights.grid("model.norm.weight") is None
    assert weights.shape("model.norm.weight") == (64,)


def test_the_reference_package_opens_the_weights(model: ModelDirectory) -> None:
    import safetensors

    with safetensors.safe_open(model.path / "model.safetensors", framework="np") as file:
        assert set(file.keys()) == set(model.architecture.tensor_shapes())
        assert file.metadata() == {"format": "pt"}


def test_files_say_the_same_again(model: ModelDirectory) -> None:
    assert model.name == "tiny"
    assert model.architecture.num_layers == 2 and model.architecture.eos_token_ids == (2,)
    assert model.architecture.norm_eps == 1e-5
    config = json.loads((model.path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    template = model.chat_template()
    assert template is not None
    assert template.render([Message(role="user", content="hi")]).startswith("<|im_start|>user\nhi")
    assert model.tokenizer().decode(model.tokenizer().encode("hell t")) == "hell t"


def test_manifest(model: ModelDirectory) -> None:
    manifest = model.manifest
    assert manifest is not None
    assert manifest.licences == ("apache-2.0",) and manifest.grid_file == "model.gguf"
    assert "Q4_1, Q8_0" in manifest.quantisation and "rounded to bf16" in manifest.quantisation
    assert manifest.parent.startswith("sha256:") and manifest.recipe == {"step": "convert", "from": "gguf"}
    assert manifest.costs.num_params == model.architecture.num_params
    assert manifest.num_bytes == sum(
        file.stat().st_size for file in model.path.iterdir() if file.name != "tokenmill.json"
    )
    assert Manifest.read(model.path) == manifest
    assert model.digest == manifest.digest and len(model.digest) == 64


def test_verify_finds_every_change(model: ModelDirectory) -> None:
    seen = []
    model.verify(lambda name, done, total: seen.append((name, done == total)))
    assert model.manifest is not None
    assert {name for name, complete in seen if complete} == set(model.manifest.files)
    for name in model.manifest.files:
        path = model.path / name
        data = path.read_bytes()
        for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(StorageError, match=name) as caught:
                model.verify()
            assert "tokenmill pull" in caught.value.hint
        path.write_bytes(data)
    model.verify()
    (model.path / "chat_template.jinja").rename(model.path / "hidden")
    (model.path / "tokenmill.json").write_text(
        (model.path / "tokenmill.json").read_text().replace('"chat_template.jinja"', '"hidden"')
    )
    (model.path / "chat_template.jinja").write_text("evil")
    with pytest.raises(StorageError, match="not listed"):
        ModelDirectory.open(model.path).verify()


def test_a_folder_without_a_manifest_opens_but_cannot_be_verified(model: ModelDirectory) -> None:
    digest = model.digest
    (model.path / "tokenmill.json").unlink()
    plain = ModelDirectory.open(model.path)
    assert plain.manifest is None
    assert (
        plain.weights().grid(f"{LAYER}.q_proj.weight") is None
    )  # nothing says that model.gguf belongs to it
    assert plain.digest == digest
    with pytest.raises(NotFoundError, match=r"tokenmill\.json"):
        plain.verify()
    with pytest.raises(NotFoundError, match="no model directory"):
        ModelDirectory.open(model.path / "absent")


def test_float_files_keep_no_grid(tmp_path: Path) -> None:
    metadata, tensors = tiny_llama()
    rng = np.random.default_rng(5)
    plain = [
        tensor if tensor.dtype == "F32" else floats(rng, tensor.name, tensor.shape) for tensor in tensors
    ]
    model = make(tmp_path / "tiny", gguf_bytes(metadata, plain))
    assert model.manifest is not None and model.manifest.grid_file == ""
    assert not (model.path / "model.gguf").exists()
    model.verify()


def changed(which: str, **changes: Any) -> Callable[[list[Tensor]], list[Tensor]]:
    def apply(tensors: list[Tensor]) -> list[Tensor]:
        return [
            Tensor(**{**vars(tensor), **changes}) if tensor.name == which else tensor for tensor in tensors
        ]

    return apply


NAN_SCALE = b"\x00\x7e" + bytes(18)
BAD_TENSORS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "one is missing": lambda tensors: tensors[:-1],
    "one is unknown": changed("output_norm.weight", name="rope_freqs.weight"),
    "one layer too many": lambda tensors: [
        *tensors,
        Tensor(**{**vars(tensors[1]), "name": "blk.2.attn_norm.weight"}),
    ],
    "wrong shape": changed("output_norm.weight", shape=(32,), data=bytes(128)),
    "not a number": changed("blk.0.attn_q.weight", data=NAN_SCALE * 128),
    "infinite": changed("output_norm.weight", data=np.full(64, np.inf, "<f4").tobytes()),
    "embeddings fewer than tokens": changed("token_embd.weight", shape=(64, 64), data=bytes(34 * 128)),
}


@pytest.mark.parametrize("change", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors_are_refused(tmp_path: Path, change: Callable[[list[Tensor]], list[Tensor]]) -> None:
    metadata, tensors = tiny_llama()
    with pytest.raises(ModelFormatError, match=str(tmp_path)):
        make(tmp_path / "tiny", gguf_bytes(metadata, change(tensors)))


BAD_METADATA = [
    ("general.architecture", "gpt2"),
    ("general.architecture", 7),
    ("llama.block_count", 3),
    ("llama.block_count", 2**31),
    ("llama.attention.head_count", [4, 4]),
    ("llama.attention.head_count", 0),
    ("llama.attention.key_length", 8),
    ("llama.rope.dimension_count", 8),
    ("llama.rope.scaling.type", "yarn"),
    ("llama.rope.scaling.type", ["yarn"]),
    ("llama.rope.freq_base", float("nan")),
    ("llama.expert_count", 8),
    ("llama.context_length", "long"),
    ("llama.attention.layer_norm_rms_epsilon", -1.0),
    ("tokenizer.ggml.eos_token_id", 10**6),
    ("tokenizer.chat_template", "{% if %}"),
    ("tokenizer.chat_template", "x" * 300_000),
]


@pytest.mark.parametrize(("key", "value"), BAD_METADATA)
def test_bad_metadata_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelFormatError, match=str(tmp_path)):
        make(tmp_path / "tiny", tiny_gguf(**{key: value}))


def test_hf_folder(model: ModelDirectory, tmp_path: Path) -> None:
    (model.path / "modeling_evil.py").write_text("raise SystemExit")
    (model.path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "chat_template": [{"name": "default", "template": "{{ eos_token }}"}],
                "eos_token": {"content": "E"},
            }
        )
    )
    (model.path / "chat_template.jinja").unlink()
    staging = tmp_path / "copy"
    staging.mkdir()
    from_hf_folder(model.path, staging, Origin(name="copy", source="a folder"), quiet)
    copy = ModelDirectory.open(staging)
    copy.verify()
    assert sorted(file.name for file in staging.iterdir() if file.suffix == ".py") == []
    template = copy.chat_template()
    assert template is not None and template.render([Message(role="user", content="x")]) == "E"
    np.testing.assert_array_equal(
        copy.weights().bf16("model.norm.weight"), model.weights().bf16("model.norm.weight")
    )


def with_template(model: ModelDirectory, **config: Any) -> ModelDirectory:
    """The model with this `tokenizer_config.json` and no other template, opened again."""
    (model.path / "chat_template.jinja").unlink(missing_ok=True)
    (model.path / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelDirectory.open(model.path)


def test_named_templates(model: ModelDirectory) -> None:
    named = [{"name": "tool_use", "template": "T {{ tools[0].name }}"}, {"name": "rag", "template": 7}, "x"]
    template = with_template(
        model, chat_template=[*named, {"name": "default", "template": "D"}]
    ).chat_template()
    assert template is not None
    hello = [Message(role="user", content="x")]
    assert template.render(hello) == "D"
    assert template.render(hello, tools=[{"name": "clock"}]) == "T clock"
    assert with_template(model, chat_template=named).chat_template() is None
    broken = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "\n{% x %}"}]
    template = with_template(model, chat_template=broken).chat_template()
    assert template is not None
    with pytest.raises(ModelFormatError, match=r"chat_template 'tool_use': cannot be rendered \(line 2"):
        template.render(hello, tools=[{"name": "clock"}])
    for value in (7, [{"name": "tool_use", "template": ["x"]}]):
        with pytest.raises(ModelFormatError, match="chat_template is no text"):
            with_template(model, chat_template=value).chat_template()


def test_every_special_token_is_a_variable(model: ModelDirectory) -> None:
    tokens = {"pad_token": {"content": "<pad>"}, "image_token": "<image>", "add_bos_token": True}
    source = "{{ bos_token }}|{{ pad_token }}{{ image_token }}{{ add_bos_token }}{{ unk_token }}"
    template = with_template(model, chat_template=source, unk_token=None, **tokens).chat_template()
    assert template is not None
    assert template.render([Message(role="user", content="x")]) == "|<pad><image>"
    with pytest.raises(ModelFormatError, match="a token has half of a surrogate pair"):
        with_template(model, chat_template=source, eos_token="\ud800").chat_template()


def test_weights_of_another_architecture_are_refused(model: ModelDirectory) -> None:
    path = model.path / "config.json"
    config = json.loads(path.read_text())
    for field, value, match in (
        ("num_hidden_layers", 1, "does not belong"),
        ("num_hidden_layers", 3, "is missing"),
        ("intermediate_size", 128, "expected"),
    ):
        path.write_text(json.dumps({**config, field: value}))
        with pytest.raises(ModelFormatError, match=match):
            ModelDirectory.open(model.path).weights()
    path.write_text(json.dumps({**config, "vocab_size": 100, "bos_token_id": 1}))
    with pytest.raises(ModelFormatError, match="embeddings"):
        ModelDirectory.open(model.path).tokenizer()


BAD_MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": lambda data: data.update(format=2),
    "no files": lambda data: data.pop("files"),
    "a path": lambda data: data["files"].update({"../x": data["files"]["config.json"]}),
    "no hash": lambda data: data["files"].update({"x": {"sha256": "0", "num_bytes": 1}}),
    "negative size": lambda data: data["files"].update({"x": {"sha256": "0" * 64, "num_bytes": -1}}),
    "entry no object": lambda data: data["files"].update(x=1),
    "grid of no file": lambda data: data.update(grid_file="other.gguf"),
    "name no text": lambda data: data.update(name=1),
    "licences no list": lambda data: data.update(licences="MIT"),
    "recipe no text": lambda data: data.update(recipe={"step": 1}),
    "costs missing": lambda data: data.update(costs={}),
}


@pytest.mark.parametrize("change", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_bad_manifests_are_refused(model: ModelDirectory, change: Callable[[dict[str, Any]], object]) -> None:
    path = model.path / "tokenmill.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ModelFormatError, match=r"tokenmill\.json"):
        ModelDirectory.open(model.path)


def test_plain_names() -> None:
    assert all(map(is_plain_name, ("smollm2-135m", "a", "Model_1.2", "x" * 100)))
    bad = [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc",
        "~",
        "-rf",
        ".hidden",
        "a b",
        "a\n",
        "nul",
        "COM1.txt",
        "a.",
    ]
    assert not any(map(is_plain_name, [*bad, "x" * 101, "a\x00", "модель"]))
