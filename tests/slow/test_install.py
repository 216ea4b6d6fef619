"""Building from source: complete with a compiler, honest without one, loud when compiling fails."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("src", "csrc", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", ".gitignore")


def build_wheel(source: Path, target: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel with the tools that are installed, without fetching any."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    return subprocess.run(
        [*command, "-w", str(target), str(source)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def contents(folder: Path) -> list[str]:
    """Names in the only wheel of a folder."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in BUILT_FROM:
        path = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=ignore)
        else:
            shutil.copy(path, folder / name)
    return folder


def test_a_wheel_has_every_module_and_the_kernels(source: Path, tmp_path: Path) -> None:
    done = build_wheel(source, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    names = contents(tmp_path / "out")
    modules = {path.relative_to(source / "src").as_posix() for path in (source / "src").rglob("*.py")}
    assert modules <= set(names)
    assert any(name.startswith("tokenmill/kernels/_native.") for name in names)
    assert "tokenmill/py.typed" in names


def test_without_a_compiler_the_wheel_is_pure_and_the_build_says_so(source: Path, tmp_path: Path) -> None:
    done = build_wheel(source, tmp_path / "out", CXX="none", CC="none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C++ compiler found" in done.stdout + done.stderr
    assert not any("_native" in name and name.endswith(".so") for name in contents(tmp_path / "out"))


def test_a_broken_compiler_stops_the_build(source: Path, tmp_path: Path) -> None:
    false = shutil.which("false")
    assert false
    assert build_wheel(source, tmp_path / "out", CXX=false, CC=false).returncode != 0


def test_a_compile_error_stops_the_build(source: Path, tmp_path: Path) -> None:
    with (source / "csrc" / "cpu.cpp").open("a", encoding="utf-8") as file:
        file.write("\nint broken( {\n")
    done = build_wheel(source, tmp_path / "out")
    assert done.returncode != 0
    assert "broken" in done.stdout + done.stderr


def test_a_stale_binary_in_the_source_is_not_shipped(source: Path, tmp_path: Path) -> None:
    (source / "src" / "tokenmill" / "kernels" / "_native.stale.so").write_bytes(b"old")
    assert build_wheel(source, tmp_path / "out", CXX="none", CC="none").returncode == 0
    assert not any("stale" in name for name in contents(tmp_path / "out"))
