"""No way for foreign code: the audit of the sources, and payloads that must stay where they are."""

from pathlib import Path

import pytest

from scripts.scorecard import s21
from scripts.scorecard.frame_fuzz import naive_decode
from scripts.scorecard.hostile_payloads import hostile_payloads
from scripts.scorecard.import_probe import ImportProbe
from scripts.scorecard.s18 import sample

SOURCES = sorted((Path(__file__).parents[2] / "src").rglob("*.py"))


def test_no_source_runs_data_as_code() -> None:
    assert len(SOURCES) > 50
    for path in SOURCES:
        uses = {use.partition(": ")[2] for use in s21.unsafe_uses(path.read_text(encoding="utf-8"))}
        assert uses == ({"exec()", "compile()"} if path.name == s21.SANDBOX_WORKER else set()), path


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal as m",
        "from shelve import open",
        "from torch import load",
        "from os import system",
        "def f():\n    import dill",
        "eval('1')",
        "exec(data)",
        "torch.load(path)",
        "os.system('x')",
        "np.load(path, allow_pickle=True)",
        "f(trust_remote_code=flag)",
        "subprocess.run(x, shell=True)",
        "__import__(name)",
    ],
)
def test_the_audit_sees(source: str) -> None:
    assert list(s21.unsafe_uses(source))


def test_the_audit_lets_pass_what_is_safe() -> None:
    assert not list(s21.unsafe_uses("import json, re\nre.compile('x')\nnp.load(p, allow_pickle=False)\n"))


def test_payloads_do_not_run() -> None:
    payloads = hostile_payloads()
    assert len(payloads) >= 50
    with ImportProbe() as probe:
        for case, _, faults in probe.run(sample(payloads, 6)):
            assert not faults, case.title


def test_payloads_bite_where_they_are_loaded() -> None:
    titles = [case.title for case in hostile_payloads()]
    (chosen,) = [title for title in titles if "protocol 4 as config.json" in title]
    assert s21.runs_naively(chosen)


def test_a_listening_socket_is_seen() -> None:
    assert s21.ports_of_a_server()


def test_a_reader_that_believes_its_frames_is_noticed() -> None:
    wrong, _ = s21.fuzz_frames(50, 1, 0, naive_decode)
    assert wrong
