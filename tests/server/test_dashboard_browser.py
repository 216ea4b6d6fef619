"""The dashboard as people see it, in Chromium: light and dark, narrow and wide, and its playground.

Skipped, with the reason, where there is no Chromium or no Playwright to drive it. The pictures are kept with
`DASHBOARD_SHOTS=FOLDER`.
"""

import asyncio
import os
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability.server import Server, deployment, running
from tests.server import fake_load
from tokenmill.store import SqliteStore, new_key_id, new_secret
from tokenmill.store.records import Key, Scope

FORMS = [(scheme, width) for scheme in ("light", "dark") for width in (360, 1600)]
OBJECTIVES = [
    {"tier": "standard", "percentile": 95, "ttft_ms": 2000, "availability": 99},
    {"tier": "fast", "percentile": 99, "tpot_ms": 0.001},
]
CHECKS = Path(__file__).with_name("dashboard_checks.js").read_text(encoding="utf-8")
SHORT = {"model": "mock", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
MOCK = {"answers": [], "step_s": 0.002}


# A mock ends an answer when it likes, after 8 tokens at the latest.
SAID = re.compile(r" tokens in, [1-8] out\b")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = deployment(
        mock=MOCK,
        engine={"max_batch": 16, "kv_tokens": 8192},
        machine={"usd_per_hour": 0.0884, "source": "test"},
        observe={"slo": {"objectives": OBJECTIVES}},
    )
    with running(config, tmp_path_factory.mktemp("dashboard")) as found:
        fake_load.run(found.url, "mock", seconds=2.0, rate=15.0)
        assert fake_load.call(found.url, {**SHORT, "service_tier": "priority"}) == 200
        refused = {"model": "none-of-that-name", "messages": [{"role": "user", "content": "x"}]}
        assert fake_load.call(found.url, refused) == 404
        yield found


class Tab:
    """An open page that remembers what went wrong in it."""

    def __init__(self, browser: Any, url: str, scheme: str = "light", width: int = 1600) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.faults: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("requestfailed", lambda request: self.faults.append(request.url))
        self.page.goto(url)

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(message.text)

    def find(self, what: str) -> list[str]:
        """Faults of a kind, as `dashboard_checks.js` finds them."""
        found: list[str] = self.page.evaluate(f"({CHECKS}).{what}()")
        return found

    def wait_for_figures(self) -> None:
        self.page.wait_for_selector('#updated:has-text("as of")', timeout=15_000)

    def ask(self, text: str) -> str:
        """Send a message; what is said of the answer, once it is there."""
        self.page.fill("#most", "8")
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Control+Enter")
        self.page.wait_for_selector(".talk .user")
        self.page.wait_for_selector("#send:not([disabled])", timeout=20_000)
        return str(self.page.inner_text("#said"))


@pytest.mark.parametrize(("scheme", "width"), FORMS)
def test_nothing_overlaps_or_is_hard_to_read(browser: Any, server: Server, scheme: str, width: int) -> None:
    tab = Tab(browser, server.url, scheme, width)
    tab.wait_for_figures()
    assert SAID.search(tab.ask("hello"))
    page = tab.page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert tab.find("overlaps") == [] and tab.find("outside") == []
    assert tab.find("contrasts") == [] and tab.find("nameless") == []
    is_dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(15, 20, 24)"
    assert is_dark == (scheme == "dark")
    if folder := os.environ.get("DASHBOARD_SHOTS"):
        page.screenshot(path=str(Path(folder) / f"{scheme}-{width}.png"), full_page=True)
    assert tab.faults == []
    page.close()


def test_the_checks_find_what_they_look_for(browser: Any, server: Server) -> None:
    tab = Tab(browser, server.url)
    tab.wait_for_figures()
    page = tab.page
    page.evaluate("document.querySelector('.tile .muted').style.setProperty('margin-top', '-40px')")
    assert tab.find("overlaps")
    page.evaluate("document.querySelector('.tile .muted').style.setProperty('color', '#aaa')")
    assert tab.find("contrasts")
    page.evaluate("document.querySelector('.card').style.setProperty('width', '3000px')")
    assert tab.find("outside")
    page.evaluate("const each = document.querySelector('#model'); each.closest('label').replaceWith(each)")
    assert tab.find("nameless")
    page.close()


def test_figures_come_and_go_without_a_reload(browser: Any, server: Server) -> None:
    tab = Tab(browser, server.url)
    page = tab.page
    tab.wait_for_figures()
    calls = 'tr:has(td:text-is("anonymous")) td:nth-child(2)'
    before = int(page.inner_text(calls))
    page.evaluate("document.body.dataset.marked = 'yes'")
    assert before > 10 and fake_load.call(server.url, SHORT) == 200
    more = "([cell, before]) => Number(document.evaluate(cell, document, null, 2, null).stringValue) > before"
    page.wait_for_function(more, arg=['//tr[td="anonymous"]/td[2]', before], timeout=20_000)
    assert page.get_attribute("body", "data-marked") == "yes"
    assert "404 not found" in page.inner_text('[data-table="errors"]')
    assert page.inner_text('[data-table="slo"] tr:nth-child(3) td:nth-child(3)') == "100"
    assert page.inner_text('[data-text="state"]') == "ready"
    assert page.get_attribute('[data-path="ttft"]', "d").startswith("M")
    page.select_option("#price", "anthropic/claude-opus-4-6")
    page.wait_for_selector('[data-text="saving.note"]:has-text("claude-opus-4-6")')
    page.close()


def test_the_keyboard_is_enough(browser: Any, server: Server) -> None:
    tab = Tab(browser, server.url)
    tab.wait_for_figures()
    page, seen = tab.page, []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        if seen[-1] == "clear":
            break
    wanted = ["skip", "price", "prompt", "model", "tier", "most", "heat", "send", "clear"]
    assert [each for each in seen if each in wanted] == wanted
    page.close()


def test_errors_of_the_playground_are_shown(browser: Any, server: Server) -> None:
    tab = Tab(browser, server.url)
    tab.wait_for_figures()
    tab.page.fill("#most", "8")
    tab.page.fill("#prompt", "x" * 5000)
    tab.page.click("#send")
    tab.page.wait_for_selector(".talk .error")
    assert "context is 4096" in tab.page.inner_text(".talk .error")
    tab.page.click("#clear")
    assert tab.page.inner_text("#talk") == "" and SAID.search(tab.ask("again"))
    tab.page.close()


def test_a_server_with_keys_shows_nothing_without_one(browser: Any, tmp_path: Path) -> None:
    secret = new_secret()

    async def add(path: Path) -> None:
        store = SqliteStore(path)
        scopes: tuple[Scope, ...] = ("inference", "metrics")
        key = Key(id=new_key_id(), name="watcher", project="p", scopes=scopes, created_s=0.0)
        await store.add_key(key, secret.secret_hash)
        await store.close()

    with ThreadPoolExecutor() as threads:  # Playwright has a loop of its own in this thread
        threads.submit(asyncio.run, add(tmp_path / "server.db")).result()
    with running(deployment(mock=MOCK, http={"keyless": False}), tmp_path) as server:
        html = urllib.request.urlopen(server.url).read().decode()
        assert (
            "<option>mock</option>" not in html
            and "$" not in html.partition("<main")[2].partition("<option>")[0]
        )
        tab = Tab(browser, server.url)
        tab.page.fill("#key", "tm_wrong")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector('#updated:has-text("key")')
        tab.page.fill("#key", secret.secret)
        tab.page.keyboard.press("Enter")
        tab.wait_for_figures()
        tab.page.wait_for_selector("#model option", state="attached")
        assert SAID.search(tab.ask("hello"))
        assert secret.secret not in server.log.read_text()
        tab.page.close()
