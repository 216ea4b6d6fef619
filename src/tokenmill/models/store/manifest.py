"""`tokenmill.json`: what is in a model directory, where it came from and what it declares to cost.

The manifest is what makes a directory trustworthy: it holds the SHA-256 of every other file, so a damaged
or exchanged one is found. It is not signed: it proves that the files belong together, not who made them.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tokenmill.core.errors import ModelFormatError
from tokenmill.models.architecture import Architecture
from tokenmill.models.files import atomic_file
from tokenmill.models.hf_config import load_json_object

__all__ = ["FORMAT", "MANIFEST_NAME", "DeclaredCosts", "FileEntry", "Manifest", "is_plain_name"]

FORMAT: Final = 1
MANIFEST_NAME: Final = "tokenmill.json"
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,99}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_RESERVED: Final = frozenset(
    {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(1, 10))}
)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Content of one file: SHA-256 in hex, and its size."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class DeclaredCosts:
    """What a token costs, as the architecture says: multiply-accumulates and bytes."""

    num_params: int
    num_active_params: int
    block_macs_per_token: int
    head_macs_per_token: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, architecture: Architecture) -> "DeclaredCosts":
        """The costs of an architecture, with keys and values in 16 bits."""
        return cls(
            num_params=architecture.num_params,
            num_active_params=architecture.num_active_params,
            block_macs_per_token=architecture.block_macs_per_token,
            head_macs_per_token=architecture.head_macs_per_token,
            kv_bytes_per_token=architecture.kv_bytes_per_token(),
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A model directory's description.

    `parent` is the digest or name of what it was made from, `recipe` how (both empty for an original).
    `grid_file` names the quantised file whose exact grid the weights are a rounding of, if one is kept.
    """

    name: str
    source: str
    licences: tuple[str, ...]
    files: Mapping[str, FileEntry]
    costs: DeclaredCosts
    quantisation: str = ""
    grid_file: str = ""
    parent: str = ""
    recipe: Mapping[str, str] = field(default_factory=dict)
    made_by: str = ""
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """SHA-256 over the names and hashes of all files: the identity of the model."""
        lines = (f"{name} {entry.sha256}\n" for name, entry in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.num_bytes for entry in self.files.values())

    def write(self, folder: Path) -> None:
        """Write `tokenmill.json` into `folder`, atomically. Raises StorageError."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        with atomic_file(folder / MANIFEST_NAME) as file:
            file.write(text.encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check `tokenmill.json`. Raises ModelFormatError naming the field that is wrong."""
        path = folder / MANIFEST_NAME
        data = load_json_object(path)
        if data.get("format") != FORMAT:
            raise ModelFormatError(
                f"{path}: format is {data.get('format')!r}, expected {FORMAT}", hint="update tokenmill"
            )
        files = _files(data, path)
        grid_file = _text(data, "grid_file", path)
        if grid_file and grid_file not in files:
            raise ModelFormatError(f"{path}: grid_file {grid_file[:100]!r} is not among files")
        return cls(
            name=_text(data, "name", path),
            source=_text(data, "source", path),
            quantisation=_text(data, "quantisation", path),
            grid_file=grid_file,
            parent=_text(data, "parent", path),
            made_by=_text(data, "made_by", path),
            licences=tuple(_texts(data, "licences", path)),
            files=files,
            costs=_costs(data, path),
            recipe=_recipe(data, path),
        )


def is_plain_name(name: str) -> bool:
    """True for a name that is safe as a file or folder name everywhere: no separators, no `..`, no device."""
    is_plain = bool(_PLAIN_NAME.fullmatch(name)) and not name.endswith(".")
    return is_plain and name.split(".")[0].lower() not in _RESERVED


def _text(data: Mapping[str, Any], name: str, path: Path) -> str:
    value = data.get(name, "")
    if not isinstance(value, str):
        raise ModelFormatError(f"{path}: {name} is no string")
    return value


def _texts(data: Mapping[str, Any], name: str, path: Path) -> list[str]:
    value = data.get(name, [])
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ModelFormatError(f"{path}: {name} is no list of strings")
    return value


def _recipe(data: Mapping[str, Any], path: Path) -> dict[str, str]:
    value = data.get("recipe", {})
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise ModelFormatError(f"{path}: recipe is no object of strings")
    return value


def _files(data: Mapping[str, Any], path: Path) -> dict[str, FileEntry]:
    value = data.get("files")
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: files is missing or no object")
    files = {}
    for name, entry in value.items():
        sha256 = entry.get("sha256") if isinstance(entry, dict) else None
        num_bytes = entry.get("num_bytes") if isinstance(entry, dict) else None
        is_hash = isinstance(sha256, str) and _SHA256.fullmatch(sha256)
        if not is_plain_name(name) or not is_hash or not _is_size(num_bytes):
            raise ModelFormatError(f"{path}: files: {name[:100]!r} is not a name with SHA-256 and size")
        files[name] = FileEntry(sha256=str(sha256), num_bytes=int(num_bytes or 0))
    return files


def _costs(data: Mapping[str, Any], path: Path) -> DeclaredCosts:
    value = data.get("costs")
    names = tuple(DeclaredCosts.__dataclass_fields__)
    if not isinstance(value, dict) or not all(_is_size(value.get(name)) for name in names):
        raise ModelFormatError(f"{path}: costs is not an object with {', '.join(names)}")
    return DeclaredCosts(**{name: value[name] for name in names})


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60
