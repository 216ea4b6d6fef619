"""Runners and environments as child processes: what dies, hangs or says nonsense is named, and is gone."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.peers import environments
from benchmarks.peers.child import Child, ChildFault
from benchmarks.peers.environments import Environment, NotPrepared, prepare

ROOT = Path(__file__).parents[2]
Start = Callable[[str], Child]
SYSTEM = """
from benchmarks.peers.runners.serve import Generated, Scored, System, serve
import ctypes, os

class Fake(System):
    version = "fake 1"
    def __init__(self, model, threads, options):
        print("a library talks")
        os.write(1, b"and talks on\\n")
        self.sizes = options
    def generate(self, prompts, output):
        return Generated(prefill_s=1.0, decode_s=2.0, decode_tokens=len(prompts) * (output - 1))
    def score(self, tokens):
        raise MemoryError("no room")

serve(Fake)
"""


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def start(program: str) -> Child:
        command = [sys.executable, "-c", program]
        return Child(command, tmp_path / "logs" / "x.log", cwd=ROOT, env={"PATH": os.environ["PATH"]})

    return start


def state(pid: int) -> str:
    """`T` for a stopped process, empty for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def settled(pid: int, wanted: str) -> bool:
    deadline = time.monotonic() + 10
    while state(pid) != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return state(pid) == wanted


def test_calls_are_answered_whatever_is_printed(start: Start) -> None:
    with start(SYSTEM) as child:
        loaded = child.call("load", patience_s=30, model="m", threads=1, options={})
        assert loaded == {"version": "fake 1", "build": "", "cost": None}
        assert settled(child.pid, "T"), "a child that is not asked anything does not run"
        answer = child.call("generate", patience_s=30, prompts=[[1, 2], [3, 4]], output=5)
        assert answer == {"prefill_s": 1.0, "decode_s": 2.0, "decode_tokens": 8}
        with pytest.raises(ChildFault, match=r"^score: MemoryError: no room$"):
            child.call("score", patience_s=30, tokens=[1, 2])
    assert settled(child.pid, "")


@pytest.mark.parametrize(
    ("program", "patience_s", "reason"),
    [
        ("import sys; input(); sys.exit('no such file')", 30, "load: ended with code 1: no such file"),
        (
            "import os, signal; input(); os.kill(os.getpid(), signal.SIGSEGV)",
            30,
            "load: was ended by SIGSEGV",
        ),
        ("raise SystemExit(3)", 30, "load: ended with code 3"),
        ("input(); print('hello', flush=True); input()", 30, "load: answered nonsense: b'hello"),
        ("input(); print('[1]', flush=True); input()", 30, "load: answered nonsense: b'\\[1\\]"),
        ("input(); print('x' * 200_000, flush=True)", 30, "load: answered nonsense: b'xxx"),
        ("import time; time.sleep(60)", 0.2, "load: no answer in 0 s"),
        ("import time; print('{', end='', flush=True); time.sleep(60)", 0.2, "load: no answer in 0 s"),
    ],
)
def test_a_bad_runner_is_named_and_ended(start: Start, program: str, patience_s: float, reason: str) -> None:
    began = time.monotonic()
    with start(program) as child, pytest.raises(ChildFault, match=f"^{reason}"):
        child.call("load", patience_s=patience_s, model="m")
    assert time.monotonic() - began < 10
    assert settled(child.pid, "")
    with pytest.raises(ChildFault):
        child.call("load", patience_s=1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands are recorded instead of run; the last of them is `fails` if that is asked for."""
    commands: list[list[str]] = []
    run = environments._run

    def record(command: list[str], variables: dict[str, str], *rest: object) -> None:
        commands.append([*command, variables.get("CC", ""), variables.get("CMAKE_ARGS", "")])
        if command[1:3] == ["-m", "venv"]:
            Path(command[3]).mkdir(parents=True)
        elif "broken==1" in command:
            run([sys.executable, "-c", "print('ERROR: no such version'); print('x'); exit(1)"], {}, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(environments, "_run", record)
    return commands


def test_an_environment_is_made_once(tmp_path: Path, quick: list[list[str]]) -> None:
    plain = Environment(name="p", requirements=("thing==1",))
    said: list[str] = []
    assert prepare(plain, tmp_path, said.append) == tmp_path / "p" / "bin" / "python"
    assert len(quick) == 2 and "thing==1" in quick[1] and "p is installed" in said[0]
    prepare(plain, tmp_path, said.append)
    assert len(quick) == 2 and len(said) == 1
    prepare(Environment(name="p", requirements=("thing==2",)), tmp_path, said.append)
    assert len(quick) == 4, "another version is another environment"


def test_an_environment_that_fails_is_made_again(tmp_path: Path, quick: list[list[str]]) -> None:
    broken = Environment(name="b", requirements=("broken==1",))
    for count in (2, 4):
        with pytest.raises(NotPrepared, match="cannot be installed: ERROR: no such version"):
            prepare(broken, tmp_path, lambda _: None)
        assert len(quick) == count


def test_what_is_built_needs_a_new_clang(
    tmp_path: Path, quick: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Environment(name="c", requirements=("thing==1",), cmake=("-DA=ON",))
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    with pytest.raises(NotPrepared, match="needs clang 16 or newer"):
        prepare(built, tmp_path, lambda _: None)
    for name, version in (("clang", 14), ("clang++", 14), ("clang-17", 17), ("clang++-17", 17)):
        (tools / name).write_text(f"#!/bin/sh\necho 'Debian clang version {version}.0'\n", encoding="ascii")
        (tools / name).chmod(0o755)
    prepare(built, tmp_path, lambda _: None)
    assert quick[-1][-2:] == ["clang-17", "-DA=ON"] and "--no-cache-dir" in quick[-1]
    (tools / "clang-17").unlink()
    with pytest.raises(NotPrepared, match="needs clang 16 or newer"):
        prepare(Environment(name="d", requirements=(), cmake=()), tmp_path, lambda _: None)
