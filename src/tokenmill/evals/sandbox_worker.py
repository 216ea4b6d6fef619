"""The process in which code from a model runs: it reads a program, locks itself in, runs it, says how it
went.

As a script this file is that process; it imports nothing of tokenmill. Before any of the program runs, the
process gives up, for good, everything that a computation does not need: the kernel refuses every system call
that is not in `_ALLOWED`, so there is no way to open a file, a socket or a process, to send a signal, or to
raise a limit again. Standard modules that the program imports are therefore loaded before that.

The verdict goes to a pipe together with a secret of this run, so that printing or exiting is no pass. The
program still shares this interpreter with its tests; docs/tasks.md says what follows from that.
"""

import ast
import builtins
import ctypes
import importlib
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["serve"]

# Modules that act when they are imported, or whose parts do.
_NOT_LOADED: Final = {"__main__", "antigravity", "idlelib", "lib2to3", "test", "this", "turtledemo"}
# What standard modules import only when they are used, and encodings, which are modules too.
_WITH: Final = {"datetime": "_strptime", "time": "_strptime", "typing": "collections.abc"}
_ALWAYS_LOADED: Final = (
    "heapq",
    "encodings.ascii",
    "encodings.latin_1",
    "encodings.unicode_escape",
    "unicodedata",
)
_MAX_MESSAGE_CHARS: Final = 500

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2
_KILL_PROCESS: Final = 0x80000000
_ERRNO: Final = 0x00050000
_ALLOW: Final = 0x7FFF0000
_EPERM: Final = 1
_ENOSYS: Final = 38
_CLONE_THREAD: Final = 0x00010000
_CLONE3: Final = 435  # its flags lie in memory, which a filter cannot read; the C library falls back to clone

_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE: Final = {"x86_64": 56, "aarch64": 220}
# System calls that a computation needs: memory, threads of its own, time, its own identity, open descriptors.
_ALLOWED: Final = {
    # read write close fstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn
    # readv writev select sched_yield mremap madvise nanosleep getpid exit uname gettimeofday getrusage
    # sysinfo times getuid getgid geteuid getegid getppid sigaltstack gettid futex time sched_getaffinity
    # restart_syscall clock_gettime clock_getres clock_nanosleep exit_group pselect6 ppoll set_robust_list
    # getrandom rseq
    "x86_64": (
        *(0, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 19, 20, 23, 24, 25, 28, 35, 39, 60, 63, 96, 98, 99),
        *(100, 102, 104, 107, 108, 110, 131, 186, 202, 201, 204, 219, 228, 229, 230, 231, 270, 271, 273, 318),
        334,
    ),
    "aarch64": (
        *(63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 65, 66, 124, 216, 233, 101, 172, 93, 160),
        *(169, 165, 179, 153, 174, 176, 175, 177, 173, 132, 178, 98, 123, 128, 113, 114, 115, 94, 72, 73),
        *(99, 278, 293),
    ),
}


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog: how many instructions, and where they are."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def serve() -> None:
    """Read one request from standard input, run it, and answer on what was standard output."""
    request = json.loads(sys.stdin.buffer.readline())
    answers = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.closerange(answers + 1, 1 << 12)
    write, leave, secret = os.write, os._exit, request.pop("secret")

    def answer(**fields: Any) -> None:
        write(answers, json.dumps({"secret": secret, **fields}).encode() + b"\n")
        leave(0)

    problem = _lock(request)
    if problem:
        answer(problem=problem)
    try:
        answer(passed=True, value=_run(request))
    except BaseException as error:
        answer(passed=False, error=_describe(error))


def _lock(request: Mapping[str, Any]) -> str:
    """Load what may be imported, set the limits, and close the door. Why it cannot be closed, or nothing."""
    for name in (*_ALWAYS_LOADED, *_imported(request["program"]), *_imported(request["tests"])):
        try:
            importlib.import_module(name)
        except BaseException:  # the program meets the same error, where it can be judged
            continue
    try:
        _limit(request["limits"])
        _filter_system_calls()
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _imported(source: str) -> Iterator[str]:
    """Standard modules that a program names in its imports."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = (
                [node.module or "", *(f"{node.module}.{name}" for name in names)] if not node.level else []
            )
        for name in names:
            parts = name.split(".")
            if parts[0] in sys.stdlib_module_names and not _NOT_LOADED.intersection(parts):
                yield name
                yield _WITH.get(name, name)


def _limit(limits: Mapping[str, int]) -> None:
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))


def _filter_system_calls() -> None:
    """Let the kernel refuse what is not in `_ALLOWED`. It stays so for this process, whoever owns it."""
    machine = platform.machine()
    program = b"".join(_filter(machine))
    library = ctypes.CDLL(None, use_errno=True)
    filter_program = _FilterProgram(len(program) // 8, program)
    prctl = library.prctl
    prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
    steps = (
        (_PR_SET_PDEATHSIG, signal.SIGKILL, 0),
        (_PR_SET_NO_NEW_PRIVS, 1, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(filter_program)),
    )
    for option, first, second in steps:
        if prctl(option, first, second, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _filter(machine: str) -> Iterator[bytes]:
    """Instructions of a BPF program over struct seccomp_data: number at 0, architecture at 4, arguments at
    16.
    """
    load, equal, bits, give = 0x20, 0x15, 0x45, 0x06
    yield _instruction(load, 4)
    yield _instruction(equal, _ARCHITECTURES[machine], 1, 0)
    yield _instruction(give, _KILL_PROCESS)
    yield _instruction(load, 0)
    for number in _ALLOWED[machine]:
        yield _instruction(equal, number, 0, 1)
        yield _instruction(give, _ALLOW)
    yield _instruction(equal, _CLONE3, 0, 1)
    yield _instruction(give, _ERRNO | _ENOSYS)
    yield _instruction(equal, _CLONE[machine], 0, 3)
    yield _instruction(load, 16)
    yield _instruction(bits, _CLONE_THREAD, 0, 1)
    yield _instruction(give, _ALLOW)
    yield _instruction(give, _ERRNO | _EPERM)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _run(request: Mapping[str, Any]) -> Any:
    """Run program and tests. What the program did to built-in names is undone before the tests see them,

    but for those in `meant`, which are what is tested.
    """
    table = vars(builtins)
    originals = dict(table)
    names: dict[str, Any] = {"__name__": "candidate", "inputs": request["inputs"]}
    exec(compile(request["program"], "<program>", "exec"), names)
    table.clear()
    table.update(originals)
    hidden = originals.keys() - set(request["meant"])
    seen = {name: value for name, value in names.items() if name not in hidden}
    seen["__builtins__"] = builtins
    exec(compile(request["tests"], "<tests>", "exec"), seen)
    return seen.get("result") if request["wants_value"] else None


def _describe(error: BaseException) -> str:
    """One line of what was raised; the exception may be of a class that fights back."""
    name = type.__getattribute__(type(error), "__name__")
    try:
        text = str(error) if isinstance(error, Exception) else ""
    except BaseException:
        text = ""
    return f"{name}: {text}"[:_MAX_MESSAGE_CHARS] if text else str(name)[:_MAX_MESSAGE_CHARS]


if __name__ == "__main__":
    serve()
