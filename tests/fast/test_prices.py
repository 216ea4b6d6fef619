"""Tables of prices and machines: every price has date and source, and a bad row changes nothing."""

from pathlib import Path

import pytest

from tests.fast.cli_tools import Runner, make_home, make_runner
from tokenmill.core import NotFoundError, StorageError, UsageError
from tokenmill.costs.hardware import find_hardware, load_hardware
from tokenmill.costs.prices import PRICE_FILE, find_price, load_prices, select_prices, update_prices
from tokenmill.costs.tables import TableText, data_home, parse_rows

HEADER = (
    "provider,model,tier,usd_per_1m_input,usd_per_1m_cached_input,usd_per_1m_output,price_date,source,note"
)
GOOD = "acme,small,standard,0.1,0.01,0.4,2026-08-05,https://acme.example/prices,"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return make_runner(monkeypatch, capsys, make_home(tmp_path))


def table(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "mine.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_every_price_of_the_package_has_a_date_and_a_source(tmp_path: Path) -> None:
    prices = load_prices(tmp_path)
    assert len(prices) > 50
    for price in prices:
        assert price.date[:2] == "20" and price.source.startswith("http"), price
        assert price.date in str(price) and price.source in str(price)


def test_every_machine_with_a_price_has_its_date_and_source(tmp_path: Path) -> None:
    machines = load_hardware(tmp_path)
    assert len(machines) == 45
    for machine in machines:
        assert machine.source and machine.verified in ("yes", "partial", "no")
        assert machine.price is None or (machine.price.date and machine.price.source)
    assert find_hardware(machines, "h200").peak().bytes_per_s == 4.8e12
    assert find_hardware(machines, "l4").name == "L4"
    with pytest.raises(NotFoundError, match="could be"):
        find_hardware(machines, "A100")
    with pytest.raises(UsageError, match="SRAM"):
        find_hardware(machines, "groq").peak()


def test_prices_are_found_by_name() -> None:
    prices = load_prices()
    assert find_price(prices, "groq/llama-3.3-70b-versatile").output_usd == 0.79
    assert find_price(prices, "anthropic/claude-opus-5:fast").output_usd == 50
    assert {price.provider for price in select_prices(prices, model="mixtral-8x7b")} == {"groq", "mistral"}
    with pytest.raises(NotFoundError, match="acme/none"):
        find_price(prices, "acme/none")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (GOOD.replace("0.4", "forty"), "no number"),
        (GOOD.replace("0.4", "400000"), "not between"),
        (GOOD.replace("0.4", "-1"), "not between"),
        (GOOD.replace("0.4", "nan"), "not between"),
        (GOOD.replace("0.4", ""), "is empty"),
        (GOOD.replace("0.01", "0.2"), "cached input costs more"),
        (GOOD.replace("2026-08-05", ""), "price_date is empty"),
        (GOOD.replace("2026-08-05", "last week"), "no date"),
        (GOOD.replace("2026-08-05", "undated"), "no date"),
        (GOOD.replace("https://acme.example/prices", ""), "source is empty"),
        (GOOD.replace("standard", "golden"), "tier is"),
        (GOOD.replace("acme", ""), "provider is empty"),
        (GOOD + ",more", "10 fields"),
        (GOOD.replace("small", "small\x07"), "control characters"),
        (GOOD, "the same price as"),
    ],
)
def test_a_bad_row_is_named_and_changes_nothing(tmp_path: Path, row: str, why: str) -> None:
    update_prices(table(tmp_path, GOOD), tmp_path / "home")
    before = (tmp_path / "home" / PRICE_FILE).read_bytes()
    with pytest.raises(UsageError, match=why) as caught:
        update_prices(table(tmp_path, GOOD, row), tmp_path / "home")
    assert "mine.csv:3: " in caught.value.message
    assert (tmp_path / "home" / PRICE_FILE).read_bytes() == before


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no column price_date"):
        update_prices(table(tmp_path, GOOD, header=HEADER.replace("price_date", "day")), tmp_path)
    with pytest.raises(UsageError, match="no prices"):
        update_prices(table(tmp_path), tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        update_prices(tmp_path / "none.csv", tmp_path)
    (tmp_path / "mine.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        update_prices(tmp_path / "mine.csv", tmp_path)
    with pytest.raises(UsageError, match=r"t\.csv:2"):
        parse_rows(TableText("t.csv", 'a\n"x"y\n', True), ["a"], lambda row: row)


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where a folder must be")
    with pytest.raises(StorageError, match="home"):
        update_prices(table(tmp_path, GOOD), tmp_path / "home")


def test_the_users_table_takes_the_place(run: Runner, tmp_path: Path) -> None:
    assert "acme" not in run("prices").out
    done = run("prices", "update", "--from", str(table(tmp_path, GOOD)), "--json")
    assert done.code == 0 and done.document["num_prices"] == 1
    assert data_home() / PRICE_FILE == Path(done.document["path"])
    shown = run("prices")
    assert "acme" in shown.out and "2026-08-05" in shown.out and "https://acme.example/prices" in shown.out
    assert "groq" not in shown.out


def test_the_command(run: Runner) -> None:
    found = run("prices", "--model", "gpt-oss-120b", "--provider", "groq", "--json").document["prices"]
    assert [(price["output_usd"], price["date"]) for price in found] == [(0.6, "2025-08-06")]
    assert any(each["name"] == "L4" for each in run("prices", "--hardware", "--json").document["hardware"])
    assert "2026-05" in run("prices", "--hardware").out
    assert run("prices", "--model", "nothing").code == 3
    assert "update from what?" in run("prices", "update").error_line
    assert "--from belongs to update" in run("prices", "--from", "x").error_line
