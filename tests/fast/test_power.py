"""Energy counters on a made-up system, and the meter that shares a step out."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.costs.metering import (
    Charge,
    RowShare,
    StepPrices,
    StepUse,
    add_charges,
    meter_step,
    split,
)
from tokenmill.costs.power import (
    EnergyMeter,
    NvmlCounters,
    RaplCounters,
    Unmeasured,
    find_counters,
    open_nvml,
)

RANGE = 262_143_328_850


def domain(folder: Path, name: str, value: int, limit: int = RANGE) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{value}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder / "energy_uj"


@pytest.fixture
def system(tmp_path: Path) -> dict[str, Path]:
    """Two packages with DRAM, parts of a package, the whole platform, and a copy over MMIO."""
    return {
        "p0": domain(tmp_path / "intel-rapl:0", "package-0", 1000),
        "core": domain(tmp_path / "intel-rapl:0/intel-rapl:0:0", "core", 500),
        "d0": domain(tmp_path / "intel-rapl:0/intel-rapl:0:1", "dram", 100),
        "p1": domain(tmp_path / "intel-rapl:1", "package-1", RANGE - 10),
        "psys": domain(tmp_path / "intel-rapl:2", "psys", 9000),
        "mmio": domain(tmp_path / "intel-rapl-mmio:0", "package-0", 1000),
    }


def test_packages_and_memory_are_summed_and_nothing_twice(system: dict[str, Path], tmp_path: Path) -> None:
    counters = find_counters(tmp_path)
    assert isinstance(counters, RaplCounters)
    assert set(counters.read()) == {"package-0", "package-0/dram", "package-1"}
    meter = EnergyMeter(counters)
    for name in ("p0", "core", "d0", "psys", "mmio"):
        system[name].write_text("2000000")
    # The second package wraps: 10 to its end, the step to 0, and 5 more.
    system["p1"].write_text("5")
    found = meter.by_domain()
    assert found["package-1"] == pytest.approx(16e-6)
    assert meter.poll() == pytest.approx((2e6 - 1000 + 2e6 - 100 + 16) / 1e6)


def test_polls_add_up(system: dict[str, Path], tmp_path: Path) -> None:
    counters = find_counters(tmp_path)
    assert isinstance(counters, RaplCounters)
    meter = EnergyMeter(counters)
    for value in (RANGE - 1, 1000, 4000):
        system["p0"].write_text(str(value))
        meter.poll()
    assert meter.by_domain()["package-0"] == pytest.approx((RANGE + 1 + 3000) / 1e6)


def test_what_only_root_may_read_is_said(
    system: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text

    def denied(path: Path, *args: str, **settings: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **settings)

    monkeypatch.setattr(Path, "read_text", denied)
    found = find_counters(tmp_path)
    assert isinstance(found, Unmeasured) and "root" in found.why and "chmod" in found.why


def test_a_system_without_counters_is_unmeasured(tmp_path: Path) -> None:
    found = find_counters(tmp_path / "nothing")
    assert isinstance(found, Unmeasured) and "virtual" in found.why


class _BoardError(Exception):
    """What the library raises."""


def boards(**changed: object) -> SimpleNamespace:
    """A library with two boards that have used 5 and 7 joules."""
    functions = {
        "NVMLError": _BoardError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda at: at,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 5000 + 2000 * handle,
    }
    return SimpleNamespace(**(functions | changed))


def test_boards_are_read_in_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    library = boards()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    counters = open_nvml()
    assert isinstance(counters, NvmlCounters)
    assert counters.read() == {"gpu-0": 5_000_000, "gpu-1": 7_000_000}
    meter = EnergyMeter(counters)
    library.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 6500 + 2000 * handle
    assert meter.poll() == pytest.approx(3.0)


def test_boards_that_cannot_be_read_are_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise _BoardError("Not Supported")

    monkeypatch.setitem(sys.modules, "pynvml", boards(nvmlDeviceGetTotalEnergyConsumption=fail))
    assert "Not Supported" in getattr(open_nvml(), "why", "")
    monkeypatch.setitem(sys.modules, "pynvml", boards(nvmlDeviceGetCount=lambda: 0))
    assert "no NVIDIA boards" in getattr(open_nvml(), "why", "")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in getattr(open_nvml(), "why", "")


COUNTS = st.integers(0, 5000)
AMOUNTS = st.integers(0, 10**18)


@given(AMOUNTS, st.lists(st.floats(0, 1e9, allow_subnormal=False), min_size=1, max_size=40))
def test_parts_are_whole_and_sum_to_the_amount(amount: int, weights: list[float]) -> None:
    parts = split(amount, weights)
    assert sum(parts) == amount and min(parts) >= 0
    if any(weights):
        assert not any(part for part, weight in zip(parts, weights, strict=True) if weight == 0)


@given(
    st.lists(st.tuples(COUNTS, st.integers(0, 1), COUNTS, COUNTS, st.booleans()), min_size=1, max_size=20),
    AMOUNTS,
    AMOUNTS,
    AMOUNTS,
    st.tuples(*[st.floats(0, 1)] * 4),
)
def test_charges_sum_exactly_to_the_step(
    counts: list[tuple[int, int, int, int, bool]],
    ns: int,
    nj: int,
    nd: int,
    parts: tuple[float, float, float, float],
) -> None:
    shares = [
        RowShare(str(at), prefill_rows=p, decode_rows=d, fresh_kv_tokens=f, cached_kv_tokens=c, fills=fills)
        for at, (p, d, f, c, fills) in enumerate(counts)
    ]
    base, row, out_row, kv_token = parts
    prices = StepPrices(base=base, row=row, out_row=out_row, kv_token=kv_token)
    use = StepUse(nanoseconds=ns, nanojoules=nj, nanodollars=nd)
    totals = [charge.total() for charge in meter_step(use, prices, shares).values()]
    assert tuple(map(sum, zip(*totals, strict=True))) == (ns, nj, nd)


def test_prefill_is_input_decode_output_and_cached_input_only_its_reads() -> None:
    shares = [
        RowShare("new", prefill_rows=30, fresh_kv_tokens=30),
        RowShare("old", decode_rows=10, fresh_kv_tokens=10, cached_kv_tokens=60),
    ]
    prices = StepPrices(row=15, kv_token=4)
    found = meter_step(StepUse(nanoseconds=1000), prices, shares)
    assert found["new"] == Charge(input=(570, 0, 0))
    assert found["old"] == Charge(cached=(240, 0, 0), output=(190, 0, 0))
    twice = add_charges(add_charges({}, found), found)
    assert twice["old"].total() == (860, 0, 0)


def test_a_step_that_reads_nothing_is_shared_by_rows() -> None:
    found = meter_step(
        StepUse(nanoseconds=90),
        StepPrices(base=1, kv_token=9),
        [RowShare("a", prefill_rows=2), RowShare("b", decode_rows=1)],
    )
    assert (found["a"].input[0], found["b"].output[0]) == (60, 30)


def test_who_only_fills_what_is_idle_is_charged_what_it_adds() -> None:
    prices = StepPrices(base=60, row=5, out_row=5)
    urgent, filler = RowShare("a", decode_rows=1, out_rows=1), RowShare("b", decode_rows=2, out_rows=2)
    found = meter_step(StepUse(nanoseconds=90), prices, [urgent, filler._replace(fills=True)])
    assert (found["a"].output[0], found["b"].output[0]) == (70, 20)
    alone = meter_step(StepUse(nanoseconds=90), prices, [filler._replace(fills=True)])
    assert alone["b"].output[0] == 90
    equal = meter_step(StepUse(nanoseconds=90), prices, [urgent, filler])
    assert (equal["a"].output[0], equal["b"].output[0]) == (30, 60)


def test_logits_are_paid_by_the_rows_that_want_them_and_guessing_by_who_guesses() -> None:
    shares = [
        RowShare("prompt", prefill_rows=10, out_rows=1),
        RowShare("guesses", decode_rows=3, out_rows=3, own=6),
    ]
    found = meter_step(StepUse(nanoseconds=31), StepPrices(row=1, out_row=3), shares)
    assert (found["prompt"].input[0], found["guesses"].output[0]) == (13, 18)
