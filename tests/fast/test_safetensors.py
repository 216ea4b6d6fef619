"""The safetensors reader and writer: equal to the reference package, strict where that one is not."""

import errno
import json
import os
import re
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tokenmill.core import ModelFormatError, StorageError
from tokenmill.models.formats.bfloat16 import round_to_bf16, widen_bf16
from tokenmill.models.formats.safetensors import SafetensorsFile, write_safetensors

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def packed(header: dict[str, Any], data: bytes = bytes(8)) -> bytes:
    return raw(json.dumps(header).encode(), data)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    return path


def test_reads_what_the_reference_package_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, npt.NDArray[Any]] = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b.weight": rng.normal(size=(5,)).astype(np.float16),
        "empty": np.empty((0, 4), np.float32),
        "ids": np.arange(4),
    }
    path = tmp_path / "model.safetensors"
    save_file(arrays, path)
    with SafetensorsFile.open(path) as file:
        assert set(file.names()) == set(arrays)
        for name in ("a", "b.weight", "empty"):
            assert file.shape(name) == arrays[name].shape
            np.testing.assert_array_equal(file.float32(name), arrays[name].astype(np.float32))
            np.testing.assert_array_equal(file.bf16(name), round_to_bf16(arrays[name].astype(np.float32)))
        assert file.dtype("ids") == "I64"
        with pytest.raises(ModelFormatError, match="tensor ids has the type I64"):
            file.float32("ids")
        with pytest.raises(ModelFormatError, match="tensor c is missing"):
            file.shape("c")


def test_the_reference_package_reads_what_we_wrote(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    path = tmp_path / "f32.safetensors"
    write_safetensors(
        path, {"a": (3, 4), "b": (4,)}, "F32", lambda name: values if name == "a" else values[0]
    )
    loaded = load_file(path)
    np.testing.assert_array_equal(loaded["a"], values)
    np.testing.assert_array_equal(loaded["b"], values[0])


def test_bf16_round_trip(tmp_path: Path) -> None:
    bits = round_to_bf16(np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32))
    path = tmp_path / "bf16.safetensors"
    write_safetensors(path, {"a": (3, 4)}, "BF16", lambda _: bits)
    with SafetensorsFile.open(path) as file:
        np.testing.assert_array_equal(file.bf16("a"), bits)
        np.testing.assert_array_equal(file.float32("a"), widen_bf16(bits))


def test_rounding_is_to_nearest_even_and_keeps_nan() -> None:
    one = 0x3F80
    halves = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0xFFFFFFFF], np.uint32)
    expected = [one, one + 2, one + 1, one, 0x7F80, 0x7FC0]
    assert round_to_bf16(halves.view(np.float32)).tolist() == expected


def test_writer_leaves_nothing_behind_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        write_safetensors(path, {"a": (2,)}, "F32", lambda _: np.zeros(2, np.float32))
    assert "free some space" in caught.value.hint
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


BAD = {
    "empty": b"",
    "shorter than its length": b"\x01\x00",
    "header beyond the file": raw(b"{}", b"", 2**63),
    "header over the limit": raw(b" " * 100, b"", 200 << 20),
    "not JSON": raw(b"{a}", b""),
    "not an object": raw(b"[]", b""),
    "not UTF-8": raw(b'{"\xff": 1}', b""),
    "nested too deep": raw(b"[" * 100_000, b""),
    "a number of 10,000 digits": raw(b'{"a": ' + b"9" * 10_000 + b"}", b""),
    "a key twice": raw(b'{"a":%b,"a":%b}' % ((json.dumps(ENTRY).encode(),) * 2), bytes(8)),
    "a key twice inside": raw(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "entry no object": packed({"a": 1}),
    "entry with more": packed({"a": {**ENTRY, "x": 1}}),
    "unknown dtype": packed({"a": {**ENTRY, "dtype": "F31"}}),
    "dtype no text": packed({"a": {**ENTRY, "dtype": ["F32"]}}),
    "shape no list": packed({"a": {**ENTRY, "shape": 2}}),
    "negative size": packed({"a": {**ENTRY, "shape": [-2]}}),
    "boolean size": packed({"a": {**ENTRY, "shape": [True, 2]}}),
    "fractional size": packed({"a": {**ENTRY, "shape": [2.0]}}),
    "overflowing shape": packed({"a": {**ENTRY, "shape": [2**32, 2**32, 2]}}),
    "shape beyond its bytes": packed({"a": {**ENTRY, "shape": [3]}}),
    "many dimensions": packed({"a": {**ENTRY, "shape": [1] * 100 + [2]}}),
    "offsets backwards": packed({"a": {**ENTRY, "data_offsets": [8, 0]}}),
    "one offset": packed({"a": {**ENTRY, "data_offsets": [8]}}),
    "beyond the end": packed({"a": {**ENTRY, "data_offsets": [4, 12]}}),
    "overlap": packed({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
    "gap": packed({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, bytes(20)),
    "trailing bytes": packed({"a": ENTRY}, bytes(9)),
    "path as a name": packed({"../../etc/x": ENTRY}),
    "dots in a name": packed({"a..b": ENTRY}),
    "empty name": packed({"": ENTRY}),
    "long name": packed({"a" * 300: ENTRY}),
    "control characters": packed({"a\n": ENTRY}),
    "metadata no object": packed({"__metadata__": [], "a": ENTRY}),
    "metadata no text": packed({"__metadata__": {"a": 1}, "a": ENTRY}),
    "a ZIP archive": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_bad_files_are_refused(tmp_path: Path, data: bytes) -> None:
    SafetensorsFile.open(write(tmp_path, packed({"a": ENTRY}))).float32("a")
    started = time.monotonic()
    with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
        SafetensorsFile.open(write(tmp_path, data))
    assert time.monotonic() - started < 1.0


@settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    mutated = bytearray(packed({"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16)))
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 17))] = data.draw(st.integers(0, 255))
    try:
        with SafetensorsFile.open(write(tmp_path, bytes(mutated))) as file:
            for name in file.names():
                file.shape(name)
    except ModelFormatError as error:
        assert "model.safetensors" in error.message


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"^RssFile:\s+(\d+) kB", status, flags=re.MULTILINE)[0])


def test_a_file_that_was_read_is_not_resident(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    names = [f"t{number}" for number in range(8)]
    values = np.zeros((1024, 1024), np.float32)
    write_safetensors(path, dict.fromkeys(names, values.shape), "F32", lambda _: values)
    with SafetensorsFile.open(path) as file:
        before = resident_file_bytes()
        for name in names:
            file.float32(name)
            file.bf16(name, slice(32, 64))
        assert resident_file_bytes() - before < 8 << 20, "of 32 MiB"
