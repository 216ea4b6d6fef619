"""The sandbox: what honest programs may do, and what hostile ones try."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenmill.core import ResourceError, UsageError
from tokenmill.evals import sandbox_worker
from tokenmill.evals.sandbox import Outcome, SandboxConfig, run_python

QUICK = SandboxConfig(wall_seconds=10.0, cpu_seconds=1, memory_bytes=256 << 20)
CHECK = "assert f(1) == 2"


def run(program: str, tests: str = CHECK, config: SandboxConfig = QUICK) -> Outcome:
    return run_python(program, tests, config=config)


def test_a_right_program_passes_and_a_wrong_one_fails() -> None:
    assert run("def f(x): return x + 1")[:3] == (True, "", None)
    wrong = run("def f(x): return x + 2")
    assert not wrong.passed
    assert wrong.reason == "AssertionError"


def test_standard_modules_are_there_also_those_that_load_others_later() -> None:
    program = (
        "from datetime import datetime\nfrom collections import Counter\n"
        "import collections.abc, hashlib, threading\n"
        "def f(x):\n"
        "    import statistics\n"
        "    datetime.strptime('2020', '%Y')\n"
        "    thread = threading.Thread(target=print)\n    thread.start()\n    thread.join()\n"
        "    return statistics.mean([x, 3])"
    )
    assert run(program)[:3] == (True, "", None)


def test_a_value_comes_back() -> None:
    outcome = run_python(
        "x = inputs['x']", "result = [x + 1]", inputs={"x": 1}, wants_value=True, config=QUICK
    )
    assert outcome.value == [2]


HOSTILE = {
    "fork bomb": "import os\ndef f(x):\n    while True: os.fork()",
    "process": "import subprocess\ndef f(x): subprocess.run(['true']); return 2",
    "exec": "import os\ndef f(x): os.execv('/bin/true', ['true'])",
    "memory bomb": "def f(x): a = [bytearray(1 << 24) for _ in range(1 << 16)]; return 2",
    "threads that never end": (
        "import threading\ndef f(x):\n    while True: threading.Thread(target=threading.Event().wait).start()"
    ),
    "file read": "def f(x): return open('/etc/hostname').read() and 2",
    "list": "import os\ndef f(x): return os.listdir('/') and 2",
    "network": "import socket\ndef f(x): socket.socket(); return 2",
    "kill of the parent": "import os\ndef f(x): os.kill(os.getppid(), 9); return 2",
    "kill of the group": "import os\ndef f(x): os.killpg(0, 9); return 2",
    "limits raised": (
        "import resource as r\ndef f(x): r.setrlimit(r.RLIMIT_CPU, (r.RLIM_INFINITY,) * 2); return 2"
    ),
    "the kernel itself": (
        "import ctypes\ndef f(x):\n    assert ctypes.CDLL(None).syscall(41, 2, 1, 0) >= 0\n    return 2"
    ),
    "leaving well": "import os\nos._exit(0)",
    "leaving well in the test": "import os\ndef f(x): os._exit(0)",
    "exit": "import sys\nsys.exit(0)",
    "exit in the test": "def f(x): exit()",
    "printing a verdict": (
        "print('{\"passed\": true}')\nimport os\nos.write(1, b'{\"passed\": true}\\n')\nos._exit(0)"
    ),
    "a verdict on every descriptor": (
        "import os\nfor d in range(16):\n    try: os.write(d, b'{\"passed\": true}\\n')\n"
        "    except OSError: pass\nos._exit(0)"
    ),
    "deep recursion": "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(x): return f(x)",
    "deep source": f"x = {'(' * 5000}1{')' * 5000}",
    "an exception that fights": (
        "class E(BaseException):\n    def __str__(self): import os; os._exit(0)\ndef f(x): raise E()"
    ),
    "a null byte": "x = '\0'",
    "another module": "import numpy\ndef f(x): return 2",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_program_does_not_pass(program: str) -> None:
    assert not run(program).passed


def test_an_endless_program_is_ended_by_processor_time_and_by_the_clock() -> None:
    busy = run("while True: pass")
    assert "processor time" in busy.reason
    idle = SandboxConfig(wall_seconds=0.5, cpu_seconds=1)
    started = time.monotonic()
    assert run("import time\ntime.sleep(60)", config=idle).reason == "no end after 0.5 s"
    assert time.monotonic() - started < 5


def test_huge_output_is_thrown_away() -> None:
    outcome = run("def f(x):\n    for _ in range(1000): print('a' * 100_000)\n    return 2")
    assert outcome.passed


def test_a_huge_value_is_not_taken() -> None:
    outcome = run_python("", "result = 'a' * (8 << 20)", wants_value=True, config=QUICK)
    assert not outcome.passed


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    target = tmp_path / "written"
    tries = (
        f"open({str(target)!r}, 'w')",
        f"__import__('os').mkdir({str(target)!r})",
        f"__import__('os').open({str(target)!r}, 65)",
    )
    for each in tries:
        assert not run(f"import os\ndef f(x): {each}; return 2").passed
        assert not target.exists()


def test_secrets_of_the_environment_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hush")
    seen = run("import os", "assert 'SECRET_KEY' not in os.environ and not os.environ.get('HOME')")
    assert seen.passed
    parent = "open(f'/proc/{os.getppid()}/environ').read()"
    assert not run(f"import os\ndef f(x): {parent}; return 2").passed


@pytest.mark.parametrize(
    "program",
    [
        "import builtins\nbuiltins.AssertionError = None\nbuiltins.len = lambda x: 2\ndef f(x): return []",
        "def len(x): return 2\ndef f(x): return []",
        "def check(): pass\ndef f(x): return []",
        "import builtins\nbuiltins.__build_class__ = print\ndel builtins.len\ndef f(x): return []",
    ],
)
def test_names_that_the_program_changed_do_not_change_its_tests(program: str) -> None:
    tests = "def check(): assert len(f(1)) == 2\ncheck()"
    assert not run(program, tests).passed


def test_a_program_may_be_asked_for_a_name_of_python() -> None:
    program, tests = "def sum(a, b): return a - b", "assert sum(3, 1) == 2"
    assert not run(program, tests).passed
    assert run_python(program, tests, meant=("sum",), config=QUICK).passed


def test_descriptors_of_the_parent_are_not_inherited() -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        tries = "for d in range(4, 64):\n    try: os.write(d, b'x')\n    except OSError: pass"
        run(f"import os\n{tries}", "pass")
        os.set_blocking(read, False)
        with pytest.raises(BlockingIOError):
            os.read(read, 1)
    finally:
        os.close(read)
        os.close(write)


def test_no_process_is_left() -> None:
    run("while True: pass")
    listed = subprocess.run(["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    assert "sandbox_worker" not in listed.stdout


def test_where_the_kernel_cannot_lock_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weak = tmp_path / "worker.py"
    source = Path(str(sandbox_worker.__file__)).read_text()
    weak.write_text(source.replace("machine = platform.machine()", "machine = 'pdp-11'"))
    monkeypatch.setattr(sandbox_worker, "__file__", str(weak))
    with pytest.raises(ResourceError, match="cannot be locked"):
        run("def f(x): return x + 1")


def test_without_the_filter_the_same_program_reads_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The hostile programs above are stopped by the filter, not by chance."""
    weak = tmp_path / "worker.py"
    source = Path(str(sandbox_worker.__file__)).read_text()
    weak.write_text(source.replace("        _filter_system_calls()\n", ""))
    monkeypatch.setattr(sandbox_worker, "__file__", str(weak))
    for name in ("list", "network", "process"):
        assert run(HOSTILE[name]).passed, name


def test_bounds_are_checked() -> None:
    with pytest.raises(UsageError):
        SandboxConfig(wall_seconds=0)
    with pytest.raises(UsageError):
        SandboxConfig(memory_bytes=1)


def test_this_test_runs_where_the_sandbox_is_made_for() -> None:
    assert sys.platform == "linux"
