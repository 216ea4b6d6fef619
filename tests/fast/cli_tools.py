"""Running the command line in this process, with a store that holds a tiny model."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fast.model_files import tiny_gguf
from tokenmill.cli.main import main
from tokenmill.models.store.library import Library
from tokenmill.models.store.pull import import_model


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output, which must be exactly one JSON document."""
        return json.loads(self.out)

    @property
    def error_line(self) -> str:
        """Standard error, which must be exactly one error line."""
        [line] = self.err.splitlines()
        assert line.startswith("error: "), line
        return line


Runner = Callable[..., Result]


def make_home(folder: Path, name: str = "tiny", **metadata: Any) -> Path:
    """A store with one tiny model, imported from a GGUF file."""
    source = folder / f"{name}.gguf"
    source.write_bytes(tiny_gguf(**metadata))
    import_model(source, Library(folder / "home"), name)
    return folder / "home"


def make_runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> Runner:
    """Runs `main` with a home and with bytes as standard input, as a pipe is."""
    monkeypatch.setenv("TOKENMILL_HOME", str(home))

    def run(*words: str, stdin: bytes = b"") -> Result:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
            code = main(words)
        captured = capsys.readouterr()
        return Result(code=code, out=captured.out, err=captured.err)

    return run


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True
