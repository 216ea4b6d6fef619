"""The report as people see it, in Chromium: light, dark, narrow, wide, printed; offline and without a script.

Skipped, with the reason, where there is no Chromium or no Playwright to drive it. The pictures are kept with
`REPORT_SHOTS=FOLDER`.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.fast.optimize_fakes import FakeCandidate, right, workload, wrong
from tokenmill.optimize import Candidate, CannotBeMadeError, Machine, optimize
from tokenmill.optimize.classifier import ClassifierCandidate
from tokenmill.optimize.write import write_outcome
from tokenmill.workload import Slo

FORMS = [(scheme, width) for scheme in ("light", "dark") for width in (360, 1280)]
CHECKS = Path(__file__).with_name("dashboard_checks.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")

    def flaky(text: str) -> tuple[str, float]:
        place = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
        return (wrong(text), 0.3 + place) if place < 0.15 else (right(text), 0.9)

    candidates: list[Candidate] = [
        ClassifierCandidate(),
        FakeCandidate(name="a model with a rather long name, w8a8, 4 examples, grammar", delay_s=0.2),
        FakeCandidate(name="unsure", answer=flaky),
        FakeCandidate(name="broken", make_error=CannotBeMadeError("the export is not what was trained")),
    ]

    def go() -> None:  # Playwright has a loop of its own in the test's thread
        problem = workload(folder, 800, slice_by="answer", slo=Slo(e2e_ms=500.0))
        found = optimize(problem, folder / "run", candidates, Machine(usd_per_hour=0.1, energy_note="none"))
        write_outcome(found, folder / "run", {"cpu_model": "a test's processor", "num_usable_cpus": 2})

    with ThreadPoolExecutor() as threads:
        threads.submit(go).result()
    return folder / "run" / "report.html"


class Tab:
    """An open page that remembers what went wrong in it, and what it asked for."""

    def __init__(self, browser: Any, path: Path, **settings: Any) -> None:
        self.page = browser.new_page(java_script_enabled=True, **settings)
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def find(self, what: str) -> list[str]:
        found: list[str] = self.page.evaluate(f"({CHECKS}).{what}()")
        return found


@pytest.mark.parametrize(("scheme", "width"), FORMS)
def test_it_is_a_page_to_forward(browser: Any, page_path: Path, scheme: str, width: int) -> None:
    tab = Tab(browser, page_path, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = tab.page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert tab.find("outside") == [] and tab.find("contrasts") == [] and tab.find("overlaps") == []
    assert "Deploy classifier" in page.inner_text("h1")
    assert page.locator("svg.chart").count() == 2
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (ground == "rgb(15, 20, 24)") == (scheme == "dark")
    assert label_overlaps(page) == []
    assert tab.faults == [] and tab.asked == [page_path.as_uri()]
    if folder := os.environ.get("REPORT_SHOTS"):
        page.screenshot(path=str(Path(folder) / f"report-{scheme}-{width}.png"), full_page=True)
    page.close()


def label_overlaps(page: Any) -> list[str]:
    """Names in a chart that cover one another."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll('svg.chart')].flatMap((chart) => {
          const labels = [...chart.querySelectorAll('text.label')].map((each) => [each, each.getBBox()]);
          return labels.flatMap(([a, one], at) => labels.slice(at + 1).filter(([b, two]) =>
            Math.min(one.x + one.width, two.x + two.width) - Math.max(one.x, two.x) > 1
            && Math.min(one.y + one.height, two.y + two.height) - Math.max(one.y, two.y) > 2)
            .map(([b]) => `${a.textContent} / ${b.textContent}`));
        })"""
    )
    return found


def test_it_says_the_same_without_scripts_and_on_paper(browser: Any, page_path: Path, tmp_path: Path) -> None:
    context = browser.new_context(java_script_enabled=False, color_scheme="dark", offline=True)
    page = context.new_page()
    page.goto(page_path.as_uri())
    text = page.inner_text("body")
    for words in (
        "What lost, and why",
        "broken",
        "could not be made",
        "Lineage and terms",
        "unsure > incumbent",
    ):
        assert words in text, words
    page.emulate_media(media="print")
    page.pdf(path=str(tmp_path / "report.pdf"))
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
    context.close()
    lit = Tab(browser, page_path, color_scheme="dark", viewport={"width": 794, "height": 1123})
    lit.page.emulate_media(media="print", color_scheme="dark")
    style = "getComputedStyle(document.documentElement)"
    assert lit.page.evaluate(f"{style}.backgroundColor") == "rgb(255, 255, 255)"
    assert lit.find("contrasts") == []
    lit.page.close()
