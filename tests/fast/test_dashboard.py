"""The dashboard's figures, curves and page, without a browser."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from starlette.requests import Request
from starlette.responses import Response

from tests.fast.server_fakes import FakeBooks, deployment, key, line
from tests.fast.settled_calls import CANARY
from tokenmill.core import FinishReason, Tier
from tokenmill.costs.prices import Price
from tokenmill.server.caller import ANONYMOUS, NOBODY, Caller
from tokenmill.server.dashboard import (
    BatchLine,
    DashboardPages,
    ErrorLine,
    Gauges,
    History,
    Ledger,
    PageConfig,
    Sources,
    Today,
    View,
    figures,
    make_view,
)
from tokenmill.server.dashboard.history import NUM_SLOTS, SLOT_S, percentile
from tokenmill.server.dashboard.today import KeyBudget, priced_nano_usd
from tokenmill.server.fleet import Deployed, Fleet
from tokenmill.server.slo import CallTimes, SloConfig, SloObjective, SloTracker
from tokenmill.store import Key

NOW_S = 100_000.0
PRICE = Price(
    provider="p", model="m", tier="standard", input_usd=1.0, output_usd=2.0, cached_usd=0.5,
    date="2026-08-05", source="a list",
)  # fmt: skip


def call(
    *,
    total_s: float = 1.0,
    ttft_s: float | None = 0.5,
    tokens: int = 100,
    tier: Tier = "standard",
    finish: FinishReason = "completed",
) -> CallTimes:
    return CallTimes("mock", tier, finish, ttft_s, total_s, tokens)


def view(
    *deployments: Deployed, history: History | None = None, today: Today | None = None, **more: Any
) -> View:
    values: dict[str, Any] = {
        "history": history or History(),
        "fleet": Fleet(deployments or (deployment(),)),
        "today": today or Today(),
        "burns": (),
        "by_tier": {},
        "batches": (),
        "is_draining": False,
        "price": PRICE,
        "now_s": NOW_S,
    }
    return make_view(Sources(**{**values, **more}))


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (figures.count, 0, "0"),
        (figures.count, 9999, "9,999"),
        (figures.count, 12_345, "12.3 k"),
        (figures.count, 999_999, "1 M"),
        (figures.count, 4_560_000, "4.56 M"),
        (figures.rate, 0, "0"),
        (figures.rate, 0.666, "0.67"),
        (figures.rate, 62.4, "62"),
        (figures.seconds, None, "–"),
        (figures.seconds, 0.00042, "0.42 ms"),
        (figures.seconds, 0.0123, "12 ms"),
        (figures.seconds, 0.9996, "1.00 s"),
        (figures.seconds, 95.4, "95 s"),
        (figures.share, 0.004, "0.4 %"),
        (figures.share, 1.0, "100 %"),
        (figures.money, 0, "$0"),
        (figures.money, 1, "$0.000000001"),
        (figures.money, 12_340_000_000, "$12.34"),
        (figures.money, -4_200_000, "−$0.004200"),
        (figures.clock, 86_399.9, "23:59:59"),
    ],
)
def test_numbers_are_written_for_people(function: Callable[[Any], str], value: Any, text: str) -> None:
    assert function(value) == text


def test_a_curve_stays_inside_its_box_and_breaks_where_nothing_is_known() -> None:
    path = figures.curve([0.0, 5.0, None, 10.0, None, None, 3.0, 4.0], 10.0)
    assert path.count("M") == 3
    points = [tuple(map(float, point.split(","))) for point in re.findall(r"[\d.]+,[\d.]+", path)]
    assert all(0 <= x <= figures.CHART_WIDTH + 20 and 0 < y < figures.CHART_HEIGHT for x, y in points)
    assert min(y for _, y in points) == points[2][1] == 2.0
    assert figures.curve([None], 1.0) == figures.area([], 0.0) == ""
    assert figures.area([1.0, 2.0], 2.0).endswith("Z")


def test_percentiles_are_of_the_nearest_rank() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, at) for at in (1, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([7.0], 99.0) == 7.0 and percentile([], 50.0) is None


def test_tokens_are_spread_over_the_time_in_which_they_came() -> None:
    history = History()
    history.look(Gauges(None, 0, 0), NOW_S - 100 * SLOT_S)
    history.add(call(total_s=4.0 * SLOT_S, ttft_s=0.0, tokens=400), 10, NOW_S)
    slots = [slot for slot in history.slots(NOW_S) if slot is not None]
    assert sum(slot.output_tokens for slot in slots) == pytest.approx(400)
    assert max(slot.output_tokens for slot in slots) == pytest.approx(100)
    assert sum(slot.prompt_tokens for slot in slots) == pytest.approx(10)
    history.add(call(total_s=8.0 * SLOT_S, ttft_s=2.0 * SLOT_S, tokens=60), 500, NOW_S)
    slots = [slot for slot in history.slots(NOW_S) if slot is not None]
    assert sum(slot.prompt_tokens for slot in slots) == pytest.approx(510)
    assert min(slot.prompt_tokens for slot in slots) == 0  # nothing is taken from the time after the prompt


def test_the_last_hour_is_kept_and_no_more() -> None:
    history = History()
    for number in range(3 * NUM_SLOTS):
        history.look(Gauges(0.5, 1, 2), NOW_S + number * SLOT_S)
    assert len(history.slots(NOW_S + 3 * NUM_SLOTS * SLOT_S)) == NUM_SLOTS
    later = NOW_S + 100 * NUM_SLOTS * SLOT_S  # a machine that slept
    history.add(call(), 1, later)
    assert sum(slot.kv_share is not None for slot in history.slots(later) if slot is not None) == 0


def test_latencies_are_of_their_tier_and_of_the_last_five_minutes() -> None:
    history = History()
    history.add(call(ttft_s=9.0, tier="fast"), 1, NOW_S - 301.0)
    for number in range(1, 101):
        history.add(call(ttft_s=number / 1000, tier="fast"), 1, NOW_S)
    history.add(call(ttft_s=5.0, tier="batch"), 1, NOW_S)
    history.add(call(ttft_s=9.0, tier="fast", finish="cancelled"), 1, NOW_S)
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in view(history=history).tables["tiers"]}
    assert rows["fast"][2:5] == ["100", "50 ms", "99 ms"] and rows["batch"][3] == "5.00 s"
    assert rows["standard"][2:5] == ["0", "–", "–"]


def test_the_same_error_again_is_counted_and_a_request_is_listed_once() -> None:
    history = History()
    for number in range(3):
        history.fail(ErrorLine(NOW_S, "failed", "mock", f"req_{number}"))
    history.fail(ErrorLine(NOW_S, "500 internal server error", "/v1/completions", "req_2"))
    history.fail(ErrorLine(NOW_S, "expired", "mock", "req_9"))
    rows = view(history=history).tables["errors"]
    assert [row[1].text for row in rows] == ["expired", "failed (3 times)"]
    for number in range(200):
        history.fail(ErrorLine(NOW_S, f"{number}", "mock", f"req_{number}x"))
    assert len(history.errors) == 50 and len(view(history=history).tables["errors"]) == 10


def test_money_of_today_is_the_ledgers() -> None:
    today = Today(sums=(line(), line(("key_2", "mock"), price_nano_usd=9_000_000)), is_read=True)
    shown = view(today=today)
    assert shown.texts["cost"] == "$0.002000" and "$0.0120 charged, 4 calls" in shown.texts["cost.note"]
    assert [row[0].text for row in shown.tables["keys"]] == ["key_2", "key_1"]
    (model,) = shown.tables["models"]
    assert model[-1].text == "$2.00"  # 2 mUSD for 1,000 tokens out


def test_saving_names_its_price_with_date_and_source() -> None:
    assert priced_nano_usd((line(),), PRICE) == (600 * 1000 + 400 * 500 + 500 * 2000)
    texts = view(today=Today(sums=(line(),), is_read=True)).texts
    assert texts["saving"] == "$0.000800" and "p m, 1.8 times the cost here" in texts["saving.note"]
    assert "2026-08-05, a list" in texts["saving.source"]
    assert view(price=None).texts["saving"] == "–"


def test_a_budget_that_is_nearly_gone_stands_out() -> None:
    budgets = (
        KeyBudget(key_id="low", nano_usd=10**9, left_nano_usd=10**7),
        KeyBudget(key_id="full", nano_usd=10**9, left_nano_usd=10**9),
    )
    rows = {row[0].text: row[-1] for row in view(today=Today(budgets=budgets)).tables["keys"]}
    assert rows["low"] == ("$0.0100", "num bad") and rows["full"] == ("$1.00", "num")


@pytest.mark.parametrize(
    ("deployments", "is_draining", "text", "kind"),
    [
        ([deployment()], False, "ready", "good"),
        ([deployment(state="live")], False, "not ready", "bad"),
        ([deployment(), deployment("far", is_local=False, breaker="open")], False, "partly ready", "warn"),
        ([deployment()], True, "shutting down", "warn"),
    ],
)
def test_the_state_is_said_first(deployments: Any, is_draining: bool, text: str, kind: str) -> None:
    texts = view(*deployments, is_draining=is_draining).texts
    assert (texts["state"], texts["state.kind"]) == (text, kind)


def test_objectives_and_batches_have_their_rows() -> None:
    tracker = SloTracker(SloConfig(objectives=(SloObjective(tier="fast", ttft_ms=100.0, availability=99.0),)))
    tracker.add(call(tier="fast", ttft_s=0.2), NOW_S)
    batch = BatchLine(id="batch_1", state="in_progress", num_lines=200, num_done=50, num_failed=1)
    tables = view(burns=tracker.burns(NOW_S), batches=[batch]).tables
    slow, answered = tables["slo"]
    assert [cell.text for cell in slow] == [
        "every model, fast", "first token ≤ 100 ms, 99 %", "100", "100", "100", "1",
    ]  # fmt: skip
    assert slow[2].kind == "num bad" and answered[2] == ("0.00", "num good")
    assert [cell.text for cell in tables["batches"][0]] == [
        "batch_1",
        "in_progress",
        "50 of 200",
        "25 %",
        "1",
    ]


def test_the_ledger_is_read_once_for_all_and_its_trouble_is_shown() -> None:
    books = FakeBooks(
        lines=[line()], all_keys=[key(nano_usd=10**9), key("b"), key("c", nano_usd=1, revoked_s=1.0)]
    )

    async def remaining(which: Key) -> int | None:
        return 5 if which.budget is not None else None

    async def body() -> None:
        ledger = Ledger(books, remaining, wall_s=lambda: 10 * 86400.0 + 7)
        found = await asyncio.gather(*(ledger.refresh() for _ in range(20)))
        assert books.num_reads == 1 and books.since_s == 10 * 86400.0
        assert [each.key_id for each in found[0].budgets] == ["key_1"] and found[0].is_read
        books.is_broken, ledger._next_s = True, 0.0
        broken = await ledger.refresh()
        assert "StorageError" in broken.trouble and broken.sums == found[0].sums

    asyncio.run(body())


class Pages:
    """The pages with a fixed view."""

    def __init__(self, shown: View, models: tuple[str, ...] = ("mock",)) -> None:
        async def look(price: Price | None) -> View:
            self.price = price
            return shown

        config = PageConfig(version="1.2.3", prices=[PRICE], compare_with="p/m")
        self.pages = DashboardPages(config, look, lambda: models)

    def get(
        self, answer: Callable[[Request], Awaitable[Response]], key: Key = ANONYMOUS, query: str = ""
    ) -> Response:
        caller = Caller(key=key, request_id="r", api="openai")
        scope = {"type": "http", "query_string": query.encode(), "headers": [], "tokenmill.caller": caller}
        response: Response = asyncio.run(cast(Any, answer(Request(scope))))
        return response

    def html(self, key: Key = ANONYMOUS) -> str:
        return bytes(self.get(self.pages.page, key).body).decode()


def test_the_page_holds_its_figures_and_loads_nothing_from_elsewhere() -> None:
    pages = Pages(view(today=Today(sums=(line(),), is_read=True)))
    html = pages.html()
    assert "$0.001000" in html and "key_1" in html and "<option>mock</option>" in html and "1.2.3" in html
    addresses = re.findall(r"(?:src|href|action)=\"([^\"]+)\"", html)
    assert all(each.startswith(("/", "#", "data:image/svg+xml,")) for each in addresses)
    assert "<style" not in html and "style=" not in html and not re.search(r"\son\w+=", html)
    assert not re.search(r"<script(?! src=)", html)
    policy = pages.get(pages.pages.page).headers["content-security-policy"]
    assert (
        policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        and "unsafe" not in policy
    )


def test_who_may_not_see_gets_a_page_without_figures() -> None:
    pages = Pages(view(today=Today(sums=(line(),), is_read=True)), models=(CANARY,))
    html = pages.html(NOBODY)
    assert "$0.001000" not in html and "key_1" not in html and CANARY not in html
    assert 'data-open="no"' in html and re.search(r'<form id="key-form" class="key">', html)
    seen = pages.html()
    assert 'data-open="yes"' in seen and CANARY in seen  # the control


def test_names_cannot_become_markup() -> None:
    nasty = "<img src=x onerror=alert(1)>\"'&"
    history = History()
    history.fail(ErrorLine(NOW_S, nasty, nasty, nasty))
    today = Today(sums=(line((nasty, nasty)),), is_read=True, trouble=nasty)
    pages = Pages(view(deployment(nasty), history=history, today=today), models=(nasty,))
    assert "<img" not in pages.html() and "&lt;img" in pages.html()


def test_figures_as_json_are_those_of_the_page() -> None:
    pages = Pages(view(today=Today(sums=(line(),), is_read=True)))
    answer = pages.get(pages.pages.data, query="price=nobody%2Fnothing")
    data = json.loads(bytes(answer.body))
    html = pages.html()
    for place in re.findall(r'data-text="([^"]+)"', html):
        assert place in data["texts"], place
    for place in re.findall(r'data-path="([^"]+)"', html):
        assert place in data["paths"], place
    assert set(re.findall(r'data-table="([^"]+)"', html)) == set(data["tables"])
    assert data["price"] == "p/m" and pages.price is PRICE
    assert answer.headers["cache-control"] == "no-store"


def test_style_and_script_are_in_the_package() -> None:
    pages = Pages(view())
    style, script = pages.get(pages.pages.style), pages.get(pages.pages.script)
    assert style.headers["content-type"].startswith("text/css")
    assert script.headers["content-type"].startswith("text/javascript")
    css, code = bytes(style.body), bytes(script.body)
    assert b"prefers-color-scheme" in css and b"innerHTML" not in code
    assert len(css) + len(code) < 20_000
