"""Streams, tables and bars of the command line."""

import io

import pytest

from tests.fast.cli_tools import Terminal
from tokenmill.cli.output import Output, format_bytes, format_count, format_table
from tokenmill.core import StorageError


def test_people_and_programs_have_their_own_streams() -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    plain = Output(stdout=stdout, stderr=stderr)
    plain.text("result")
    plain.document({"a": 1})
    assert (stdout.getvalue(), stderr.getvalue()) == ("result\n", "")
    stdout, stderr = io.StringIO(), io.StringIO()
    as_json = Output(as_json=True, stdout=stdout, stderr=stderr)
    as_json.text("result")
    as_json.document({"a": "é"})
    assert (stdout.getvalue(), stderr.getvalue()) == ('{\n  "a": "é"\n}\n', "result\n")
    with pytest.raises(AssertionError, match="one document"):
        as_json.document({})


def test_a_terminal_gets_no_control_characters_and_a_file_gets_all() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        Output(stdout=stream).text("a\x1b]0;b\x07\tc\x9b\r\nd", end="")
    assert terminal.getvalue() == "a\\x1b]0;b\\x07\tc\\x9b\\x0d\nd"
    assert file.getvalue() == "a\x1b]0;b\x07\tc\x9b\r\nd"


def test_an_error_stays_on_one_line() -> None:
    stderr = io.StringIO()
    Output(stdout=io.StringIO(), stderr=stderr).failure("Kind", "two\nlines\x1b[2J", "go on", 1)
    assert stderr.getvalue() == "error: two lines\\x1b[2J; go on\n"


def test_no_number_that_json_has_not() -> None:
    with pytest.raises(ValueError):
        Output(as_json=True, stdout=io.StringIO()).document({"a": float("nan")})


def test_a_stream_that_takes_nothing() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with pytest.raises(StorageError, match="No space left"):
        Output(stdout=Full()).text("a")
    with pytest.raises(BrokenPipeError):
        Output(stdout=Gone()).text("a")


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_bars_and_busy_lines_are_for_terminals(stream: io.StringIO) -> None:
    out = Output(stdout=io.StringIO(), stderr=stream)
    with out.progress() as bar:
        bar("waiting", 0, 0)
        bar("copy", 1, 10)
        bar("copy", 10, 10)
        bar("convert", 1, 2)
    with out.busy("loading"):
        pass
    shown = stream.getvalue()
    if stream.isatty():
        assert all(word in shown for word in ("copy", "convert", "loading")) and "waiting" not in shown
        assert shown.endswith("\r\x1b[K")
    else:
        assert shown == ""


def test_tables() -> None:
    table = format_table(["name", "size"], [["a", "5 MB"], ["long", "-"]])
    assert table == "name  size\na     5 MB\nlong     -"
    assert format_table([], [["a", "b"]]) == "a  b"
    assert format_table(["a"], []) == "a"
    assert format_table([], []) == ""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_600, "1.00 MB"),
        (98_362_432, "98.4 MB"),
        (5e15, "5000 TB"),
    ],
)
def test_bytes(value: float, shown: str) -> None:
    assert format_bytes(value) == shown


def test_counts() -> None:
    assert [format_count(value) for value in (12, 134_515_008)] == ["12", "135 M"]
