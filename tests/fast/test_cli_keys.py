"""`tokenmill keys` and `tokenmill ledger`, as their user runs them."""

import asyncio
import csv
import io
import json
from collections.abc import Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar, get_args

import pytest

from tests.fast.cli_tools import Runner, make_runner
from tests.fast.store_contract import NOON, entry
from tokenmill.cli.ledger import SUM_BY
from tokenmill.costs import load_prices, price_at, would_cost_nano_usd
from tokenmill.store import Budget, Entry, Key, SqliteStore, SumBy, hash_secret

T = TypeVar("T")
GROQ = "groq/llama-3.1-8b-instant"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return make_runner(monkeypatch, capsys, tmp_path)


def with_store(tmp_path: Path, work: Callable[[SqliteStore], Awaitable[T]]) -> T:
    async def run() -> T:
        store = SqliteStore(tmp_path / "server.db")
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def find(tmp_path: Path, secret: str) -> Key | None:
    return with_store(tmp_path, lambda store: store.find_key(hash_secret(secret)))


def test_a_key_is_made_and_shown_once(cli: Runner, tmp_path: Path) -> None:
    flags = "--project mail --scopes inference,metrics --tiers batch,standard --tags a,b --expires 30d "
    flags += "--requests-per-minute 60 --tokens-per-minute 9000 --concurrency 4 --capture on"
    made = cli("keys", "create", "ci", *flags.split(), "--budget", "10.5 USD/month")
    assert made.code == 0
    secret = made.out.strip()
    assert secret.startswith("tm_")
    assert len(secret) == 46
    assert "once" in made.err
    key = find(tmp_path, secret)
    assert key is not None
    assert key.budget == Budget(nano_usd=10_500_000_000, period="month")
    assert (key.name, key.project, key.scopes) == ("ci", "mail", ("inference", "metrics"))
    assert (key.tiers, key.tags, key.capture) == (("batch", "standard"), ("a", "b"), True)
    assert (key.limits.requests_per_minute, key.limits.tokens_per_minute) == (60, 9000)
    assert key.expires_s == pytest.approx(key.created_s + 30 * 86400, abs=5)
    listed = cli("keys", "list")
    assert secret not in listed.out
    assert "10.50 USD/month" in listed.out


def test_keys_are_rotated_changed_and_revoked(cli: Runner, tmp_path: Path) -> None:
    old = cli("keys", "create", "ci", "--json").document["secret"]
    assert cli("keys", "create", "ci").code == 2
    new = cli("keys", "rotate", "ci").out.strip()
    assert find(tmp_path, old) is None
    assert cli("keys", "change", "ci", "--budget", "$3", "--expires", "1y").code == 0
    key = find(tmp_path, new)
    assert key is not None
    assert key.budget == Budget(nano_usd=3 * 10**9)
    assert cli("keys", "change", key.id, "--budget", "none", "--expires", "never").code == 0
    key = find(tmp_path, new)
    assert key is not None
    assert (key.budget, key.expires_s) == (None, None)
    for _ in range(2):
        assert cli("keys", "revoke", "ci").code == 0
    key = find(tmp_path, new)
    assert key is not None
    assert not key.is_valid(NOON)
    assert "revoked" in cli("keys", "rotate", "ci").error_line
    assert cli("keys", "list", "--json").document["keys"][0]["state"] == "revoked"
    assert cli("keys", "create", "ci").code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("--budget", "10 EUR"),
        ("--budget", "-1"),
        ("--budget", "0.0000000001"),
        ("--budget", "99999999999"),
        ("--budget", "1e3"),
        ("--expires", "0d"),
        ("--expires", "soon"),
        ("--scopes", "root"),
        ("--scopes", ""),
        ("--tiers", "fast,fast"),
        ("--tags", "a b"),
        ("--project", "../x"),
        ("--concurrency", "0"),
    ],
)
def test_flags_that_make_no_sense(words: tuple[str, str], cli: Runner, tmp_path: Path) -> None:
    refused = cli("keys", "create", "x", *words)
    assert refused.code == 2
    assert words[0] in refused.error_line
    assert not (tmp_path / "server.db").exists()


def test_keys_and_files_that_are_not_there(cli: Runner, tmp_path: Path) -> None:
    assert "no database" in cli("keys", "list").error_line
    assert "no database" in cli("ledger").error_line
    assert cli("keys", "create", "x", "--db", "/proc/none/x.db").code == 5
    assert cli("keys", "create", "").code == 2
    cli("keys", "create", "x")
    assert cli("keys", "revoke", "y").code == 3
    assert cli("keys", "change", "x").code == 2
    assert cli("keys").code == 2


def fill(tmp_path: Path) -> None:
    lines = [
        entry("a", 30, model="small", feature="mail", at_s=NOON),
        entry("b", 50, model="large", feature="=HYPERLINK()", at_s=NOON + 86400),
        entry("c", 20, model="small", feature="mail", at_s=NOON + 40 * 86400),
    ]
    with_store(tmp_path, lambda store: store.settle(lines))


def test_the_ledger_is_summed(cli: Runner, tmp_path: Path) -> None:
    fill(tmp_path)
    table = cli("ledger").out.splitlines()
    assert [row.split()[:2] for row in table[1:]] == [["large", "1"], ["small", "2"], ["total", "3"]]
    assert table[-1].endswith("0.0000001")
    document = cli("ledger", "--by", "model,month", "--json").document
    assert {tuple(each["group"].values()): each["price_nano_usd"] for each in document["sums"]} == {
        ("large", "2026-09"): 50,
        ("small", "2026-09"): 30,
        ("small", "2026-10"): 20,
    }
    assert document["total"]["num_entries"] == 3
    some = cli("ledger", "--since", "2026-10", "--until", "2027-01-01", "--by", "total", "--json").document
    assert some["total"]["price_nano_usd"] == 20
    assert cli("ledger", "--where", "feature=none").out == "no lines\n"


def test_the_ledger_as_csv(cli: Runner, tmp_path: Path) -> None:
    fill(tmp_path)
    rows = list(csv.DictReader(io.StringIO(cli("ledger", "--by", "feature", "--csv").out)))
    assert {row["feature"]: row["price_nano_usd"] for row in rows} == {"mail": "50", "'=HYPERLINK()": "50"}
    lines = list(csv.DictReader(io.StringIO(cli("ledger", "--lines", "--where", "model=small").out)))
    assert [line["request_id"] for line in lines] == ["a", "c"]
    assert list(lines[0]) == [field.name for field in fields(Entry)]
    document = cli("ledger", "--lines", "--json").document
    assert [line["request_id"] for line in document["entries"]] == ["a", "b", "c"]


def test_what_it_would_have_cost(cli: Runner, tmp_path: Path) -> None:
    fill(tmp_path)
    document = cli("ledger", "--by", "model", "--roi", GROQ, "--json").document
    price = document["price"]
    assert (price["input_usd"], price["output_usd"]) == (0.05, 0.08)
    # Three calls of 7 tokens in and 5 out, at 50 and 80 nanodollars a token; they cost 2 each here.
    assert document["total"]["there_nano_usd"] == 3 * (7 * 50 + 5 * 80)
    assert document["total"]["saved_nano_usd"] == 3 * (7 * 50 + 5 * 80) - 6
    assert "2025-08-12" in cli("ledger", "--roi", GROQ).out
    for name, code in ((f"{GROQ}@2020-01-01", 3), ("nobody/none", 3), ("gpt", 2), ("a/b@soon", 2)):
        assert cli("ledger", "--roi", name).code == code, name


def test_prices_of_a_day_are_exact() -> None:
    prices = load_prices()
    new = price_at(prices, "openai/gpt-5-nano")
    assert new == price_at(prices, f"openai/gpt-5-nano@{new.date}")
    cost = would_cost_nano_usd(
        new, num_prompt_tokens=10**15 + 1, num_cached_tokens=10**15, num_output_tokens=3
    )
    assert cost == 5 * 10**15 + 50 + 3 * 400


@pytest.mark.parametrize(
    "words",
    [
        ("--by", "nope"),
        ("--by", "model,model"),
        ("--since", "2026-13"),
        ("--since", "yesterday"),
        ("--where", "model"),
        ("--where", "price=3"),
        ("--lines", "--csv"),
        ("--where", "model=a", "--where", "model=b"),
    ],
)
def test_questions_that_make_no_sense(words: tuple[str, ...], cli: Runner, tmp_path: Path) -> None:
    fill(tmp_path)
    assert cli("ledger", *words).code == 2


def test_the_command_knows_what_the_store_sums_by() -> None:
    assert get_args(SumBy) == SUM_BY


def test_what_is_written_is_json(cli: Runner, tmp_path: Path) -> None:
    fill(tmp_path)
    for words in (("ledger",), ("ledger", "--lines"), ("ledger", "--csv"), ("keys", "list")):
        assert isinstance(json.loads(cli(*words, "--json").out), dict)
