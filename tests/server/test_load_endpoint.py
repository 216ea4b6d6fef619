"""The load generator over sockets and processes: an endpoint whose latencies are known, and a local
engine.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import numpy as np
import pytest

from benchmarks.load.scripted_endpoint import Script, ScriptedEndpoint
from tests.server.async_tools import spec
from tokenmill.cli import load_arguments
from tokenmill.cli.load_target import EngineTarget
from tokenmill.cli.main import main
from tokenmill.core import SamplingParams
from tokenmill.engine.serving import AsyncEngine
from tokenmill.evals.load import (
    ARRIVALS,
    ClosedLoop,
    DriveConfig,
    LoadRequest,
    LoadRun,
    OpenLoop,
    PromptMaker,
    at_rate,
    drive,
    summarize,
)
from tokenmill.evals.load.remote_target import RemoteTarget
from tokenmill.evals.load.traces import Call
from tokenmill.remote import RemoteClient, parse_endpoint

TOLERANCE_MS = 20.0
"""Of a busy machine: client and endpoint share this process and its timers."""

CALL = Call(at_s=None, num_input_tokens=12, num_output_tokens=8)


@asynccontextmanager
async def target_of(endpoint: ScriptedEndpoint) -> AsyncIterator[RemoteTarget]:
    async with (
        endpoint.served() as url,
        RemoteClient(parse_endpoint(url, "scripted")) as client,
    ):
        yield RemoteTarget(client)


def measured(script: Script, num: int, arrivals: OpenLoop | ClosedLoop) -> tuple[LoadRun, ScriptedEndpoint]:
    endpoint = ScriptedEndpoint(script)
    maker = PromptMaker()
    requests = [maker.request(number, CALL) for number in range(num)]

    async def run() -> LoadRun:
        async with target_of(endpoint) as target:
            return await drive(target, requests, arrivals, DriveConfig(timeout_s=20))

    return asyncio.run(run()), endpoint


def test_percentiles_are_those_of_the_endpoint() -> None:
    """TTFT is 50, 55, ..., 95 ms in turn, gaps are 10 ms; the endpoint's own clock is the closer
    reference.
    """
    run, endpoint = measured(Script(ttft_ms=50, itl_ms=10), 60, ClosedLoop(concurrency=6))
    figures = summarize(run)
    assert figures.num_ok == 60 and figures.num_output_tokens == 480 and figures.num_input_tokens == 720
    assert figures.counted_by == "system"
    assert figures.ttft_ms and figures.tpot_ms and figures.itl_ms and figures.e2e_ms
    for level, quantile in (
        (0.5, figures.ttft_ms.p50),
        (0.9, figures.ttft_ms.p90),
        (0.99, figures.ttft_ms.p99),
    ):
        written = 1e3 * float(np.quantile(endpoint.ttfts_s, level))
        assert quantile.value == pytest.approx(written, abs=TOLERANCE_MS)
    assert figures.ttft_ms.p50.value == pytest.approx(72.5, abs=TOLERANCE_MS)
    assert figures.tpot_ms.p50.value == pytest.approx(10, abs=TOLERANCE_MS / 7)
    assert figures.e2e_ms.p50.value == pytest.approx(142.5, abs=TOLERANCE_MS)


def test_a_stall_of_a_second_is_in_the_p99_of_an_open_loop_and_not_in_one_that_counts_from_sending() -> None:
    script = Script(ttft_ms=2, itl_ms=1, stall_s=(0.7, 1.7))
    times = at_rate(60.0, 150, kind="constant", seed=0)
    run, _ = measured(script, 150, OpenLoop(times_s=times, max_in_flight=1))
    honest, hiding = summarize(run), summarize(run, origin="sent")
    assert honest.num_ok == 150 and honest.ttft_ms and hiding.ttft_ms
    assert honest.ttft_ms.p90.value > 500 and honest.ttft_ms.p99.value > 900
    assert hiding.ttft_ms.p90.value < 100, "one request of 150 met the stall"


def test_refusals_are_counted_and_never_fast() -> None:
    run, _ = measured(Script(ttft_ms=20, itl_ms=1, error_every=5), 50, ClosedLoop(concurrency=5))
    figures = summarize(run)
    assert (figures.num_ok, figures.num_errors) == (40, 10)
    assert "overloaded" in next(iter(figures.errors))
    assert figures.ttft_ms and figures.ttft_ms.lowest > 19


def test_a_storm_of_hundreds_of_streams_loses_none() -> None:
    run, endpoint = measured(Script(ttft_ms=300, itl_ms=20), 300, OpenLoop(times_s=(0.0,) * 300))
    assert endpoint.num_requests == 300
    assert all(sample.status == "ok" and sample.num_output_tokens == 8 for sample in run.samples)


def test_an_engine_in_its_own_process_is_a_target() -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    requests = [
        LoadRequest(id=f"load-{n}", text="", token_ids=(n, 7, 9), num_input_tokens=3, params=params)
        for n in range(20)
    ]
    requests.append(LoadRequest(id="load-20", text="", token_ids=(), num_input_tokens=0, params=params))

    async def run() -> LoadRun:
        async with await AsyncEngine.start(spec()) as engine:
            return await drive(EngineTarget(engine), requests, ClosedLoop(concurrency=4))

    samples = asyncio.run(run()).samples
    assert [sample.status for sample in samples] == ["ok"] * 20 + ["error"]
    assert all(sample.num_output_tokens == 8 and sample.num_input_tokens == 3 for sample in samples[:20])
    assert all(1 <= len(sample.piece_times_s) <= 8 for sample in samples[:20])


@contextmanager
def served(script: Script) -> Iterator[str]:
    """The URL of an endpoint on a thread of its own."""
    with serving(ScriptedEndpoint(script)) as url:
        yield url


@contextmanager
def serving(endpoint: ScriptedEndpoint) -> Iterator[str]:
    loop = asyncio.new_event_loop()
    started: list[str] = []
    is_up, end = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with endpoint.served() as url:
            started.append(url)
            is_up.set()
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert is_up.wait(10)
        yield started[0]
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(10)
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


SMALL = ["--requests", "12", "--warmup", "2", "--output", "4", "--input", "10"]


def test_the_command_measures_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Script(ttft_ms=20, itl_ms=2)) as url:
        code = main(["load", url, *SMALL, "--concurrency", "2,4", "--ttft", "500", "--json"])
        document = json.loads(capsys.readouterr().out)
        assert code == 0 and document["highest"]["value"] == 4
        assert [level["num_ok"] for level in document["levels"]] == [12, 12]
        assert document["levels"][0]["num_warmup"] == 2
        assert main(["load", url, *SMALL, "--rate", "100", "--ttft", "1"]) == 1, "no level kept it"
        shown = capsys.readouterr().out
        assert "TTFT" in shown and "highest level that keeps the service level: none" in shown


def test_the_search_ends_at_the_highest_concurrency_that_keeps_the_level(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with served(Script(ttft_ms=1, itl_ms=1)) as url:
        command = ["load", url, *SMALL, "--concurrency", "max", "--ttft", "0.001", "--json"]
        assert main(command) == 1
        document = json.loads(capsys.readouterr().out)
        assert document["highest"] is None and len(document["levels"]) == 1


def test_what_was_not_sent_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Script(ttft_ms=1, itl_ms=1)) as url:
        assert main(["load", url, *SMALL, "--rate", "5", "--max-seconds", "1"]) == 0
    assert "of 14 were not sent: --max-seconds 1" in capsys.readouterr().err


def test_versus_takes_turns(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Script(ttft_ms=60, itl_ms=2)) as slow, served(Script(ttft_ms=20, itl_ms=2)) as fast:
        flags = ["--endpoint-model-a", "scripted", "--endpoint-model-b", "scripted", *SMALL, "--rounds", "2"]
        prices = ["--price-a", "2/h", "--price-b", "0.1,0.4", "--concurrency", "2"]
        assert main(["versus", slow, fast, *flags, *prices, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in document["figures"]}
    assert document["num_ok"] == [24, 24] and rows["TTFT p50"]["improvement"] > 0.3
    assert rows["$/1M in"]["label_a"] == "estimated" and rows["$/1M out"]["b"] == 0.4


def test_the_flags_know_what_the_generator_knows() -> None:
    assert load_arguments.ARRIVALS == ARRIVALS


def test_an_endpoint_that_is_not_there_fails_every_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "http://127.0.0.1:9/v1", "--endpoint-model", "x", *SMALL, "--concurrency", "1"]) == 1
    shown = capsys.readouterr()
    assert "12 failed" in shown.err and "p99" not in shown.out


@pytest.mark.parametrize(
    "flags",
    [
        ["--rate", "max"],
        ["--rate", "0"],
        ["--rate", "1", "--concurrency", "2"],
        ["--trace", "nowhere.csv"],
        ["--percentile", "101", "--ttft", "5"],
        ["--warmup", "-1"],
    ],
)
def test_bad_flags_are_refused_before_anything_is_sent(flags: list[str]) -> None:
    assert main(["load", "http://127.0.0.1:9/v1", "--endpoint-model", "x", *flags]) in (2, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_what_was_measured(number: signal.Signals) -> None:
    endpoint = ScriptedEndpoint(Script(ttft_ms=30, itl_ms=2))
    with serving(endpoint) as url:
        command = [sys.executable, "-m", "tokenmill", "load", url, "--endpoint-model", "scripted", "--json"]
        command += ["--concurrency", "2", "--requests", "3000", "--warmup", "0", "--output", "4"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=os.environ) as child:
            try:
                deadline = time.monotonic() + 30
                while endpoint.num_requests < 20 and time.monotonic() < deadline:
                    time.sleep(0.05)
                child.send_signal(number)
                out, _ = child.communicate(timeout=20)
            finally:
                child.kill()
    (level,) = json.loads(out)["levels"]
    assert child.returncode == 128 + number and level["was_stopped"]
    assert level["num_ok"] > 0 and level["num_cancelled"] == 2
