"""Virtual environments of the peers, in `build/peers`, with pinned versions.

Each is made once; one that was left half made is made again. llama.cpp is built from its source, with
clang: gcc 12 builds AMX code that faults, and a wheel from elsewhere is built without AMX. What cannot be
made is `NotPrepared` with the reason. The log of each is beside it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["ENVIRONMENTS", "Environment", "NotPrepared", "prepare"]

_STAMP = ".ready"
_PATIENCE_S = 3600.0
_REPORT_S = 30.0
_MIN_CLANG = 16
_MAX_CLANG = 30


class NotPrepared(Exception):
    """Why an environment cannot be made, in one line."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What is installed. With `cmake`, it is built from source, with clang and these settings."""

    name: str
    requirements: tuple[str, ...]
    cmake: tuple[str, ...] | None = None


def _llama_cpp(name: str, *settings: str) -> Environment:
    return Environment(
        name=name,
        requirements=("llama-cpp-python==0.3.36", "numpy==2.4.6"),
        cmake=("-DLLAVA_BUILD=OFF", *settings),
    )


_AVX2 = ("-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=ON" for name in ("AVX", "AVX2", "FMA", "F16C", "BMI2")))
_AVX512 = tuple(f"-DGGML_AVX512{name}=ON" for name in ("", "_VBMI", "_VNNI", "_BF16"))

_ALL = (
    _llama_cpp("llamacpp", "-DGGML_NATIVE=ON"),
    _llama_cpp("llamacpp-avx512", *_AVX2, *_AVX512),
    _llama_cpp("llamacpp-avx2", *_AVX2),
    Environment(name="openvino", requirements=("openvino-genai==2026.4.1.0", "nncf==3.4.0", "numpy==2.4.6")),
    Environment(name="transformers", requirements=("torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6")),
)
ENVIRONMENTS: Mapping[str, Environment] = {environment.name: environment for environment in _ALL}


def prepare(environment: Environment, folder: Path, say: Callable[[str], None]) -> Path:
    """The Python of the environment `folder`/NAME, which is made unless it is there. Raises NotPrepared."""
    home, log = folder / environment.name, folder / f"{environment.name}.log"
    python, stamp = home / "bin" / "python", home / _STAMP
    recipe = json.dumps([asdict(environment), sys.version], sort_keys=True)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == recipe:
        return python
    variables = dict(os.environ)
    variables.pop("PYTHONPATH", None)
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
    if environment.cmake is not None:
        compiler = _clang()
        settings = [*environment.cmake, variables.get("CMAKE_ARGS", "")]
        variables |= {"CC": compiler, "CXX": compiler.replace("clang", "clang++")}
        variables["CMAKE_ARGS"] = " ".join(settings).strip()
        # A cached wheel may have been built with other settings: its name does not tell.
        install += ["--no-cache-dir", "--no-binary", "llama-cpp-python"]
    shutil.rmtree(home, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    how = "built from source, some minutes" if environment.cmake is not None else "installed"
    say(f"{environment.name} is {how}; log: {log}")
    with log.open("wb") as output:
        for command in ([sys.executable, "-m", "venv", str(home)], [*install, *environment.requirements]):
            _run(command, variables, output.fileno(), log, say)
    stamp.write_text(recipe, encoding="utf-8")
    return python


def _run(
    command: Sequence[str],
    variables: Mapping[str, str],
    output: int,
    log: Path,
    say: Callable[[str], None],
) -> None:
    start = time.monotonic()
    process = subprocess.Popen(
        command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
    )
    try:
        while True:
            try:
                code = process.wait(timeout=_REPORT_S)
                break
            except subprocess.TimeoutExpired:
                seconds = time.monotonic() - start
                if seconds > _PATIENCE_S:
                    raise NotPrepared(
                        f"not installed in {_PATIENCE_S / 60:.0f} minutes; log: {log}"
                    ) from None
                say(f"{log.stem}: {seconds / 60:.1f} minutes so far")
    finally:
        process.kill()
        process.wait()
    if code != 0:
        raise NotPrepared(f"cannot be installed: {_last_error(log)}")


def _last_error(log: Path) -> str:
    """The line that names the cause: pip's last line with an error, or the last of all."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = [line.strip() for line in lines if line.strip()]
    errors = [line for line in kept if line.startswith("ERROR:")]
    return (errors or kept or ["no output"])[-1][:200]


def _clang() -> str:
    """The command of a clang that is new enough for AMX."""
    names = [*(f"clang-{version}" for version in range(_MAX_CLANG, _MIN_CLANG - 1, -1)), "clang"]
    for name in names:
        if shutil.which(name) and shutil.which(name.replace("clang", "clang++")):
            text = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout
            found = re.search(r"version (\d+)", text)
            if found and int(found.group(1)) >= _MIN_CLANG:
                return name
    raise NotPrepared(f"needs clang {_MIN_CLANG} or newer to build: apt-get install clang-{_MIN_CLANG}")
