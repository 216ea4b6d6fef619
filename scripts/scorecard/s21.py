"""Line S21: the surface by which foreign code could run. Four things, each with its control:

- source: no module of tokenmill imports or calls what runs data as code (an audit of the syntax trees);
- payloads: models that carry code (`hostile_payloads.py`) are imported, and nothing of them runs;
- ports: an engine and an import open no listening socket;
- frames: nonsense on the engine's socket is refused, survived, or ends the process as intended.

The controls: a module that does all of it; a loader that loads pickles and modules as others do; a process
that does listen; a reader that believes its frames.
"""

import ast
import asyncio
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from scripts.scorecard import Line
from scripts.scorecard.frame_fuzz import fuzz_frames, naive_decode
from scripts.scorecard.hostile_files import CANARY, write_case
from scripts.scorecard.hostile_payloads import hostile_payloads
from scripts.scorecard.import_probe import ImportProbe
from scripts.scorecard.s18 import sample
from tokenmill.core import Request
from tokenmill.engine import LLMConfig
from tokenmill.engine.mock import MockScript
from tokenmill.engine.serving.async_engine import AsyncEngine
from tokenmill.engine.serving.messages import EngineSpec, decode_to_engine

__all__ = [
    "SANDBOX_WORKER",
    "fuzz_frames",
    "listening",
    "ports_of_a_server",
    "run",
    "runs_naively",
    "unsafe_uses",
]

SANDBOX_WORKER = "sandbox_worker.py"
"""The one process that exists to run a program that a model wrote, after it has locked itself in."""

_WHAT = "code in models: unsafe imports, payloads that ran, open ports, frames that broke the engine"
_ROOT = Path(__file__).parents[2]
_SHORT_FORM = 10_000
_MODULES = frozenset(
    {
        *(
            "pickle",
            "cPickle",
            "_pickle",
            "marshal",
            "shelve",
            "dill",
            "joblib",
            "cloudpickle",
            "imp",
            "runpy",
        ),
        *("code", "codeop", "ctypes.util", "xmlrpc", "telnetlib", "pty"),
    }
)
_CALLS = frozenset(
    {"eval", "exec", "compile", "__import__", "torch.load", "torch.hub.load", "torch.jit.load"}
)
_CALLS_OF_OS = frozenset({"os.system", "os.popen", "os.startfile"})
_YAML = ("yaml.safe_load", "yaml.safe_dump", "yaml.compose")
"""The one way to read YAML that makes no objects."""
_FLAGS = frozenset({"allow_pickle", "trust_remote_code", "shell"})
_BAD_MODULE = (
    "import pickle\nfrom yaml import load\nx = eval('1')\ntorch.load(f)\nnp.load(f, allow_pickle=True)\n"
)


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """`cases` frames; with fewer than 10,000 it is a short form with a part of the payloads."""
    started = time.monotonic()
    is_short = cases < _SHORT_FORM
    payloads = sample(hostile_payloads(), 20 if is_short else 1000)
    files = [path for path in sorted((_ROOT / "src").rglob("*.py")) if path.name != SANDBOX_WORKER]
    sources = [path.read_text() for path in files] if guard else [_BAD_MODULE]
    unsafe = [use for source in sources for use in unsafe_uses(source)]
    if guard:
        with ImportProbe() as probe:
            ran = [f"{case.title}: {faults[0]}" for case, _, faults in probe.run(payloads) if faults]
    else:
        ran = [case.title for case in payloads if runs_naively(case.title)]
    open_ports = asyncio.run(_ports()) if guard else ports_of_a_server()
    decode = decode_to_engine if guard else naive_decode
    wrong, counts = fuzz_frames(cases if guard else 200, seed, 2 if is_short else 40, decode)
    parts = {"unsafe imports": unsafe, "payloads": ran, "ports": open_ports, "frames": wrong}
    if not guard and not all(parts.values()):
        parts = {name: [] for name in parts}  # a control that was not noticed: the line fails
    figures: dict[str, float | int | str] = {f"violations, {name}": len(each) for name, each in parts.items()}
    figures |= {"modules": len(sources), "payloads": len(payloads), **counts}
    figures["first_violation"] = next((each[0] for each in parts.values() if each), "none")[:300]
    return Line(
        name="S21",
        what=_WHAT,
        cases=len(sources) + len(payloads) + 1 + cases,
        violations=sum(map(len, parts.values())),
        seconds=time.monotonic() - started,
        figures=figures,
    )


def unsafe_uses(source: str) -> Iterator[str]:
    """Imports and calls in a module that run data as code, or that can."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in _CALLS | _CALLS_OF_OS or _is_bad_yaml(called):
                yield f"line {node.lineno}: {called}()"
            for keyword in node.keywords:
                is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in _FLAGS and not is_off:
                    yield f"line {node.lineno}: {keyword.arg}"
        for name in names:
            is_bad = name in _MODULES or name.partition(".")[0] in _MODULES or name in _CALLS | _CALLS_OF_OS
            if is_bad or _is_bad_yaml(name):
                yield f"import {name}"


def _is_bad_yaml(name: str) -> bool:
    """Whether this is of the YAML library, and may make more of a text than plain values or nodes."""
    return name.startswith("yaml.") and name not in _YAML


def listening(pids: set[int]) -> list[str]:
    """The sockets on which these processes listen, as the kernel lists them."""
    owned = set()
    for pid in pids:
        for handle in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                owned.add(os.readlink(f"/proc/{pid}/fd/{handle}"))
    found = []
    for kind, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and f"socket:[{fields[9]}]" in owned:
                found.append(f"{kind} {fields[1]}")
    return found


async def _ports() -> list[str]:
    """Listening sockets of this process and its children while an engine serves and a model is imported."""
    spec = EngineSpec(mock=MockScript(), config=LLMConfig(kv_tokens=4096))
    async with await AsyncEngine.start(spec) as engine:
        handle = engine.submit(Request(request_id="a", prompt=(1, 2, 3)))
        with ImportProbe() as probe:
            await asyncio.to_thread(probe.try_case, hostile_payloads()[-1])
            found = listening(_family(os.getpid()))
        await handle.result()
    return found


def _family(pid: int) -> set[int]:
    """A process and everything it has started."""
    found = {pid}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found |= _family(int(child))
    return found


def ports_of_a_server() -> list[str]:
    """The control: what is found while this process listens."""
    with socket.create_server(("127.0.0.1", 0)):
        return listening({os.getpid()})


def runs_naively(title: str) -> bool:
    """Whether a payload runs where pickles and modules are loaded as others load them, in a child."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "scripts.scorecard.s21", title, folder]
        subprocess.run(command, cwd=_ROOT, capture_output=True, timeout=60, check=False)
        return any(CANARY in path.name for path in Path(folder).rglob("*"))


def _load_naively(title: str, folder: Path) -> None:
    case = next(case for case in hostile_payloads() if case.title == title)
    write_case(case, folder)
    os.chdir(folder)
    for path in sorted(folder.rglob("*")):
        with suppress(Exception):
            if path.suffix == ".py":
                runpy.run_path(str(path))
            elif zipfile.is_zipfile(path):
                pickle.loads(zipfile.ZipFile(path).read("archive/data.pkl"))
            else:
                data = path.read_bytes()
                pickle.loads(data[data.find(b"cos\n") if data.startswith(b"\x93NUMPY") else 0 :])


if __name__ == "__main__":
    _load_naively(sys.argv[1], Path(sys.argv[2]))
