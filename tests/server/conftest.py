"""One server for all checks of the official `openai` client, clients that do not try again, and a browser."""

import os
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, where it is installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright to drive a browser")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def openai_url() -> Iterator[str]:
    """A server, which the control of the scorecard's line makes answer in wrong shapes."""
    broken = ["--broken"] if os.environ.get("TOKENMILL_S10_CONTROL") else []
    command = [sys.executable, "-m", "tests.server.openai_server", *broken]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = select.select([process.stdout], [], [], 60.0)[0]
        try:
            yield process.stdout.readline().strip() if ready else ""
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="session")
def make_openai(openai_url: str) -> Callable[..., Any]:
    """Makes a client with this key."""
    return lambda key="tm_good", **more: openai.OpenAI(
        **{"base_url": f"{openai_url}/v1", "api_key": key, "max_retries": 0, "timeout": 30.0, **more}
    )


@pytest.fixture(scope="session")
def gpt(make_openai: Callable[..., Any]) -> Iterator[Any]:
    """A client with a good key."""
    with make_openai() as client:
        yield client
