"""The GGUF reader: equal to the reference package on sound files, one error on any other."""

import dataclasses
import math
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fast.model_files import ARRAY, STRING, Tensor, gguf_bytes, quantised, text, tiny_gguf, tiny_llama
from tokenmill.core import ModelFormatError
from tokenmill.models.formats import gguf as gguf_module
from tokenmill.models.formats.bfloat16 import round_to_bf16, widen_bf16
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.formats.gguf_quants import STORED_TYPES

OTHER_TYPES = ("Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
HUGE = (2**31, 2**32 - 1, 2**63, 2**64 - 1)
MAX_MEMORY = 64 << 20


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


def read_all(path: Path) -> None:
    with GgufFile.open(path) as file:
        for name in file.tensors:
            file.float32(name)
            file.grid(name)


def refuse(folder: Path, data: bytes, match: str = "model.gguf") -> None:
    started = time.monotonic()
    with pytest.raises(ModelFormatError, match=match):
        read_all(write(folder, data))
    assert time.monotonic() - started < 1.0


def f16_tensor(name: str, dtype: str) -> Tensor:
    values = np.random.default_rng(2).normal(0, 1, (3, 5)).astype(np.float32)
    data = values.astype("<f2") if dtype == "F16" else round_to_bf16(values)
    return Tensor(name=name, shape=(3, 5), dtype=dtype, data=data.tobytes())


def random_blocks(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Random bytes, with no float16 that is infinite or NaN."""
    stored = STORED_TYPES[dtype]
    data = rng.integers(0, 256, stored.num_bytes(math.prod(shape)), dtype=np.uint8) & 0xBB
    return Tensor(name=name, shape=shape, dtype=dtype, data=data.tobytes(), type_id=stored.type_id)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    tensors = [quantised(rng, f"m{kind}", (7, 96), kind) for kind in ("Q4_0", "Q4_1", "Q8_0")]
    tensors += [f16_tensor("half", "F16"), f16_tensor("brain", "BF16")]
    tensors += [random_blocks(rng, f"m{kind}", (3, 4, 512), kind) for kind in OTHER_TYPES]
    return write(tmp_path, gguf_bytes({"general.architecture": "llama", "a": 1.5, "b": True}, tensors))


def test_equals_the_reference_package(mixed: Path) -> None:
    file = GgufFile.open(mixed)
    tensors = reference.GGUFReader(mixed).tensors
    assert [tensor.name for tensor in tensors] == list(file.tensors)
    for tensor in tensors:
        expected = reference.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(
            file.float32(tensor.name), expected.reshape(file.tensor(tensor.name).shape)
        )


def test_grid_is_exact(mixed: Path) -> None:
    file = GgufFile.open(mixed)
    for name, low, high, bits in (("mQ4_0", -8, 7, 4), ("mQ4_1", 0, 15, 4), ("mQ8_0", -128, 127, 8)):
        grid = file.grid(name)
        assert grid is not None and grid.bits == bits
        assert (grid.mins is not None) == (name == "mQ4_1")
        assert grid.values.shape == (7, 96) and grid.scales.shape == (7, 3)
        assert low <= grid.values.min() and grid.values.max() <= high
        assert grid.values.dtype == (np.uint8 if low == 0 else np.int8)
        np.testing.assert_array_equal(grid.float32(), file.float32(name))
        rows = np.arange(7)[::-1].copy()
        np.testing.assert_array_equal(grid.take_rows(rows).float32(), file.float32(name)[rows])
    assert file.grid("half") is None and file.grid("mQ4_K") is None


def test_some_rows_are_those_of_the_whole(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = GgufFile.open(mixed)
    for at_once in (1, 700, 1 << 22):  # read in steps of one row, of a few, and all at once
        monkeypatch.setattr(gguf_module, "_ROWS_AT_ONCE", at_once)
        for name, tensor in file.tensors.items():
            whole = file.float32(name)
            assert whole.shape == tensor.shape
            rows = whole.reshape(-1, tensor.shape[-1])[1:3]
            np.testing.assert_array_equal(file.float32(name, slice(1, 3)), rows)
            np.testing.assert_array_equal(file.bf16(name, slice(1, 3)), round_to_bf16(rows))
    assert file.grid("mQ5_0") is None  # three dimensions are no matrix, but its rows are
    grid = file.grid("mQ5_0", slice(4, 8))
    assert grid is not None and grid.bits == 8
    np.testing.assert_array_equal(grid.float32(), file.float32("mQ5_0")[1])


def test_bf16_is_the_rounded_weight_and_keeps_bf16_as_it_is(mixed: Path) -> None:
    file = GgufFile.open(mixed)
    for name in file.tensors:
        np.testing.assert_array_equal(file.bf16(name), round_to_bf16(file.float32(name)))
    np.testing.assert_array_equal(widen_bf16(file.bf16("brain")), file.float32("brain"))


def test_metadata_is_read(mixed: Path, tmp_path: Path) -> None:
    assert dict(GgufFile.open(mixed).metadata) == {"general.architecture": "llama", "a": 1.5, "b": True}
    metadata = GgufFile.open(write(tmp_path, tiny_gguf())).metadata
    expected, _ = tiny_llama()
    assert metadata["tokenizer.ggml.tokens"] == expected["tokenizer.ggml.tokens"]
    assert list(np.asarray(metadata["tokenizer.ggml.token_type"])) == expected["tokenizer.ggml.token_type"]


def test_truncated_anywhere(tmp_path: Path) -> None:
    data = tiny_gguf()
    padding = -len(tiny_llama()[1][-1].data) % 32  # the last tensor's padding may be missing
    header = data.index(b"output_norm.weight") + 64
    cuts = [*range(0, header, 97), *range(header, len(data) - padding, 4001), len(data) - padding - 1]
    for cut in cuts:
        refuse(tmp_path, data[:cut])


def test_a_small_file_that_claims_a_huge_array(tmp_path: Path) -> None:
    # 49 bytes on which the reference reader loops for ever.
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k")
    data = head + struct.pack("<IIQ", ARRAY, 0, 2**63)
    refuse(tmp_path, data + bytes(49 - len(data)), "length of k")


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("at", [4, 8, 16, 24])  # version, tensor count, metadata count, first key length
def test_huge_counts(tmp_path: Path, at: int, value: int) -> None:
    data = bytearray(tiny_gguf())
    if at == 4:
        data[4:8] = struct.pack("<I", value % 2**32)
    else:
        data[at : at + 8] = struct.pack("<Q", value)
    refuse(tmp_path, bytes(data))


@pytest.mark.parametrize("kind", range(13))
@pytest.mark.parametrize("count", [2**16, *HUGE])
def test_huge_arrays_of_every_type(tmp_path: Path, kind: int, count: int) -> None:
    value = struct.pack("<IIQ", ARRAY, kind, count) + bytes(64)
    refuse(tmp_path, gguf_bytes({"k": value}, []), "k ")


BAD_METADATA = {
    "nested array": struct.pack("<IIQ", ARRAY, ARRAY, 1) + struct.pack("<IQ", 0, 0),
    "unknown type": struct.pack("<I", 13) + bytes(16),
    "unknown item type": struct.pack("<IIQ", ARRAY, 99, 1) + bytes(16),
    "boolean of 2": struct.pack("<IB", 7, 2),
    "not UTF-8": struct.pack("<I", STRING) + text(b"\xff\xfe"),
    "not UTF-8 in an array": struct.pack("<IIQ", ARRAY, STRING, 1) + text(b"\xff\xfe"),
    "huge string": struct.pack("<I", STRING) + text("x" * (1 << 20) + "x"),
}


@pytest.mark.parametrize("value", BAD_METADATA.values(), ids=BAD_METADATA)
def test_bad_metadata(tmp_path: Path, value: bytes) -> None:
    refuse(tmp_path, gguf_bytes({"k": value, "l": 1}, []), "k ")


@pytest.mark.parametrize("alignment", [0, 3, 33, 1 << 20, True, "32", -1.0])
def test_bad_alignment(tmp_path: Path, alignment: object) -> None:
    refuse(tmp_path, gguf_bytes({"general.alignment": alignment}, []), r"general\.alignment")


def test_bad_names(tmp_path: Path) -> None:
    for name in ("", "two words", "x" * 300, "\x00", "ключ"):
        refuse(tmp_path, gguf_bytes({name: 1}, []))
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 2)
    refuse(tmp_path, head + 2 * (text("k") + struct.pack("<II", 4, 1)), "k appears twice")


GOOD = Tensor(name="w", shape=(4, 32), dtype="F32", data=bytes(512))
BAD_TENSORS = {
    "twice": ([GOOD, GOOD], "w appears twice"),
    "overlap": ([GOOD, dataclasses.replace(GOOD, name="v", offset=480)], "v overlaps"),
    "beyond the end": ([dataclasses.replace(GOOD, offset=32)], "w ends at"),
    "far beyond the end": ([dataclasses.replace(GOOD, offset=2**64 - 32)], "w ends at"),
    "not aligned": ([dataclasses.replace(GOOD, offset=8)], "not aligned"),
    "no dimensions": ([dataclasses.replace(GOOD, shape=())], "shape"),
    "five dimensions": ([dataclasses.replace(GOOD, shape=(1, 1, 1, 4, 32))], "dimensions"),
    "empty": ([dataclasses.replace(GOOD, shape=(0, 32))], "shape"),
    "overflow": ([dataclasses.replace(GOOD, shape=(2**40, 2**40))], "shape"),
    "wraps to zero": ([dataclasses.replace(GOOD, shape=(2**32, 2**32))], "shape"),
    "ragged blocks": ([dataclasses.replace(GOOD, dtype="Q4_0", shape=(4, 33))], "multiple of 32"),
    "Q2_K": ([dataclasses.replace(GOOD, type_id=10)], "has the type Q2_K"),
    "ragged K blocks": ([dataclasses.replace(GOOD, type_id=14, shape=(4, 96))], "multiple of 256"),
    "unknown type": ([dataclasses.replace(GOOD, type_id=4_000_000_000)], "unknown"),
}


@pytest.mark.parametrize(("tensors", "match"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors(tmp_path: Path, tensors: list[Tensor], match: str) -> None:
    read_all(write(tmp_path, gguf_bytes({}, [GOOD])))
    refuse(tmp_path, gguf_bytes({}, tensors), match)


def test_missing_files_and_tensors(tmp_path: Path) -> None:
    refuse(tmp_path, b"")
    with pytest.raises(ModelFormatError, match="cannot be read"):
        GgufFile.open(tmp_path / "absent.gguf")
    with pytest.raises(ModelFormatError, match="tensor v is missing"):
        GgufFile.open(write(tmp_path, gguf_bytes({}, [GOOD]))).float32("v")


@settings(max_examples=150, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    mutated = bytearray(tiny_gguf())
    header = mutated.index(b"output_norm.weight") + 64
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 8))
        mutated[at : at + 8] = data.draw(
            st.one_of(
                st.binary(min_size=8, max_size=8), st.sampled_from([struct.pack("<Q", n) for n in HUGE])
            )
        )
    try:
        read_all(write(tmp_path, bytes(mutated)))
    except ModelFormatError as error:
        assert "model.gguf" in error.message


def test_memory_of_hostile_headers(tmp_path: Path) -> None:
    """In a child, because the limit is the process's: opening needs no more memory than a small multiple."""
    claims = [struct.pack("<IIQ", ARRAY, kind, count) for kind in (0, 8, 12) for count in (2**24, *HUGE)]
    for index, claim in enumerate(claims):
        (tmp_path / f"{index}.gguf").write_bytes(gguf_bytes({"k": claim}, []))
    script = (
        "import resource, sys, pathlib\n"
        "from tokenmill.models.formats.gguf import GgufFile\n"
        "from tokenmill.core import ModelFormatError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in pathlib.Path(sys.argv[1]).glob('*.gguf'):\n"
        "    try: GgufFile.open(path)\n"
        "    except ModelFormatError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert int(result.stdout) * 1024 < MAX_MEMORY
