"""What the doctor finds on machines of many kinds, and what it prints on this one."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tokenmill.cli import doctor
from tokenmill.cli.doctor import Finding, findings
from tokenmill.cli.machine import Machine
from tokenmill.cli.main import main
from tokenmill.kernels import available_isas, probe
from tokenmill.kernels.probe import Hardware, MachineLimits

HARDWARE = Hardware(
    cpu_model="Some CPU",
    cpu_flags=("avx2", "avx512_vnni", "amx_int8", "amx_bf16"),
    architecture="x86_64",
    num_cpus=2,
    num_usable_cpus=2,
    cpu_quota=None,
    caches=(),
    memory_total=8 << 30,
    memory_available=4 << 30,
    huge_pages="madvise",
    load_average=0.1,
)
LIMITS = MachineLimits(isa="amx", num_threads=2, int8_tops=12.0, bf16_tops=6.0, read_gb_s={1: 200.0})
GOOD = Machine(limits=LIMITS, hardware=HARDWARE, busy=0.0)
ALL_ISAS = ("amx", "avx512", "avx2", "portable", "numpy")


def only(found: list[Finding]) -> str:
    assert len(found) == 1 and found[0].remedy, found
    return f"{found[0].what}; {found[0].remedy}"


def on(isa: str, **hardware: object) -> Machine:
    changed = Hardware(**{**vars(HARDWARE), **hardware})
    return replace(GOOD, limits=replace(LIMITS, isa=isa), hardware=changed)


def test_nothing_is_missing_on_a_good_machine() -> None:
    assert findings(GOOD, ALL_ISAS) == []


@pytest.mark.parametrize(
    ("machine", "isas", "what"),
    [
        (on("numpy"), ("numpy",), "apt install g++"),
        (on("avx2"), ALL_ISAS, "unset TOKENMILL_ISA"),
        (on("avx512"), ALL_ISAS[1:], "Linux 5.16"),
        (on("avx512", cpu_flags=("avx2", "avx512_vnni")), ALL_ISAS[1:], "Sapphire Rapids"),
        (on("portable", architecture="aarch64", cpu_flags=()), ("portable", "numpy"), "portable kernels"),
        (on("amx", cpu_quota=1.5), ALL_ISAS, "allows 1.5 processors to 2 threads"),
        (on("amx", num_usable_cpus=1), ALL_ISAS, "1 of 2 processors"),
        (on("amx", huge_pages="never"), ALL_ISAS, "echo madvise"),
        (on("amx", memory_available=500_000_000), ALL_ISAS, "500 MB of memory"),
        (replace(GOOD, busy=0.4), ALL_ISAS, "others use 40%"),
    ],
)
def test_each_obstacle_is_found_with_its_remedy(machine: Machine, isas: tuple[str, ...], what: str) -> None:
    assert what in only(findings(machine, isas))


@pytest.mark.parametrize(
    "machine",
    [
        on("amx", cpu_quota=2.0),
        on("amx", huge_pages=""),
        on("amx", memory_available=None, memory_total=None),
        replace(GOOD, busy=0.05),
    ],
)
def test_what_is_enough_or_unknown_is_no_finding(machine: Machine) -> None:
    assert findings(machine, ALL_ISAS) == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Short measurements of a quiet machine, and a store that does not exist yet."""
    home = tmp_path / "not" / "yet"
    monkeypatch.setenv("TOKENMILL_HOME", str(home))
    monkeypatch.setattr(probe, "measure_machine", partial(probe.measure_machine, seconds=0.001))
    monkeypatch.setattr(probe, "busy_share", lambda: 0.0)
    return home


def test_the_document(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"machine", "isas", "store", "findings", "versions"}
    assert document["isas"] == list(available_isas())
    machine = document["machine"]
    assert list(machine["read_gb_s_by_mb"]) == ["1", "32", "135"]
    assert machine["memory_total"] == probe.read_hardware().memory_total
    assert machine["int8_tops"] > 0 and machine["bf16_tops"] > 0
    assert document["store"]["home"] == str(quick) and document["store"]["disk_free"] > 0
    assert not quick.exists(), "the doctor changes nothing"


def test_the_page(quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "findings", lambda *_: [Finding(what="it is slow", remedy="make it fast")])
    assert main(["doctor", "--quick"]) == 0
    page = capsys.readouterr().out
    assert "- it is slow\n  make it fast" in page
    for word in ("processor", "instruction sets", "memory", str(quick), "TOPS int8", "in 135 MB"):
        assert word in page
    monkeypatch.setattr(doctor, "findings", lambda *_: [])
    monkeypatch.setattr(doctor, "_LOW_DISK", 0)
    main(["doctor", "--quick"])
    assert "nothing is missing for speed" in capsys.readouterr().out


def test_a_full_disk_is_found(
    quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_LOW_DISK", 1 << 60)
    main(["doctor", "--quick", "--json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    assert any("free for models" in each["what"] for each in found)
