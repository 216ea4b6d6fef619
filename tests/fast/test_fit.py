"""What `--fit` counts is what is allocated, and the context it gives is the longest that fits."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.fast.cli_tools import make_home, make_runner
from tests.fast.random_plan import make_batch
from tests.fast.random_weights import RandomWeights, tiny_architecture
from tokenmill.cli.arguments import byte_size
from tokenmill.kernels import KV_BLOCK, KV_DTYPES, F32Array, KvDtype, choose_isa, create_executor
from tokenmill.models.architecture import Architecture, Experts, Layer
from tokenmill.models.packing.fit import StepSizes, find_fits, footprint, packed_bytes
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.pack import WEIGHT_FORMATS, WeightFormat, pack_model, pack_pieces
from tokenmill.models.packing.packed import PackedModel, read_packed, write_packed

PLAIN = tiny_architecture()
EXPERTS = Experts(num_experts=5, num_active=2, intermediate_size=48, renormalise=True)
ARCHITECTURES = {
    "tied": PLAIN,
    "untied": tiny_architecture(tied=False),
    "odd widths": replace(PLAIN, hidden_size=104, intermediate_size=176, vocab_size=131),
    "norms of queries": replace(PLAIN, family="qwen3", qk_norm="head"),
    "biases": replace(PLAIN, qkv_bias=True, out_bias=True, mlp_bias=True),
    "norms of outputs": replace(PLAIN, family="olmo2", post_norm=True, qk_norm="all"),
    "experts": replace(PLAIN, family="mixtral", experts=EXPERTS, layers=(Layer(routed=True), Layer())),
}
LIMIT = 400_000_000
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def table_bytes(model: PackedModel) -> int:
    return sum(-(-array.nbytes // 64) * 64 for array in (model.embed.data, model.embed.scales))


def even_peaks(architecture: Architecture) -> dict[str, F32Array]:
    """Peaks that need no pass over the model."""
    sizes = {"ln_final.hook_normalized": architecture.hidden_size}
    for layer in range(architecture.num_layers):
        sizes |= {f"blocks.{layer}.ln{norm}.hook_normalized": architecture.hidden_size for norm in (1, 2)}
        sizes[f"blocks.{layer}.mlp.hook_post"] = architecture.intermediate_size
    return {point: np.ones(size, np.float32) for point, size in sizes.items()}


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_packed_file_is_as_large_as_was_said(
    tmp_path: Path, architecture: Architecture, weights: WeightFormat
) -> None:
    source, peaks = RandomWeights(architecture), even_peaks(architecture)
    write_packed(tmp_path / "m.packed", pack_pieces(architecture, source, weights, peaks))
    back = read_packed(tmp_path / "m.packed")
    assert back is not None
    stored, embeddings = packed_bytes(architecture, weights)
    data = (tmp_path / "m.packed").read_bytes()
    assert stored + embeddings == int.from_bytes(data[:8], "little") - 64
    assert embeddings == table_bytes(back)
    whole = PackedModel.from_pieces(pack_pieces(architecture, source, weights, peaks))
    assert set(back.experts) == set(whole.experts)
    for name, experts in whole.experts.items():
        for part in ("data", "scales"):
            one, other = getattr(experts.linear, part), getattr(back.experts[name].linear, part)
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_grid_is_counted_as_it_is_packed(tmp_path: Path, bits: int) -> None:
    source = RandomWeights(PLAIN, bits=bits)
    write_packed(tmp_path / "m.packed", pack_pieces(PLAIN, source, "w4a8"))
    with (tmp_path / "m.packed").open("rb") as file:
        assert sum(packed_bytes(PLAIN, "w4a8", source)) == int.from_bytes(file.read(8), "little") - 64


def data_bytes() -> int:
    """Private memory that this process may write, touched or not."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"^VmData:\s+(\d+) kB", status, flags=re.MULTILINE)[0])


@pytest.mark.parametrize("num_routed", [0, 1, 2])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_executor_allocates_what_was_said(kv_dtype: KvDtype, num_routed: int) -> None:
    if choose_isa() == "numpy":
        pytest.skip("needs the native kernels")
    architecture = replace(PLAIN, vocab_size=20_000, intermediate_size=1600, max_positions=4096)
    if num_routed:
        experts = Experts(num_experts=40, num_active=3, intermediate_size=320, renormalise=True)
        layers = (*(Layer(routed=True),) * num_routed, *(Layer(),) * (2 - num_routed))
        architecture = replace(architecture, experts=experts, layers=layers)
    plan = compile_plan(architecture, pack_model(architecture, RandomWeights(architecture), "bf16"))
    sizes = StepSizes(max_rows=2048, max_out_rows=512, num_threads=1)
    said = footprint(architecture, kv_dtype, 65_536, sizes)
    before = data_bytes()
    executor = create_executor(
        plan, max_rows=2048, max_out_rows=512, num_blocks=65_536 // KV_BLOCK, num_threads=1, kv_dtype=kv_dtype
    )
    executor.run(make_batch([([5, 9, 2, 77], 0, [1])]))
    rotations = 4096 * 2 * 4 * 8  # these the plan has, and it was there before
    assert data_bytes() - before == pytest.approx(said.kv + said.steps - rotations, abs=1 << 19)
    assert said.kv + said.steps > 64 << 20


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_context_is_the_longest_that_fits(architecture: Architecture) -> None:
    large = replace(architecture, max_positions=1 << 24)
    for fit in find_fits(large, LIMIT, StepSizes(num_threads=1)):
        assert 0 < fit.context < 1 << 24 and fit.footprint.total <= LIMIT
        more = footprint(large, fit.kv_dtype, fit.context + 1, StepSizes(num_threads=1))
        assert more.total + fit.footprint.weights + fit.footprint.embeddings > LIMIT
    for fit in find_fits(architecture, LIMIT):
        assert fit.context == architecture.max_positions
    for fit in find_fits(architecture, 1000):
        assert fit.context == 0 and fit.footprint.total > 1000


def test_show_says_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_runner(monkeypatch, capsys, make_home(tmp_path))
    document = run("show", "tiny", "--fit", "1GB", "--json").document
    assert document["fit"]["limit_bytes"] == 1_000_000_000 and document["num_params"]
    forms = [(each["weights"], each["kv_dtype"]) for each in document["fit"]["formats"]]
    assert forms == [(weights, kv) for weights in WEIGHT_FORMATS for kv in KV_DTYPES]
    assert all(each["fits"] and each["context"] == 256 for each in document["fit"]["formats"])
    assert "too large" in run("show", "tiny", "--fit", "1MB").out
    assert "fit" not in run("show", "tiny", "--json").document
    assert run("show", "tiny", "--fit", "much").code == 2


def test_a_configuration_alone_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_runner(monkeypatch, capsys, tmp_path / "home")
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    path = str(tmp_path / "config.json")
    document = run("show", path, "--fit", "32GB", "--json").document
    assert document["num_params"] == 46_702_792_704
    assert document["num_active_params"] == 12_879_925_248
    fits = {each["weights"]: each for each in document["fit"]["formats"]}
    assert fits["w4a8"]["fits"] and not fits["bf16"]["fits"]
    plain = run("show", path).out
    assert "46.7 G (46702792704), active 12.9 G (12879925248)" in plain and "8 experts" in plain
    (tmp_path / "config.json").write_text("{}")
    assert "model_type" in run("show", path).error_line


@pytest.mark.parametrize(
    ("text", "size"),
    [("3GB", 3 * 10**9), ("3GiB", 3 << 30), ("2.5 gb", 2_500_000_000), ("800M", 800_000_000), ("64", 64)],
)
def test_sizes(text: str, size: int) -> None:
    assert byte_size(text) == size
