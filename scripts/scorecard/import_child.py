"""The child in which hostile files are imported, one after the other; started by `import_probe.py`.

It reads jobs from standard input and answers each with one line of JSON: how the import ended, the time and
memory it took, what it did that an import must not do (from Python's audit hook), and what it left behind.
Memory is the kernel's peak of the process, so that what libraries allocate counts too. Address space and the
size of files are limited, because a reader that fails its case must not take the machine with it.

    python -m scripts.scorecard.import_child CONTROL        empty, or the name of the guard to leave out
"""

import contextlib
import gc
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from scripts.scorecard.vocabularies import unknown_id
from tokenmill.core.errors import TokenmillError
from tokenmill.models import hf_config
from tokenmill.models.chat import worker as template_worker
from tokenmill.models.formats import gguf, safetensors
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.library import Library
from tokenmill.models.store.pull import import_model
from tokenmill.models.text import pipeline as tokenizer_pipeline

__all__ = ["CONTROLS", "Answer", "main"]

_SPARE_BYTES = 1 << 30
_FILE_BYTES = 256 << 20
_TEXTS = ("Hello, world 123", "  two  spaces\n\ttabs ", "h\u00e9llo \u4e16\u754c \U0001f600", "<|im_end|>")
_PACKAGES = frozenset({"tokenmill", "scripts", "numpy", "tokenizers", "msgspec", "llguidance"})
_FORBIDDEN = frozenset(
    {
        *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn"),
        *("pickle.find_class", "ctypes.dlopen", "code.__new__", "builtins.input", "webbrowser.open"),
        *("socket.__new__", "socket.connect", "socket.bind", "sys.addaudithook", "cpython.run_command"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How one import ended. `outcome` is `loads`, `refused` (an error of ours) or `broke` (any other)."""

    outcome: str
    error: str = ""
    message: str = ""
    hint: str = ""
    exit_code: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    grew_bytes: int = 0
    events: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class _Watch:
    """An audit hook that notes what an import has no business doing; it may write to its own store only."""

    def __init__(self) -> None:
        roots = {sys.prefix, sys.base_prefix, str(Path(gguf.__file__).parents[2]), "/proc", "/sys/devices"}
        self._code_roots = tuple(os.path.realpath(root) for root in roots)
        self._case = ""
        self.events: list[str] = []

    def begin(self, case: str) -> None:
        self._case, self.events = os.path.realpath(case), []

    def end(self) -> list[str]:
        self._case = ""
        return self.events

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._case:
            return
        fault = ""
        if event in _FORBIDDEN:
            fault = str(args)
        elif event == "subprocess.Popen":
            command = list(args[1])
            is_own = command[0] == sys.executable and template_worker.__file__ in command[1:3]
            fault = "" if is_own else str(command)
        elif event == "import":
            top = str(args[0]).partition(".")[0]
            fault = "" if top in sys.stdlib_module_names or top in _PACKAGES else str(args[0])
        elif event == "exec":
            fault = self._foreign_code(getattr(args[0], "co_filename", "?"))
        elif event == "compile":
            fault = self._foreign_code(os.fsdecode(args[1]) if args[1] is not None else "?")
        elif event == "open" and isinstance(args[0], str | bytes):
            fault = self._foreign_file(os.path.realpath(os.fsdecode(args[0])), args[1], args[2])
        if fault:
            self.events.append(f"{event} {fault}"[:300])

    def _foreign_code(self, name: str) -> str:
        is_own = name.startswith("<frozen ") or os.path.realpath(name).startswith(self._code_roots)
        return "" if is_own else name

    def _foreign_file(self, path: str, mode: object, flags: int) -> str:
        writes = flags & (os.O_WRONLY | os.O_RDWR) or any(each in str(mode or "") for each in "wax+")
        stores = (f"{self._case}/home", f"{self._case}/tmp", "/dev/null")
        own = (*stores,) if writes else (*stores, f"{self._case}/in", *self._code_roots)
        return "" if path.startswith(own) else path


def _run(job: dict[str, str], watch: _Watch) -> Answer:
    case, target = Path(job["case"]), Path(job["target"])
    (case / "tmp").mkdir()
    tempfile.tempdir = str(case / "tmp")
    os.chdir(case)
    gc.collect()
    open_before, modules_before = _open_things(), set(sys.modules)
    rss_before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
    cpu, wall = _cpu_s(), time.monotonic()
    watch.begin(str(case))
    library = Library(case / "home")
    found: dict[str, Any] = _import(target, library)
    events = watch.end()
    wall_s = time.monotonic() - wall
    gc.collect()
    cpu_s = _cpu_s() - cpu
    grew = _memory("VmHWM") - rss_before
    foreign = [name for name in set(sys.modules) - modules_before if _lies_in(sys.modules[name], case)]
    left = sorted({*_left_files(case, found["outcome"] != "refused"), *(_open_things() - open_before)})
    os.chdir("/")
    return Answer(**found, cpu_s=cpu_s, wall_s=wall_s, grew_bytes=grew, events=[*events, *foreign], left=left)


def _import(target: Path, library: Library) -> dict[str, Any]:
    try:
        problem = _unsound(import_model(target, library))
    except TokenmillError as error:
        return {
            "outcome": "refused",
            "error": type(error).__name__,
            "message": error.message,
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
    except BaseException as error:  # a panic of a library is no Exception
        return {"outcome": "broke", "error": type(error).__name__, "message": str(error)[:500]}
    return {"outcome": "broke" if problem else "loads", "message": problem}


def _unsound(model: ModelDirectory) -> str:
    """What is wrong with a model that was taken; empty if it can be run."""
    model.verify()
    tokens, weights = model.tokenizer(), model.weights()
    unknown = unknown_id(tokens.to_json())
    for text in _TEXTS:
        ids = tokens.encode(text)
        tokens.decode(ids)
        if any(
            each >= model.architecture.vocab_size or (tokens.is_special(each) and each != unknown)
            for each in ids
        ):
            return f"the tokenizer makes {ids[:9]} of {text!r}"
    for name in weights.names():
        if weights.shape(name) != model.architecture.tensor_shapes()[name]:
            return f"tensor {name} has another shape"
        if not np.isfinite(weights.float32(name)).all():
            return f"tensor {name} is not finite"
    return ""


def _left_files(case: Path, is_loaded: bool) -> set[str]:
    """Files that an import leaves beside the model it makes. Lock files stay on purpose."""
    kept = [case / "home" / "locks", case / "home" / "models"] if is_loaded else [case / "home" / "locks"]
    found = {path for folder in ("home", "tmp") for path in (case / folder).rglob("*")}
    plain = {case / "home" / name for name in ("locks", "models", "staging")}
    return {
        f"left {path.relative_to(case)}"
        for path in found - plain
        if not any(path.is_relative_to(folder) for folder in kept)
    }


def _open_things() -> set[str]:
    """Descriptors, children and threads of this process."""
    found = {f"thread {each.name}" for each in threading.enumerate()}
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the listing itself
            found.add(f"descriptor {handle} {os.readlink(f'/proc/self/fd/{handle}')}")
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            children = Path(f"/proc/self/task/{task}/children").read_text().split()
            found |= {f"child {each}" for each in children}
    return found


def _lies_in(module: object, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(file).is_relative_to(folder)


def _memory(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _cpu_s() -> float:
    """Seconds of processor of this process and of children that were waited for."""
    return sum(os.times()[:4])


def _no_fail(*_: object, **__: object) -> None:
    pass


def _without_bounds() -> None:
    endless = dict.fromkeys(hf_config._BOUNDS, (float("-inf"), float("inf")))
    hf_config._BOUNDS = endless  # type: ignore[misc]


def _replace(owner: object, name: str, value: object) -> Callable[[], None]:
    def apply() -> None:
        assert hasattr(owner, name)
        setattr(owner, name, value)

    return apply


CONTROLS: Final[dict[str, Callable[[], None]]] = {
    "gguf checks": _replace(gguf._Parser, "fail", _no_fail),
    "safetensors checks": _replace(safetensors, "_fail", _no_fail),
    "config bounds": _without_bounds,
    "config features": _replace(hf_config, "_refuse_unsupported", _no_fail),
    "tokenizer pipeline": _replace(tokenizer_pipeline, "_check_model", _no_fail),
}
"""The guards that the control leaves out, one at a time."""


def main(control: str) -> None:
    """Answer jobs until standard input closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers goes to the parent
    if control:
        CONTROLS[control]()
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _SPARE_BYTES
    for kind, limit in ((resource.RLIMIT_AS, space), (resource.RLIMIT_FSIZE, _FILE_BYTES)):
        resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))  # a child may set its own
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.collect()
    gc.freeze()  # the modules are not looked through again in every case
    watch = _Watch()
    sys.addaudithook(watch)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(asdict(_run(job, watch))), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
