"""Two systems side by side, with figures that are known by hand."""

import json
from pathlib import Path

import pytest

from tests.fast.load_fakes import ScriptedTarget, in_virtual_time, requests
from tokenmill.core import ResourceError, StorageError, UsageError
from tokenmill.evals.load import (
    DriveConfig,
    Level,
    LevelResult,
    MachinePrice,
    Side,
    Slo,
    TokenPrice,
    compare_sides,
    run_level,
)
from tokenmill.evals.load.quantiles import grouped_distribution, simple_distribution
from tokenmill.evals.load.results import level_document, make_folder, save
from tokenmill.evals.load.versus import Comparison, Figure


def level(target: ScriptedTarget, num: int = 40, num_warmup: int = 0) -> LevelResult:
    config = DriveConfig(num_warmup=num_warmup)
    one = Level(kind="concurrency", value=1.0)
    return in_virtual_time(run_level(target, requests(num), one, config, slo=Slo(ttft_ms=300)))


def slow(number: int) -> float:
    return 0.2 + 0.001 * number


def fast(number: int) -> float:
    return 0.1 + 0.0005 * number


def figure(table: Comparison, name: str) -> Figure:
    (found,) = [each for each in table.figures if each.name == name]
    return found


def test_the_table_by_hand() -> None:
    a = Side(
        name="slow",
        rounds=[level(ScriptedTarget(ttft_s=slow, itl_s=0.02)) for _ in range(2)],
        price=MachinePrice(usd_per_hour=3.6),
        joules=400.0,
        energy_label="measured",
        context_length=2048,
    )
    b = Side(
        name="fast",
        rounds=[level(ScriptedTarget(ttft_s=fast, itl_s=0.01)) for _ in range(2)],
        price=TokenPrice(usd_per_1m_in=0.5, usd_per_1m_out=2.0),
    )
    table = compare_sides(a, b)
    assert table.num_ok == table.num_requests == (80, 80)
    for name in ("TTFT p50", "TTFT p99", "TPOT p50", "end to end p50"):
        row = figure(table, name)
        assert row.improvement == pytest.approx(0.5, abs=0.05), name
        assert None not in (row.low, row.improvement, row.high)
        assert (row.low or 0) <= (row.improvement or 0) <= (row.high or 0)
    output = figure(table, "output")
    seconds = sum(0.28 + 0.001 * number for number in range(40)) * 2
    assert output.a == pytest.approx(400 / seconds, rel=0.01)
    assert output.improvement == pytest.approx(1.0, abs=0.1)
    joules = figure(table, "J/output token")
    assert joules.a == pytest.approx(1.0) and joules.label_a == "measured"
    assert figure(table, "J/total token").a == pytest.approx(400 / (400 + 560))
    assert joules.b is None and joules.label_b == "not measured" and joules.improvement is None
    usd_in, usd_out = figure(table, "$/1M in"), figure(table, "$/1M out")
    assert usd_in.a and usd_out.a and usd_in.label_a == "estimated" and usd_in.label_b == "given"
    total = usd_in.a * 560 / 1e6 + usd_out.a * 400 / 1e6
    assert total == pytest.approx(3.6 * seconds / 3600, rel=0.01), "the split is an estimate, the sum is not"
    assert (usd_in.b, usd_out.b) == (0.5, 2.0)
    assert (figure(table, "context").a, figure(table, "context").b) == (2048, None)


def test_a_system_against_itself_has_no_clear_improvement() -> None:
    a, b = (Side(name="x", rounds=[level(ScriptedTarget(ttft_s=slow))]) for _ in "ab")
    row = figure(compare_sides(a, b), "TTFT p50")
    assert row.improvement == 0.0 and row.low is not None and row.high is not None and row.low < 0 < row.high


def test_failures_do_not_make_a_system_fast() -> None:
    target = ScriptedTarget(ttft_s=slow, fails=lambda n: ResourceError("no") if n % 2 else None)
    table = compare_sides(
        Side(name="a", rounds=[level(ScriptedTarget(ttft_s=slow))]), Side(name="b", rounds=[level(target)])
    )
    assert table.num_ok == (40, 20) and table.num_requests == (40, 40)
    assert figure(table, "TTFT p50").b == pytest.approx(219, abs=2)


def test_a_time_that_the_clock_does_not_resolve_is_no_divisor() -> None:
    a = Side(name="a", rounds=[level(ScriptedTarget(ttft_s=lambda number: 0.1 * (number % 2), itl_s=0.0))])
    assert compare_sides(a, a).figures


def test_prices_have_bounds() -> None:
    for usd in (-1.0, 1e9, float("nan")):
        with pytest.raises(UsageError):
            MachinePrice(usd_per_hour=usd)
        with pytest.raises(UsageError):
            TokenPrice(usd_per_1m_in=usd, usd_per_1m_out=1.0)


def test_intervals_are_order_statistics_and_open_where_samples_are_few() -> None:
    found = simple_distribution([float(value) for value in range(1, 101)])
    assert found is not None and (found.p50.low, found.p50.high) == (40.0, 61.0)
    assert found.p99.low is not None and found.p99.high is None, "368 are needed"
    enough = simple_distribution([float(value) for value in range(400)])
    assert enough is not None and enough.p99.high is not None
    assert simple_distribution([]) is None and grouped_distribution([]) is None


def test_gaps_of_one_answer_count_as_one_witness() -> None:
    """Half the answers have gaps of 1, half of 2: 10,000 gaps say no more of the median than 20 answers
    do.
    """
    groups = [[1.0 + place % 2] * 500 for place in range(20)]
    found = grouped_distribution(groups)
    assert found is not None and found.n == 10000
    assert (found.p50.low, found.p50.high) == (1.0, 2.0)


def test_the_interval_of_few_samples_holds_the_interpolated_value() -> None:
    found = simple_distribution([1.0, 2.0])
    assert found is not None and found.p99.low is not None and found.p99.low <= found.p99.value


def test_a_folder_is_checked_before_the_run(tmp_path: Path) -> None:
    make_folder(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file: cannot be written"):
        make_folder(tmp_path / "file")
    (tmp_path / "out/load.json").write_text("{}")
    with pytest.raises(UsageError, match="holds another run"):
        make_folder(tmp_path / "out")


def test_a_full_disk_leaves_no_half_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tokenmill.evals.load.results._write_lines", full)
    with pytest.raises(StorageError, match="No space left"):
        save(tmp_path, {}, [])
    assert list(tmp_path.iterdir()) == []


def test_saved_files_hold_every_sample(tmp_path: Path) -> None:
    target = ScriptedTarget(fails=lambda n: ResourceError("busy") if n == 3 else None)
    result = level(target, 10, num_warmup=2)
    save(tmp_path / "out", {"levels": [level_document(result)]}, [result])
    document = json.loads((tmp_path / "out/load.json").read_text())
    assert document["levels"][0]["errors"] == {"busy": 1}
    rows = [json.loads(line) for line in (tmp_path / "out/requests.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and len(rows[0]["piece_times_s"]) == 5 and rows[0]["is_warmup"]
    assert rows[3]["status"] == "error" and rows[3]["ttft_s"] is None
    exported = [json.loads(line) for line in (tmp_path / "out/profile_export.jsonl").read_text().splitlines()]
    assert exported[0]["metadata"]["benchmark_phase"] == "warmup"
    assert exported[4]["metrics"]["time_to_first_token"] == {
        "value": pytest.approx(100, abs=2),
        "unit": "ms",
    }
    assert exported[3]["error"] == {"message": "busy"} and exported[3]["metrics"] == {}
