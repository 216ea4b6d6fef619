"""The comparison with peers: turns, statistics, quality and the table, with runners that are scripted."""

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.__main__ import main
from benchmarks.peers.child import Child, ChildFault
from benchmarks.peers.compare import Measured, Plan, Speed, Stage, compare, num_pieces, ratio, speed
from benchmarks.peers.environments import ENVIRONMENTS, NotPrepared
from benchmarks.peers.quality import Kept, perplexity, read_text, windows
from benchmarks.peers.runners.serve import Steps
from benchmarks.peers.systems import ROWS, SYSTEMS, Row, Run, System, for_isa, runs
from benchmarks.peers.table import BEGIN, END, Report, document, fill, table
from tokenmill.costs import DecoderCost, MachineRates, ReadRate

ROOT = Path(__file__).parents[2]
ROW = Row(key="d", title="decode", run=Run(batch=2, prompt=20, output=4), phase="decode")
OWN = System(
    key="own", environment="", runner="r", weights="w8a8", kv="bf16", source="directory", options={"a": 1}
)
PEER = replace(OWN, key="peer", environment="peer")
MACHINE = {"cpu_model": "A CPU", "num_threads": 2, "isa": "amx"}
RATES = {"int8_tops": 12.24, "bf16_tops": 6.0, "read_gb_s": 31.2}


class Scripted(Child):
    """A runner that answers from a list of speeds, and keeps what it was asked."""

    def __init__(self, system: System, asked: list[tuple[str, str]], seconds: Sequence[float]) -> None:
        self.system, self.asked, self.seconds = system, asked, list(seconds)
        self.prompts: list[Any] = []

    def call(self, name: str, *, patience_s: float, **fields: Any) -> dict[str, Any]:
        assert 0 < patience_s < 1000
        self.asked.append((self.system.key, name))
        if name == "load":
            return {"version": f"{self.system.key} 1.0", "build": "b"}
        if name == "score":
            return {"logprob": -3.0 * math.log(10), "num_tokens": 3}
        self.prompts.append(fields["prompts"])
        if len(fields["prompts"][0]) < 20:
            return {"prefill_s": 9.0, "decode_s": 9.0, "decode_tokens": 2}
        if not self.seconds:
            raise ChildFault("generate: was ended by SIGSEGV")
        return {"prefill_s": 1.0, "decode_s": self.seconds.pop(0), "decode_tokens": 6}

    def close(self) -> None:
        self.asked.append((self.system.key, "close"))


class Harness:
    """A comparison of OWN and PEER whose steps take the given seconds."""

    def __init__(self, folder: Path, seconds: Mapping[str, Sequence[float]], rounds: int = 3) -> None:
        self.asked: list[tuple[str, str]] = []
        self.said: list[str] = []
        self.children: dict[str, Scripted] = {}
        self.seconds = seconds
        self.plan = Plan(
            rows=[ROW], rounds=rounds, threads=2, windows=[[1, 2, 3, 4]], vocabulary=range(10, 1000)
        )
        self.stage = Stage(
            model=lambda system: "m",
            open=self.open,
            kept=Kept(folder / "kept.json"),
            context=("digest",),
            say=self.said.append,
        )

    def open(self, system: System) -> Child:
        if system.key not in self.seconds:
            raise NotPrepared("needs clang")
        self.children[system.key] = Scripted(system, self.asked, self.seconds[system.key])
        return self.children[system.key]

    def run(self) -> list[Measured]:
        return compare([OWN, PEER], self.plan, self.stage)


def report(results: Sequence[Measured], rounds: int = 3) -> Report:
    return Report(
        model="tiny",
        day="2026-01-02",
        machine={**MACHINE, **RATES},
        rates=MachineRates(
            int8_ops_per_s=1e12,
            float_ops_per_s=1e12,
            reads=(ReadRate(working_set=1e6, bytes_per_s=100.0),),
        ),
        rows=[ROW],
        rounds=rounds,
        num_scored=3,
        results=results,
    )


def measured(system: System, values: Sequence[float], quality: float | None) -> Measured:
    return Measured(system=system, version="v 1", perplexity=quality, values={"d": list(values)})


def test_systems_take_turns_after_a_warm_up_that_does_not_count(tmp_path: Path) -> None:
    harness = Harness(tmp_path, {"own": [1, 2, 3], "peer": [6, 6, 6]})
    own, peer = harness.run()
    turns = [key for key, name in harness.asked if name == "generate"]
    assert turns == ["own", "peer"] * 4
    assert own.values == {"d": [6.0, 3.0, 2.0]} and peer.values == {"d": [1.0] * 3}
    assert own.version == "own 1.0" and own.perplexity == pytest.approx(10) and not own.reason
    assert ("own", "close") in harness.asked and ("peer", "close") in harness.asked
    assert len(harness.said) == num_pieces([OWN, PEER], harness.plan)


def test_prompts_are_the_same_for_all_and_never_come_twice(tmp_path: Path) -> None:
    harness = Harness(tmp_path, {"own": [1, 2, 3], "peer": [6, 6, 6]})
    harness.run()
    own, peer = (harness.children[key].prompts for key in ("own", "peer"))
    assert own == peer
    assert len({tuple(prompt) for prompts in own for prompt in prompts}) == 4 * 2


def test_a_peer_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    harness = Harness(tmp_path, {"own": [1, 1, 1], "peer": [6]})
    own, peer = harness.run()
    assert own.values == {"d": [6.0] * 3}
    assert peer.values == {"d": [1.0]} and peer.reason == "generate: was ended by SIGSEGV"
    text = table(report([own, peer]))
    assert "- peer: stopped: generate: was ended by SIGSEGV" in text
    assert "| peer 1.0 | w8a8 | bf16 | 10.00 | – |" in text, "a figure of one round of three is not shown"


def test_a_peer_that_cannot_be_installed_is_a_row(tmp_path: Path) -> None:
    results = Harness(tmp_path, {"own": [1, 1, 1]}).run()
    text = table(report(results))
    assert "| peer | w8a8 | bf16 | – | – |" in text
    assert "- peer: not run: needs clang" in text


@pytest.mark.parametrize(
    "answer",
    [
        {"prefill_s": 1.0, "decode_s": 0.0, "decode_tokens": 6},
        {"prefill_s": 1.0, "decode_s": 1.0, "decode_tokens": 0},
        {"prefill_s": 1.0, "decode_tokens": 6},
        {"decode_s": "fast", "decode_tokens": 6},
    ],
)
def test_figures_that_cannot_be_are_faults(
    tmp_path: Path, answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(tmp_path, {"own": [1, 1, 1]})
    call = Scripted.call

    def say(child: Scripted, name: str, **fields: Any) -> dict[str, Any]:
        return answer if fields.get("output") == 4 else call(child, name, **fields)

    monkeypatch.setattr(Scripted, "call", say)
    own, _ = harness.run()
    assert own.reason and not own.values


@pytest.mark.parametrize("answer", [{}, {"version": "v", "build": 3}, {"build": ""}])
def test_a_runner_that_does_not_say_what_it_is_is_out(
    tmp_path: Path, answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "call", lambda *_, **__: answer)
    own, _ = Harness(tmp_path, {"own": [1, 1, 1]}).run()
    assert own.reason.startswith("the answer has no text") and not own.values


def test_a_perplexity_is_measured_once(tmp_path: Path) -> None:
    seconds = {"own": [1, 1, 1], "peer": [1, 1, 1]}
    for expected in (2, 0):
        harness = Harness(tmp_path, seconds)
        results = harness.run()
        assert [name for _, name in harness.asked].count("score") == expected
        assert [result.perplexity for result in results] == [pytest.approx(10)] * 2
    other = Harness(tmp_path, seconds)
    other.stage = replace(other.stage, context=("another digest",))
    other.run()
    assert [name for _, name in other.asked].count("score") == 2


def test_a_damaged_file_of_perplexities_counts_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    for text in ("{", "[]", '{"a": 1.5}'):
        path.write_text(text, encoding="utf-8")
        assert Kept(path).get("a") is None
    Kept(path).put(2.5, "a")
    assert Kept(path).get("a") == 2.5 and Kept(path).get("b") is None


def test_windows_and_perplexity() -> None:
    assert windows(range(10), 4, 5) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(range(10), 4, 1) == [[0, 1, 2, 3]]
    assert perplexity([(-2 * math.log(4), 2), (-4 * math.log(4), 4)]) == pytest.approx(4)


def test_a_text_is_plain_or_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ä", encoding="utf-8")
    (tmp_path / "a.gz").write_bytes(gzip.compress("ä".encode()))
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.gz") == "ä"


def test_steps_are_split_where_the_last_sequence_has_its_first_token() -> None:
    steps = Steps(4, start=10.0)
    for now, num_sequences in ((11, 1), (13, 4), (14, 4), (16, 4), (17, 2)):
        steps.add(now, num_sequences)
    done = steps.generated()
    assert (done.prefill_s, done.decode_s, done.decode_tokens) == (3.0, 3.0, 8)


def test_the_ratio_is_against_the_fastest_peer_that_is_as_good() -> None:
    own = measured(OWN, [10, 12, 11], 10.0)
    fast_and_bad = measured(PEER, [100] * 3, 10.2)
    as_good = measured(PEER, [5] * 3, 10.09)
    slow = measured(PEER, [2] * 3, 9.0)
    assert ratio(own, [own, fast_and_bad, as_good, slow], "d", 3) == 11 / 5
    assert ratio(own, [own, measured(PEER, [5] * 2, 9.0)], "d", 3) is None, "a round is missing"
    assert ratio(own, [own, measured(PEER, [5.5] * 3, None)], "d", 3) == 2.0
    assert ratio(measured(OWN, [1], 10.0), [as_good], "d", 3) is None
    assert speed([3.0, 1.0, 2.5]) == Speed(2.5, 1.0, 3.0)


def test_the_table_shows_what_was_measured() -> None:
    results = [measured(OWN, [1234.4, 1000, 1500], 10.42), measured(PEER, [400, 411, 420], 10.5)]
    lines = table(report(results)).splitlines()
    assert lines[0].startswith(
        "tiny, 2026-01-02, A CPU, 2 threads, amx: 12.2 TOPS int8, 6.0 TOPS bf16, 31 GB/s"
    )
    assert lines[2] == "| system | weights | KV | perplexity | decode |"
    assert "| v 1 | w8a8 | bf16 | 10.42 | 1,234 (1,000–1,500) **3.0×** |" in lines
    assert "| v 1 | w8a8 | bf16 | 10.50 | 411 (400–420) |" in lines
    assert len({line.count("|") for line in lines[2:6]}) == 1
    figures = document(report(results))["systems"][0]["tokens_per_s"]["d"]
    assert figures["values"] == [1234.4, 1000, 1500] and figures["low"] == 1000 and figures["ratio"] > 3
    json.dumps(document(report(results)))


def test_the_share_of_the_limit_is_that_of_the_row() -> None:
    own = measured(OWN, [20] * 3, None)
    own.cost = DecoderCost(
        block_macs=1, head_macs=1, attention_ops=0, block_bytes=8, head_bytes=2, kv_bytes=0, integer=True
    )
    # A step of two sequences reads 10 bytes at 100 a second: 20 tokens a second are all that can be.
    assert "| 20 (20–20) 100% |" in table(report([own]))
    figures = document(report([own]))["systems"][0]["tokens_per_s"]["d"]
    assert (figures["limit"], figures["limit_tokens_per_s"]) == ("bandwidth", 20.0)
    prompts = replace(report([own]), rows=[replace(ROW, phase="prefill")])
    # 40 rows in one step that reads the weights once: 400 tokens a second.
    assert "| 20 (20–20) 5% |" in table(prompts)


def test_a_reason_cannot_change_the_page() -> None:
    bad = Measured(system=PEER, reason=f"a | b\n{END} <b>")
    text = table(report([bad]))
    assert END not in text and "not run: a / b (!-- bench:end --) (b)" in text


def test_the_table_replaces_only_its_own_block() -> None:
    assert fill(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    with pytest.raises(SystemExit, match="bench:begin"):
        fill("a", "new")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert fill(readme, "new") != readme


def test_every_system_can_be_run() -> None:
    assert len({system.key for system in SYSTEMS}) == len(SYSTEMS)
    for isa in (None, "avx512", "avx2"):
        for system in for_isa(SYSTEMS, isa):
            assert (ROOT / f"benchmarks/peers/runners/{system.runner}.py").is_file()
            assert system.is_own or system.environment in ENVIRONMENTS
    assert for_isa(SYSTEMS, "amx") == SYSTEMS
    held = {system.environment for system in for_isa(SYSTEMS, "avx2")}
    assert held == {"", "llamacpp-avx2"}


def test_rows_share_a_run() -> None:
    assert len(runs(ROWS)) == 4 and len(ROWS) == 5


@pytest.mark.parametrize(
    "flags",
    [
        ["--systems", "vllm"],
        ["--rows", "decode-2"],
        ["--rounds", "0"],
        ["--isa", "mmx"],
        ["--threads", "x"],
        ["--windows", "-1"],
    ],
)
def test_bad_flags_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2 and flags[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_page_without_marks_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a", encoding="utf-8")
    with pytest.raises(SystemExit, match="bench:begin"):
        main(["--page", str(page), "--systems", "openvino-int8"])


def test_peers_that_no_instruction_set_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_ISA", "")  # what the command sets for its children ends with the test
    with pytest.raises(SystemExit, match="avx2"):
        main(["--isa", "avx2", "--systems", "openvino-int8"])
