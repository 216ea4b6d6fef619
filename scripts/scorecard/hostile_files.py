"""What a hostile model file is, how it comes onto the disk, and how an import of it has to end."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

__all__ = ["CANARY", "Content", "Expected", "Fifo", "Hole", "HostileCase", "Link", "write_case"]

CANARY = "canary"
"""The file that every payload tries to create, in the folder of its case, which is the working folder."""

Expected: TypeAlias = Literal["refused", "loads", "either"]


class Link(NamedTuple):
    """A symbolic link to this path, which need not exist."""

    target: str


class Hole(NamedTuple):
    """A sparse file: so many bytes, all zero, that take no place on the disk."""

    num_bytes: int


class Fifo(NamedTuple):
    """A named pipe without a writer: opening it for reading never returns."""


Content: TypeAlias = bytes | Link | Hole | Fifo


@dataclass(frozen=True, kw_only=True)
class HostileCase:
    """Files, which of them is imported, and how that must end.

    Paths of `files` and `target` are relative to the case's own folder; what may be read lies under `in/`.
    `field` is a regular expression that the error must match besides the name of the file; `exit_code` is
    that of the error's class.
    """

    family: str
    name: str
    files: Mapping[str, Content]
    target: str
    expected: Expected = "refused"
    field: str = ""
    exit_code: int = 4

    @property
    def title(self) -> str:
        """Family and name, as reports call it."""
        return f"{self.family}: {self.name}"


def write_case(case: HostileCase, folder: Path) -> Path:
    """Put a case's files below a folder of its own; returns the path to import."""
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Link):
            path.symlink_to(content.target)
        elif isinstance(content, Fifo):
            os.mkfifo(path)
        elif isinstance(content, Hole):
            path.touch()
            os.truncate(path, content.num_bytes)
        else:
            path.write_bytes(content)
    return folder / case.target
