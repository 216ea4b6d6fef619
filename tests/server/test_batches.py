"""Batches over `kill -9` of whole servers, and the short form of scorecard line S19 with its controls."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import apsw
import pytest

from benchmarks.reliability.server import Server, running
from tests.server.batch_tools import ask, bills_of, chat_lines, config, form, until_ended

KILLS = 2
NUM_LINES = 120
CHAT = "/v1/chat/completions"


def _kill(server: Server) -> None:
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait()


def _batch(server: Server, batch_id: str) -> Any:
    status, found, _ = ask(server.port, "GET", f"/v1/batches/{batch_id}")
    assert status == 200, found
    return found


def test_a_server_that_is_killed_goes_on(tmp_path: Path) -> None:
    """Slow answers, so that every kill hits lines that run; a message batch beside it."""
    rng, batch_id, message_id = random.Random(1), "", ""
    slow = config(mock={"step_s": 0.01})
    for _ in range(KILLS):
        with running(slow, tmp_path) as server:
            if not batch_id:
                batch_id, message_id = _submit_both(server)
            done = _batch(server, batch_id)["request_counts"]["completed"]
            _wait_for_more(server, batch_id, done)
            time.sleep(rng.uniform(0.0, 0.05))
            _kill(server)
    with running(slow, tmp_path) as server:
        done = until_ended(lambda: _batch(server, batch_id), lambda batch: batch["status"] == "completed")
        path = f"/v1/messages/batches/{message_id}"
        until_ended(lambda: ask(server.port, "GET", path)[1], lambda b: b["processing_status"] == "ended")
        output = ask(server.port, "GET", f"/v1/files/{done['output_file_id']}/content")[1]
        results = ask(server.port, "GET", f"{path}/results")[1]
    lines = [json.loads(line) for line in output.splitlines()]
    assert Counter(line["custom_id"] for line in lines) == Counter(f"c{at}" for at in range(NUM_LINES))
    for line in lines:
        text = line["response"]["body"]["choices"][0]["message"]["content"]
        assert text == line["custom_id"].replace("c", "a")
    kinds = Counter(json.loads(line)["result"]["type"] for line in results.splitlines())
    assert kinds == Counter({"succeeded": 20})
    assert len(bills_of(tmp_path / "server.db", batch_id)) == NUM_LINES
    assert len(bills_of(tmp_path / "server.db", message_id)) == 20
    left = {each.name for each in Path(f"{tmp_path / 'server.db'}.files").iterdir()}
    assert len(left) == 4, "two inputs and two outputs, no drafts"


def _wait_for_more(server: Server, batch_id: str, before: int) -> None:
    """Until some lines more are answered."""
    until_ended(
        lambda: _batch(server, batch_id),
        lambda batch: batch["status"] == "completed" or batch["request_counts"]["completed"] > before,
    )


def _submit_both(server: Server) -> tuple[str, str]:
    body, kind = form(chat_lines(range(NUM_LINES)))
    file_id = ask(server.port, "POST", "/v1/files", body, content_type=kind)[1]["id"]
    value = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    batch_id = ask(server.port, "POST", "/v1/batches", json.dumps(value).encode())[1]["id"]
    requests = [
        {
            "custom_id": f"m{at}",
            "params": {"model": "mock", "max_tokens": 8, "messages": [{"role": "user", "content": f"q{at}"}]},
        }
        for at in range(20)
    ]
    found = ask(server.port, "POST", "/v1/messages/batches", json.dumps({"requests": requests}).encode())[1]
    return batch_id, found["id"]


def test_a_server_that_is_told_to_end_gives_lines_back_at_once(tmp_path: Path) -> None:
    slow = config(mock={"step_s": 0.2})
    with running(slow, tmp_path) as server:
        batch_id, _ = _submit_both(server)
        until_ended(lambda: _batch(server, batch_id), lambda batch: batch["status"] == "in_progress")
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert time.monotonic() - begun < 10
    database = apsw.Connection(str(tmp_path / "server.db"), flags=apsw.SQLITE_OPEN_READONLY)
    found = database.execute("SELECT state, count(*) FROM lines GROUP BY state").fetchall()
    states = {str(state): int(str(count)) for state, count in found}
    tries = database.execute("SELECT max(num_tries) FROM lines WHERE state = 'pending'").get
    database.close()
    assert states["pending"] > 0 and "leased" not in states, states
    assert tries == 0, "to be stopped is no try"


@pytest.mark.parametrize("guard", ["on", "off"])
def test_scorecard_line_s19(guard: str) -> None:
    command = [sys.executable, "-m", "benchmarks.reliability.s19", "--kills", "8", "--lines", "400"]
    found = subprocess.run([*command, "--guard", guard], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("S19 guard") == (1 if guard == "on" else 2)
