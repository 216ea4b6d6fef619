"""Kernels give the same bits on arm64 as here: one program, built for both, digests what kernels compute.

arm64 is emulated (qemu), so this says what the kernels compute there, and nothing of how fast.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATORS = "aarch64-linux-gnu-g++", ("qemu-aarch64-static", "qemu-aarch64")
EMULATOR = next((found for name in EMULATORS if (found := shutil.which(name))), None)
ARM64 = (
    *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"),
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
)
NUM_CASES = 19

needs_arm64 = pytest.mark.skipif(
    EMULATOR is None or shutil.which(COMPILER) is None,
    reason="no compiler or emulator of arm64; apt-get install g++-aarch64-linux-gnu qemu-user-static",
)


def build(folder: Path, *settings: str) -> Path:
    """The program of digests, built by our own CMakeLists.txt."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DTOKENMILL_DIGESTS=ON", *settings]
    for command in (configure, [cmake, "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "kernel_digests"


def digests(program: Path, *emulator: str) -> dict[str, dict[str, str]]:
    """What the program prints: digests by instruction set and case."""
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=True)
    found: dict[str, dict[str, str]] = {}
    for line in done.stdout.splitlines():
        isa, case, digest = line.split()
        found.setdefault(isa, {})[case] = digest
    return found


def on_arm64(program: Path, cpu: str) -> dict[str, dict[str, str]]:
    assert EMULATOR is not None
    return digests(program, EMULATOR, "-cpu", cpu)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Digests by instruction set of this machine."""
    return digests(build(tmp_path_factory.mktemp("here")))


@pytest.fixture(scope="module")
def arm64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program for arm64."""
    return build(tmp_path_factory.mktemp("arm64"), *ARM64)


def test_instruction_sets_of_this_machine_agree(here: dict[str, dict[str, str]]) -> None:
    assert len(here["portable"]) == NUM_CASES
    for isa, found in here.items():
        assert found == here["portable"], isa


@needs_arm64
def test_arm64_with_a_dot_product_agrees(here: dict[str, dict[str, str]], arm64: Path) -> None:
    found = on_arm64(arm64, "max")
    assert list(found) == ["neon", "portable"]
    assert found["neon"] == here["portable"]
    assert found["portable"] == here["portable"]


@needs_arm64
def test_arm64_without_a_dot_product_agrees(here: dict[str, dict[str, str]], arm64: Path) -> None:
    assert on_arm64(arm64, "cortex-a57") == {"portable": here["portable"]}


@needs_arm64
def test_arithmetic_that_is_fused_is_noticed(here: dict[str, dict[str, str]], tmp_path: Path) -> None:
    found = on_arm64(build(tmp_path / "fused", *ARM64, "-DTOKENMILL_FP_CONTRACT=fast"), "cortex-a57")
    changed = {case for case, digest in found["portable"].items() if digest != here["portable"][case]}
    # Not everything: sums of exact products stay as they are, and 2^t and grouped weights are fused anyway.
    assert changed >= {
        "norm",
        "gated-i8c",
        "attend-bf16",
        "attend-int8",
        "experts",
    }
