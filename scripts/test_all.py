"""The long forms of the suite: every instruction set, sanitizers, slow tests; a dated page keeps the result.

Each step is a run of pytest in its own process. A step that this machine cannot do is listed as such, with
the reason: it is never counted as passed. Figures of speed are not made here.
"""

import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenmill.kernels.isa import NUMPY, available_isas

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
ISAS = ("amx", "avx512", "avxvnni", "avx2", "neon", "portable", NUMPY)
ARM64 = "tests/slow/test_arm64.py"
SANITIZERS = {"address,undefined": "libasan.so", "thread": "libtsan.so"}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One run of pytest. `cannot` says why it is left out here, `broken` why it could not be prepared."""

    name: str
    markers: str
    tests: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    cannot: str = ""
    broken: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a step: pytest's closing line, seconds, and whether it passed."""

    step: Step
    passed: bool
    summary: str
    seconds: float


def main() -> int:
    """Run every step, keep the page up to date, return 1 if any step failed."""
    steps = [isa_step(isa) for isa in ISAS]
    steps += [sanitizer_step(kind) for kind in SANITIZERS]
    steps.append(arm64_step())
    steps.append(Step(name="long forms", markers="slow", tests=(f"--ignore={ARM64}",)))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    target = RESULTS / f"test-all-{today}.md"
    RESULTS.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for step in steps:
        outcomes.append(run_step(step))
        target.write_text(page(today, outcomes, len(steps)), encoding="utf-8")
    print(f"written: {target.relative_to(ROOT)}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def isa_step(isa: str) -> Step:
    """What uses the kernels, with one instruction set forced; the twin itself without the whole model."""
    cannot = "" if isa in available_isas() else f"this machine has no {isa}"
    tests = native_tests() if isa == NUMPY else (*native_tests(), "tests/model/test_parity.py")
    env = {"TOKENMILL_ISA": isa}
    return Step(name=f"TOKENMILL_ISA={isa}", markers="fast or model", tests=tests, env=env, cannot=cannot)


def arm64_step() -> Step:
    """The kernels on an emulated arm64, against those of this machine."""
    tools = shutil.which("aarch64-linux-gnu-g++") and any(
        shutil.which(name) for name in ("qemu-aarch64-static", "qemu-aarch64")
    )
    cannot = "" if tools else "needs apt-get install g++-aarch64-linux-gnu qemu-user-static"
    return Step(name="arm64, emulated", markers="slow", tests=(ARM64,), cannot=cannot)


def sanitizer_step(kind: str) -> Step:
    """The fast tests of the native code on a build with a sanitizer, in a folder of its own."""
    name = f"sanitizer {kind}"
    libraries = [library_path(each) for each in (SANITIZERS[kind], "libstdc++.so.6")]
    if not all(libraries):
        return Step(name=name, markers="fast", cannot=f"this compiler has no {SANITIZERS[kind]}")
    folder = ROOT / "build" / f"sanitize-{kind.replace(',', '-')}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "install",
        "--upgrade",
        "--no-deps",
        "--no-build-isolation",
    ]
    command += [
        f"--target={folder / 'site'}",
        f"-Cbuild-dir={folder / 'cmake'}",
        "-Ccmake.build-type=RelWithDebInfo",
    ]
    command += [f"-Ccmake.define.TOKENMILL_SANITIZE={kind}", str(ROOT)]
    built = subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    env = {
        "PYTHONPATH": str(folder / "site"),
        # The C++ library must be there when the sanitizer starts, or it cannot follow exceptions.
        "LD_PRELOAD": " ".join(libraries),
        # Python itself frees little at its end, so leaks of the interpreter would drown ours.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        # Threads of libraries that are built without the sanitizer look like races.
        "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    # The thread sanitizer of older compilers needs memory at fixed places.
    prefix = ("setarch", platform.machine(), "-R") if kind == "thread" else ()
    broken = "" if built else "the build failed"
    return Step(name=name, markers="fast", tests=native_tests(), env=env, prefix=prefix, broken=broken)


def library_path(name: str) -> str:
    """Where the compiler keeps one of its libraries; empty if it has none."""
    compiler = shutil.which("g++")
    if not compiler:
        return ""
    done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip() if Path(done.stdout.strip()).is_absolute() else ""


def native_tests() -> tuple[str, ...]:
    """Fast tests that use the kernels and start no other process, which the sanitizer would not like."""
    texts = {
        path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests/fast").glob("test_*.py"))
    }
    chosen = [
        path for path, text in texts.items() if "tokenmill.kernels" in text and "subprocess" not in text
    ]
    return tuple(path.relative_to(ROOT).as_posix() for path in chosen)


def run_step(step: Step) -> Outcome:
    """Run pytest for a step; its output goes to the terminal as well."""
    if step.cannot or step.broken:
        return Outcome(step=step, passed=not step.broken, summary=step.cannot or step.broken, seconds=0.0)
    print(f"== {step.name}", flush=True)
    begin = time.monotonic()
    # Without capturing, so that the report of a sanitizer is seen.
    command = [*step.prefix, sys.executable, "-m", "pytest", "-q", "-s", "-m", step.markers, *step.tests]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **step.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        sys.stdout.write(line)
        last = line.strip() or last
    code = process.wait()
    summary = re.sub(r"\s+in [\d.]+s.*$", "", last.strip("= "))
    return Outcome(
        step=step,
        passed=code == 0,
        summary=summary if code == 0 else f"exit code {code}: {summary}",
        seconds=time.monotonic() - begin,
    )


def page(today: str, outcomes: list[Outcome], num_steps: int) -> str:
    """The result as a page of the documentation."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    lines = [
        f"# Long forms of the tests, {today}",
        "",
        f"Commit {commit or 'unknown'}; {cpu_field('model name')}, {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}.",
        "",
        f"{len(outcomes)} of {num_steps} steps were run.",
        "",
        "| step | result | seconds | passed |",
        "|---|---|---:|---|",
    ]
    for outcome in outcomes:
        mark = "not here" if outcome.step.cannot else ("yes" if outcome.passed else "**no**")
        lines.append(f"| {outcome.step.name} | {outcome.summary} | {outcome.seconds:.0f} | {mark} |")
    return "\n".join(lines) + "\n"


def cpu_field(name: str) -> str:
    """A line of /proc/cpuinfo, empty where there is none."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    match = re.search(rf"^{name}\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return match[1] if match else ""


if __name__ == "__main__":
    sys.exit(main())
