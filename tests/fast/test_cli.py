"""The promises of the command line that hold for every command: streams, errors, exit codes, speed."""

import argparse
import os
import resource
import signal
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fast.cli_tools import Runner, make_runner
from tokenmill import __version__
from tokenmill.cli import main as cli
from tokenmill.cli.arguments import (
    KV_DTYPES,
    SPECULATIONS,
    WEIGHTS,
    Subparsers,
    adapter_name,
    add_command,
    llm_config,
)
from tokenmill.cli.embed import POOLINGS
from tokenmill.cli.output import Output
from tokenmill.cli.sampling import grammar, sampling_params
from tokenmill.core import Grammar, SamplingParams, TokenmillError, errors
from tokenmill.engine import LLMConfig, embedding
from tokenmill.engine.config import SPECULATIONS as ENGINE_SPECULATIONS
from tokenmill.kernels import KV_DTYPES as ENGINE_KV_DTYPES
from tokenmill.models.packing.pack import WEIGHT_FORMATS

HEAVY = ("numpy", "tokenizers", "jinja2", "tqdm", "shtab", "tokenmill.models", "tokenmill.engine")
ERRORS = [getattr(errors, name) for name in errors.__all__]
Body = Callable[[argparse.Namespace, Output], int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    return make_runner(monkeypatch, capsys, tmp_path)


def add_fake(monkeypatch: pytest.MonkeyPatch, body: Body) -> None:
    """A command `fake` with this body, and no other."""

    def add_parser(subparsers: Subparsers) -> None:
        add_command(subparsers, "fake", body, summary="a test")

    module = types.ModuleType("tokenmill.cli.fake")
    vars(module)["add_parser"] = add_parser
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cli, "COMMANDS", ("fake",))


def raiser(error: BaseException) -> Body:
    def body(_: argparse.Namespace, __: Output) -> int:
        raise error

    return body


def python(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_help_imports_nothing_heavy() -> None:
    program = f"""
import sys
from tokenmill.cli.main import main
assert main(["run", "--help"]) == 0
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    assert python("-c", program).stderr == "[]\n"


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python("-m", "tokenmill", "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3


def test_module_and_version() -> None:
    done = python("-m", "tokenmill", "--version")
    assert (done.returncode, done.stdout) == (0, f"tokenmill {__version__}\n")


def test_flags_have_the_defaults_of_what_they_configure() -> None:
    for words in (["run", "m", "p"], ["chat", "m"]):
        args = cli.build_parser().parse_args(words)
        assert sampling_params(args) == SamplingParams()
        assert llm_config(args) == LLMConfig() and args.draft is None and adapter_name(args) == ""
    for words in (["score", "m"], ["embed", "m"]):
        assert llm_config(cli.build_parser().parse_args(words)) == LLMConfig()
    assert set(WEIGHTS) == set(WEIGHT_FORMATS) and WEIGHTS[0] == LLMConfig().weights
    assert set(KV_DTYPES) == set(ENGINE_KV_DTYPES) and KV_DTYPES[0] == LLMConfig().kv_dtype
    assert set(SPECULATIONS) == set(ENGINE_SPECULATIONS) and SPECULATIONS[0] == LLMConfig().speculation
    assert POOLINGS == embedding.POOLINGS


def test_flags_reach_what_they_configure() -> None:
    words = "run m p --max-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4 --seed 5 --stop a --stop b"
    words += " --min-tokens 2 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2 --n 2 --logprobs 3"
    words += (
        " --frequency-penalty 0.3 --weights bf16 --threads 1 --kv int8 --speculation lookup --adapter a/b"
    )
    args = cli.build_parser().parse_args(words.split())
    assert sampling_params(args) == SamplingParams(
        max_tokens=3,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        seed=5,
        n=2,
        stop=("a", "b"),
        logprobs=3,
    )
    assert adapter_name(args) == "b"
    assert llm_config(args) == LLMConfig(
        weights="bf16", num_threads=1, kv_dtype="int8", speculation="lookup", max_adapters=1
    )


def test_grammars_come_from_flags_and_files(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    (tmp_path / "a.lark").write_text('start: "a"')
    for flag, given, kind, source in (
        ("--regex", "a+", "regex", "a+"),
        ("--json-schema", str(tmp_path / "schema.json"), "json_schema", '{"type": "integer"}'),
        ("--grammar", str(tmp_path / "a.lark"), "lark", 'start: "a"'),
    ):
        args = cli.build_parser().parse_args(["run", "m", "p", flag, given])
        expected = Grammar(kind=kind, source=source)  # type: ignore[arg-type]
        assert grammar(args) == expected
        assert sampling_params(args, grammar=expected).grammar == expected


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_is_one_line_one_document_and_its_code(
    run: Runner, monkeypatch: pytest.MonkeyPatch, kind: type[TokenmillError]
) -> None:
    add_fake(monkeypatch, raiser(kind("it broke", hint="mend it")))
    plain, as_json = run("fake"), run("fake", "--json")
    assert plain.code == as_json.code == kind.exit_code
    assert plain.error_line == as_json.error_line == "error: it broke; mend it"
    assert plain.out == ""
    fields = {"type": kind.__name__, "message": "it broke", "hint": "mend it", "exit_code": kind.exit_code}
    assert as_json.document == {"error": fields}


def test_only_debug_shows_a_traceback(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    add_fake(monkeypatch, raiser(errors.UsageError("it broke")))
    assert "Traceback" not in run("fake").err
    result = run("fake", "--debug", "--json")
    assert "Traceback" in result.err and result.err.endswith("error: it broke\n")
    assert result.document["error"]["type"] == "UsageError"


def test_an_unexpected_exception_asks_for_debug(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    add_fake(monkeypatch, raiser(ZeroDivisionError("oh\nno")))
    plain = run("fake")
    assert plain.code == cli.UNEXPECTED
    assert plain.error_line.startswith("error: ZeroDivisionError: oh no; ") and "--debug" in plain.error_line
    assert "Traceback" in run("fake", "--debug").err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141)])
def test_interrupt_and_broken_pipe(
    run: Runner, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    monkeypatch.setattr(cli, "_discard_output", lambda: None)
    add_fake(monkeypatch, raiser(error))
    result = run("fake")
    assert result.code == code
    assert result.err == ("error: interrupted\n" if code == 130 else "")


def test_sigterm_ends_as_an_interrupt_does(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned_up = []

    def body(_: argparse.Namespace, __: Output) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            return 0
        finally:
            cleaned_up.append(True)

    add_fake(monkeypatch, body)
    previous = signal.getsignal(signal.SIGTERM)
    assert run("fake").code == cli.TERMINATED and cleaned_up
    assert signal.getsignal(signal.SIGTERM) == previous


@pytest.mark.filterwarnings("always")
def test_a_warning_is_one_line_and_comes_once(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(_: argparse.Namespace, out: Output) -> int:
        for stacklevel in (1, 2):
            warnings.warn("slow kernels", RuntimeWarning, stacklevel=stacklevel)
        out.document({"a": 1})
        return 0

    add_fake(monkeypatch, body)
    result = run("fake", "--json")
    assert result.err == "warning: slow kernels\n" and result.document == {"a": 1}


def test_an_error_after_the_document_adds_no_second_one(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(_: argparse.Namespace, out: Output) -> int:
        out.document({"a": 1})
        raise errors.StorageError("late")

    add_fake(monkeypatch, body)
    result = run("fake", "--json")
    assert result.document == {"a": 1} and result.code == 5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "no command; see `tokenmill --help`"),
        (("nonsense",), "invalid choice: 'nonsense'"),
        (("run",), "required: MODEL"),
        (("run", "m", "p", "--temp", "1"), "unrecognized arguments: --temp 1; see `tokenmill run --help`"),
        (("run", "m", "p", "--max-tokens", "many"), "--max-tokens: invalid int value: 'many'"),
        (("run", "m", "p", "--top-p", "2"), "top_p is 2.0"),
        (("run", "m", "p", "--temperature", "nan"), "temperature is nan"),
        (("run", "m", "p", "--weights", "w1"), "--weights: invalid choice: 'w1'"),
        (("run", "m", "p", "--threads", "0"), "--threads: '0' is no whole number of at least 1"),
        (("run", "m", "caf\udce9"), "PROMPT: the text is not UTF-8"),
        (("score", "m", "--text", "a", "--file", "b"), "--file: not allowed with argument --text"),
        (("score", "m", "--text", "a", "--context", "b", "--window", "4"), "--context goes with no windows"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run: Runner, words: tuple[str, ...], says: str) -> None:
    plain, as_json = run(*words), run(*words, "--json")
    assert says in plain.error_line.replace("--text: not allowed with argument --file", says)
    assert plain.code == as_json.code == 2
    assert as_json.document["error"]["type"] == "UsageError"


def test_json_after_the_end_of_flags_is_no_flag(run: Runner) -> None:
    assert run("run", "no-such-model", "--", "--json").out == ""


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tokenmill", "completion", "bash"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (cli.BROKEN_PIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_one_line() -> None:
    command = [sys.executable, "-m", "tokenmill", "completion", "bash"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    [line] = done.stderr.splitlines()
    assert done.returncode == 5 and line.startswith("error: the output cannot be written (No space left")
