"""The GGUF writer: what it writes, the reference package reads, and nothing half-written stays."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gguf as reference
import numpy as np
import numpy.typing as npt
import pytest

from tokenmill.core import StorageError
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.formats.gguf_quants import STORED_TYPES
from tokenmill.models.formats.gguf_writer import MetadataItem, TensorSpec, write_gguf

SPECS = [
    TensorSpec(name="experts", dtype="Q8_0", shape=(3, 5, 64)),
    TensorSpec(name="vector", dtype="F32", shape=(7,)),
    TensorSpec(name="half", dtype="F16", shape=(3, 5)),
    TensorSpec(name="four", dtype="Q4_0", shape=(2, 32)),
]
METADATA: dict[str, MetadataItem] = {
    "general.architecture": "llama",
    "flag": True,
    "number": 4_000_000_000,
    "fraction": 1e-5,
    "empty": "",
    "texts": ["", "é", "a b"],
    "types": np.array([1, -2, 3], np.int64),
    "scores": np.array([-0.5, 1e9], np.float64),
    "flags": np.array([True, False]),
}


def data_of(spec: TensorSpec) -> npt.NDArray[np.uint8]:
    width = STORED_TYPES[spec.dtype].num_bytes(spec.shape[-1])
    return np.random.default_rng(len(spec.name)).integers(
        0, 128, (spec.num_bytes // width, width), dtype=np.uint8
    )


def rows(spec: TensorSpec) -> Iterator[npt.NDArray[np.uint8]]:
    yield from data_of(spec)[:, None]


def test_the_reference_package_reads_what_is_written(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = tmp_path / "x.gguf"
    size = write_gguf(path, METADATA, SPECS, rows, lambda done, total: seen.append((done, total)))
    assert size == path.stat().st_size and seen[-1][0] <= seen[-1][1] == size
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    found = reference.GGUFReader(path)
    for tensor, spec in zip(found.tensors, SPECS, strict=True):
        assert (tensor.name, tensor.tensor_type.name) == (spec.name, spec.dtype)
        assert tuple(tensor.shape)[::-1] == spec.shape
        assert tensor.data.tobytes() == data_of(spec).tobytes()
        assert tensor.data_offset % 32 == 0
    fields = {name: found.get_field(name) for name in METADATA}
    assert all(field is not None for field in fields.values())
    for name, expected in METADATA.items():
        field = fields[name]
        assert field is not None
        value = field.contents()
        if isinstance(expected, float | np.ndarray):
            np.testing.assert_array_equal(np.asarray(value, np.float32), np.asarray(expected, np.float32))
        else:
            assert value == expected and type(value) is type(expected)


def test_our_reader_reads_it_too(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", METADATA, SPECS, rows)
    with GgufFile.open(tmp_path / "x.gguf") as file:
        assert list(file.tensors) == [spec.name for spec in SPECS]
        assert file.metadata["texts"] == METADATA["texts"] and file.metadata["flags"] == [True, False]
        for spec in SPECS:
            assert (file.tensor(spec.name).shape, file.tensor(spec.name).dtype) == (spec.shape, spec.dtype)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_nothing_half_written_stays(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"before")

    def load(spec: TensorSpec) -> Iterator[npt.NDArray[np.uint8]]:
        yield data_of(spec)[:1]
        raise error

    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
        write_gguf(path, METADATA, SPECS, load)
    assert [each.name for each in tmp_path.iterdir()] == ["x.gguf"] and path.read_bytes() == b"before"


def test_a_full_disk_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))

    def load(spec: TensorSpec) -> Iterator[npt.NDArray[np.uint8]]:
        raise AssertionError("nothing is read for a file that cannot be written")

    with pytest.raises(StorageError, match="are free"):
        write_gguf(tmp_path / "x.gguf", METADATA, SPECS, load)
    assert not list(tmp_path.iterdir())
