"""Capture, shadow pairs and erasure on a whole server; the short form of scorecard line S23, its control."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import s23
from benchmarks.reliability.client import post
from benchmarks.reliability.server import Server, deployment
from benchmarks.reliability.tenants import once, tenant_server
from tokenmill.workload import WorkloadCall, WorkloadFolder, read_calls, read_log, verify_erasures

CHAT: dict[str, Any] = {
    "model": "both",
    "max_tokens": 8,
    "messages": [{"role": "user", "content": "from bob@example.com"}],
}


def run_cli(*words: str) -> tuple[int, str]:
    """The exit code of a command, and what it writes."""
    command = [sys.executable, "-m", "tokenmill", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout


def config() -> dict[str, Any]:
    """Two mocks, the second one the shadow of the first, and a route that is captured."""
    one = deployment(mock={"seed": 1})
    one["models"].append({"name": "second", "mock": {"seed": 2}})
    shadow = {"backend": "second", "share": 1.0}
    route = {"name": "both", "targets": [{"backend": "mock"}], "shadow": shadow}
    return {**one, "routes": [route], "capture": {"routes": ["mock"]}}


def lines_of(folder: WorkloadFolder, num: int) -> list[WorkloadCall]:
    """The lines, once there are so many."""
    until_s, lines = time.monotonic() + 20.0, list[WorkloadCall]()
    while len(lines) < num and time.monotonic() < until_s:
        lines = [each for path in folder.files() for each in read_calls(path)]
        time.sleep(0.05)
    return lines


async def _calls(server: Server, secret: str) -> None:
    """A pair, a chat, a stream, a message, a response; and two that are no answers."""
    headers = {"authorization": f"Bearer {secret}"}

    async def ask(path: str, value: Any) -> None:
        answer = await post(server.port, path, value, headers)
        assert answer.status == 200, answer.body

    await ask("/v1/chat/completions", {**CHAT, "user": "ann"})
    await ask("/v1/chat/completions", {**CHAT, "model": "mock", "user": "ann"})
    await ask("/v1/completions", {"model": "mock", "prompt": "x", "max_tokens": 3, "user": "bob"})
    message = {"model": "mock", "max_tokens": 3, "messages": CHAT["messages"]}
    await ask("/v1/messages", {**message, "metadata": {"user_id": "ann"}})
    await ask("/v1/responses", {"model": "mock", "input": "x", "max_output_tokens": 16, "user": "bob"})
    left = await post(
        server.port, "/v1/completions", {"model": "mock", "prompt": "x" * 40}, headers, timeout_s=1e-3
    )
    wrong = await post(server.port, "/v1/completions", {"model": "mock", "prompt": "x", "n": 0}, headers)
    assert (left.status, wrong.status) == (0, 400)


def test_calls_are_captured_and_erased_while_the_server_runs(tmp_path: Path) -> None:
    names = {"user": "shop", "root": "shop"}
    with tenant_server(config(), tmp_path, names) as (server, keys):
        folder = WorkloadFolder(Path(f"{server.store}.captures"))
        asyncio.run(_calls(server, keys["user"]))
        lines = lines_of(folder, 5)
        pairs = [each for each in lines if each.shadow is not None]
        assert len(lines) == 5 and len(pairs) == 1
        log = read_log(folder.path)  # what was captured is a workload's log as it is
        assert (log.format, len(log.rows)) == ("capture", 4)
        assert ["raw text" in each.reason for each in log.faults] == [True]
        assert pairs[0].shadow is not None and pairs[0].shadow.origin.model != ""
        assert pairs[0].shadow.response["choices"] != pairs[0].response["choices"]
        text = "".join(path.read_text() for path in folder.files())
        assert "bob@example.com" not in text and '"ann"' not in text and "[EMAIL]" in text

        erase = ("erase", "--project", "shop", "--user", "ann", "--db", str(server.store), "--json")
        proof = json.loads(run_cli(*erase)[1])
        assert sum(each["num_lines_removed"] for each in proof["files"]) == 3 and proof["ledger_rows"] == 4
        assert len(lines_of(folder, 2)) == 2
        asyncio.run(_calls(server, keys["user"]))
        assert len(lines_of(folder, 7)) == 7, "the server goes on"
        refused = asyncio.run(once(server, keys["user"], "POST", "/admin/erase", {"user": "bob"}))
        assert refused.status == 403
        assert run_cli("erase", "--verify", "--db", str(server.store))[0] == 0
    assert verify_erasures(folder) == []
    path = folder.files()[0]
    path.write_bytes(path.read_bytes().replace(b"req_", b"rex_", 1))
    assert run_cli("erase", "--verify", "--db", str(server.store))[0] == 1


@pytest.mark.parametrize("guard", [True, False])
def test_tenants_are_apart(guard: bool) -> None:
    line = s23.run(cases=960, seed=1, guard=guard, trials=0, pairs=2000)
    assert (line.violations == 0) == guard, line.figures
