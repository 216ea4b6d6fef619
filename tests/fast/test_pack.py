"""Packed weights hold what they should, come back from disk as they were, and smoothing helps."""

import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.fast.model_files import tiny_gguf
from tests.fast.random_plan import make_batch
from tests.fast.random_weights import RandomWeights, tiny_architecture
from tokenmill.core import UsageError
from tokenmill.kernels import F32Array, NumpyExecutor, PackedLinear, available_isas, create_executor
from tokenmill.kernels.packing import (
    pack_i4g,
    pack_i8c,
    quantize_groups,
    unpack_bf16,
    unpack_groups,
    unpack_i8c,
)
from tokenmill.kernels.twin import bf16_values
from tokenmill.models import weights as weights_module
from tokenmill.models.packing.compile import forget_packed, load_packed
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.pack import WeightFormat, pack_model, pack_pieces
from tokenmill.models.packing.packed import ExpertParts, _arrays, read_packed, write_packed
from tokenmill.models.packing.smoothing import activation_peaks, smoothing_factors
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.library import Library
from tokenmill.models.store.pull import import_model

ARCHITECTURE = tiny_architecture()
TURNS = np.arange(320).reshape(2, -1, 16).transpose(1, 0, 2).reshape(-1)


def values_of(packed: PackedLinear) -> F32Array:
    """What a packed matrix means, [N, K]."""
    if packed.kind == "bf16":
        return bf16_values(unpack_bf16(packed))
    if packed.kind == "i8c":
        q, scales = unpack_i8c(packed)
        return q.astype(np.float32) * scales[:, None]
    values, group_scales, mins = unpack_groups(packed)
    grouped = values.reshape(packed.num_out, -1, packed.group).astype(np.float32)
    grouped = grouped * group_scales.astype(np.float32)[:, :, None]
    if mins is not None:
        grouped = grouped + mins.astype(np.float32)[:, :, None]
    return grouped.reshape(packed.num_out, packed.num_in)


def stacked(source: RandomWeights, *names: str) -> F32Array:
    return np.concatenate([source.float32(f"model.layers.1.{name}.weight") for name in names])


def test_bf16_is_the_source_exactly() -> None:
    source = RandomWeights(ARCHITECTURE)
    linears = pack_model(ARCHITECTURE, source, "bf16").linears
    qkv = stacked(source, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up = stacked(source, "mlp.gate_proj", "mlp.up_proj")
    np.testing.assert_array_equal(values_of(linears["blocks.1.qkv"]), qkv)
    np.testing.assert_array_equal(values_of(linears["blocks.1.gate_up"]), gate_up[TURNS])


@pytest.mark.parametrize("bits", [4, 8])
def test_w4a8_is_the_file_s_grid_exactly(bits: int) -> None:
    source = RandomWeights(ARCHITECTURE, bits=bits)
    linears = pack_model(ARCHITECTURE, source, "w4a8").linears
    grid = source.grid("model.layers.1.mlp.down_proj.weight")
    assert grid is not None
    assert linears["blocks.1.down"].kind == f"i{bits}g"
    np.testing.assert_array_equal(values_of(linears["blocks.1.down"]), grid.float32())


def test_w4a8_without_a_grid_rounds_to_within_half_a_step() -> None:
    source = RandomWeights(ARCHITECTURE)
    packed = pack_model(ARCHITECTURE, source, "w4a8").linears["blocks.1.down"]
    error = np.abs(values_of(packed) - stacked(source, "mlp.down_proj")).reshape(packed.num_out, -1, 32)
    step = unpack_groups(packed)[1].astype(np.float32)
    assert packed.kind == "i4g"
    assert (error.max(axis=2) <= 0.55 * step + 1e-3).all()


@pytest.mark.parametrize("group", [32, 64, 96])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_come_back_as_they_were(group: int, symmetric: bool) -> None:
    weight = np.random.default_rng(2).standard_normal((50, 192), np.float32)
    values, scales, mins = quantize_groups(weight, group, symmetric=symmetric)
    back, back_scales, back_mins = unpack_groups(pack_i4g(values, scales, mins))
    np.testing.assert_array_equal(back + (8 if symmetric else 0), values)
    np.testing.assert_array_equal(back_scales, scales)
    assert (back_mins is None) == symmetric
    if back_mins is not None and mins is not None:
        np.testing.assert_array_equal(back_mins, mins)


def test_a_group_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="group size 128 does not fit 576 inputs; use 32, 64 or 96"):
        quantize_groups(np.zeros((16, 576), np.float32), 128, symmetric=True)


def test_eight_bits_are_within_half_a_step() -> None:
    weight = np.random.default_rng(3).standard_normal((33, 70), np.float32)
    weight[4] = 0
    packed = pack_i8c(weight)
    error = np.abs(values_of(packed) - weight).max(axis=1)
    assert (error <= 0.5001 * unpack_i8c(packed)[1]).all()


@pytest.mark.parametrize("weights", ["w8a8", "w4a8", "bf16"])
def test_the_file_gives_back_what_was_packed(tmp_path: Path, weights: WeightFormat) -> None:
    model = pack_model(ARCHITECTURE, RandomWeights(ARCHITECTURE, bits=4), weights)
    write_packed(tmp_path / "m.packed", model.pieces())
    back = read_packed(tmp_path / "m.packed")
    assert back is not None
    assert list(back.linears) == list(model.linears)
    for name, linear in model.linears.items():
        np.testing.assert_array_equal(values_of(back.linears[name]), values_of(linear))
        assert back.linears[name].data.ctypes.data % 64 == 0
    for name, weight in model.floats.items():
        np.testing.assert_array_equal(back.floats[name], weight)


def test_a_damaged_cache_file_is_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "m.packed"
    write_packed(path, pack_model(ARCHITECTURE, RandomWeights(ARCHITECTURE), "w8a8").pieces())
    whole = path.read_bytes()
    for cut in (0, 7, 100, len(whole) - 64):
        path.write_bytes(whole[:cut])
        assert read_packed(path) is None
    path.write_bytes(b"\xff" * 8 + whole[8:])
    assert read_packed(path) is None
    assert read_packed(tmp_path / "absent") is None


def test_smoothing_evens_outlier_channels() -> None:
    source = RandomWeights(ARCHITECTURE, outlier=60.0)
    plain = pack_model(ARCHITECTURE, source, "bf16")
    peaks = activation_peaks(compile_plan(ARCHITECTURE, plain))
    smoothed = pack_model(ARCHITECTURE, source, "w8a8")
    before = peaks["blocks.1.ln2.hook_normalized"]
    matrix = stacked(source, "mlp.gate_proj", "mlp.up_proj")
    factors = smoothing_factors(before, np.abs(matrix).max(axis=0))
    assert before.argmax() == 7
    assert np.isclose(np.log(factors).mean(), 0, atol=1e-5)
    assert (before / factors).max() / np.median(before / factors) < 0.5 * before.max() / np.median(before)
    np.testing.assert_allclose(smoothed.floats["blocks.1.ln2"], plain.floats["blocks.1.ln2"] / factors)


def test_smoothed_8_bits_are_nearer_to_bf16_than_plain_8_bits() -> None:
    source = RandomWeights(ARCHITECTURE, outlier=60.0)
    wanted = activation_peaks(compile_plan(ARCHITECTURE, pack_model(ARCHITECTURE, source, "bf16")))
    smoothed = pack_model(ARCHITECTURE, source, "w8a8")
    plain = {
        name: pack_i8c(values_of(linear))
        for name, linear in pack_model(ARCHITECTURE, source, "bf16").linears.items()
    }
    rough = type(smoothed)(
        embed=smoothed.embed, linears=plain, floats=pack_model(ARCHITECTURE, source, "bf16").floats
    )
    peaks = [activation_peaks(compile_plan(ARCHITECTURE, model)) for model in (smoothed, rough)]
    # The input of attention's output projection is the one that smoothing leaves in its place.
    out = "blocks.1.attn.hook_z"
    errors = [np.abs(each[out] - wanted[out]).mean() for each in peaks]
    assert errors[0] < errors[1]


def test_an_odd_gated_unit_is_refused() -> None:
    odd = type(ARCHITECTURE)(**{**vars(ARCHITECTURE), "intermediate_size": 40})
    with pytest.raises(UsageError, match="gated unit of width 40"):
        pack_model(odd, RandomWeights(odd), "bf16")


def test_a_plan_names_its_points() -> None:
    plan = compile_plan(ARCHITECTURE, pack_model(ARCHITECTURE, RandomWeights(ARCHITECTURE), "bf16"))
    names = [op.name for op in plan.ops if op.name]
    assert names[:7] == [
        "hook_embed",
        "blocks.0.ln1.hook_normalized",
        "blocks.0.attn.hook_z",
        "blocks.0.hook_resid_mid",
        "blocks.0.ln2.hook_normalized",
        "blocks.0.mlp.hook_post",
        "blocks.0.hook_resid_post",
    ]
    assert names[-1] == "ln_final.hook_normalized"
    assert create_executor(plan, max_rows=4, max_out_rows=4, num_blocks=1).plan is plan


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("weights", ["w8a8", "w4a8", "bf16"])
def test_formats_that_mix_run_as_the_twin_does(weights: WeightFormat, isa: str) -> None:
    """Without a grid the head of w4a8 has a scale an output and the blocks have groups."""
    plan = compile_plan(ARCHITECTURE, pack_model(ARCHITECTURE, RandomWeights(ARCHITECTURE), weights))
    batch = make_batch([([5, 9, 2, 77], 0, [1])])
    native = create_executor(plan, max_rows=4, max_out_rows=4, num_blocks=2, isa=isa)
    twin = NumpyExecutor(plan, max_rows=4, max_out_rows=4, num_blocks=2, ordered=isa != "numpy")
    for executor in (native, twin):
        executor.run(batch)
    np.testing.assert_array_equal(native.buffer("logits"), twin.buffer("logits"))


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelDirectory:
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "home"))
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf())
    return import_model(path, Library(tmp_path / "home"))


def head_of(directory: ModelDirectory) -> F32Array:
    return values_of(load_packed(ModelDirectory.open(directory.path), "bf16").linears["head"])


def test_the_cache_follows_the_files_not_the_manifest(tiny_model: ModelDirectory, tmp_path: Path) -> None:
    before = head_of(tiny_model)
    evil = tmp_path / "evil"
    shutil.copytree(tiny_model.path, evil)
    weights = evil / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[4096:8192] = bytes(4096)
    weights.write_bytes(data)
    assert not np.array_equal(head_of(ModelDirectory.open(evil)), before)
    np.testing.assert_array_equal(head_of(tiny_model), before)
    assert len(list((tmp_path / "home" / "cache").iterdir())) == 2
    weights.touch()
    head_of(ModelDirectory.open(evil))
    assert len(list((tmp_path / "home" / "cache").iterdir())) == 2
    (tiny_model.path / "config.json").write_text("damaged")
    forget_packed(tiny_model.path)
    assert len(list((tmp_path / "home" / "cache").iterdir())) == 1


@pytest.mark.parametrize("weights", ["w8a8", "w4a8", "bf16"])
def test_large_matrices_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch, weights: WeightFormat) -> None:
    whole = pack_model(ARCHITECTURE, RandomWeights(ARCHITECTURE), weights)
    monkeypatch.setattr(weights_module, "_PART_WEIGHTS", 1)  # 32 rows at a time
    parts = pack_model(ARCHITECTURE, RandomWeights(ARCHITECTURE), weights)
    for name, array in (("head", whole.linears["head"]), ("blocks.1.down", whole.linears["blocks.1.down"])):
        np.testing.assert_array_equal(parts.linears[name].data, array.data)
        np.testing.assert_array_equal(parts.linears[name].scales, array.scales)
        assert parts.linears[name].num_out == array.num_out


def packing_peak(path: Path, num_layers: int, weights: WeightFormat) -> int:
    """Most bytes of arrays at a time while a model of so many layers is packed to a file."""
    layers = ARCHITECTURE.layers[:1] * num_layers
    source = RandomWeights(replace(ARCHITECTURE, num_layers=num_layers, layers=layers))
    sizes = {"ln_final.hook_normalized": 96}
    for layer in range(num_layers):
        points = {"ln1.hook_normalized": 96, "ln2.hook_normalized": 96, "mlp.hook_post": 160}
        sizes |= {f"blocks.{layer}.{point}": size for point, size in points.items()}
    peaks = {point: np.ones(size, np.float32) for point, size in sizes.items()}
    tracemalloc.start()
    pieces = pack_pieces(source.architecture, source, weights, peaks)
    write_packed(path, pieces)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("weights", ["w8a8", "w4a8", "bf16"])
def test_packing_to_a_file_holds_one_piece_at_a_time(tmp_path: Path, weights: WeightFormat) -> None:
    shallow, deep = tmp_path / "shallow", tmp_path / "deep"
    growth = packing_peak(deep, 16, weights) - packing_peak(shallow, 2, weights)
    assert growth < 0.25 * (deep.stat().st_size - shallow.stat().st_size)


@pytest.mark.parametrize("weights", ["w8a8", "w4a8", "bf16"])
def test_the_cached_file_is_what_packing_in_memory_gives(
    tiny_model: ModelDirectory, tmp_path: Path, weights: WeightFormat
) -> None:
    cached = load_packed(tiny_model, weights)
    expected = pack_model(tiny_model.architecture, tiny_model.weights(), weights)
    found = dict(cached.pieces())
    assert set(found) == {name for name, _ in expected.pieces()}
    for name, piece in expected.pieces():
        assert not isinstance(piece, ExpertParts)
        other_piece = found[name]
        assert not isinstance(other_piece, ExpertParts)
        pairs = zip(_arrays(name, piece), _arrays(name, other_piece), strict=True)
        for (_, one), (_, other) in pairs:
            np.testing.assert_array_equal(one, other)
    assert len(list((tmp_path / "home/cache").iterdir())) == 1, "nothing else is left"


def test_w4a8_without_a_grid_has_embeddings_within_half_a_step() -> None:
    source = RandomWeights(ARCHITECTURE)
    table = pack_model(ARCHITECTURE, source, "w4a8").embed
    scales = table.scales.astype(np.float32)[:, :, None]
    back = (table.data.reshape(100, -1, 32) * scales).reshape(100, 96)
    error = np.abs(back - source.float32("model.embed_tokens.weight")).reshape(100, -1, 32)
    assert table.data.dtype == np.int8 and (error <= 0.55 * scales).all()
