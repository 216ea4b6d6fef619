"""`tokenmill serve` as a child process on a free port, for the lines of the scorecard and for tests.

with running(deployment(mock={"step_s": 0.01}), folder) as server:
    server.url, server.pid, server.store
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Server", "deployment", "running"]

_START_S = 60.0
_MAIN = "import sys\nfrom tokenmill.cli.main import main\nsys.exit(main())"


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that listens: its process, its address, and where it keeps its state and log."""

    process: "subprocess.Popen[str]"
    url: str
    port: int
    store: Path
    log: Path

    @property
    def pid(self) -> int:
        """The front end's process."""
        return self.process.pid

    def engine_pids(self) -> list[int]:
        """Its engine processes."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="ascii")
        return [int(pid) for pid in children.split()]


def deployment(*, mock: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A deployment of one mock that is called `mock`."""
    engine = more.pop("engine", {})
    return {"models": [{"name": "mock", "mock": dict(mock or {}), "engine": engine}], **more}


@contextlib.contextmanager
def running(
    config: Mapping[str, Any], folder: Path, *, env: Mapping[str, str] | None = None, sabotage: str = ""
) -> Iterator[Server]:
    """Serve this deployment until the block ends; its store and log are in the folder.

    `sabotage` is Python that the process runs first: how controls take a guard away.
    """
    path, store, log = folder / "deployment.yaml", folder / "server.db", folder / "server.log"
    path.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    start = ["-c", f"{sabotage}\n{_MAIN}"] if sabotage else ["-m", "tokenmill"]
    command = [sys.executable, *start, "serve", str(path), "--port", "0", "--store", str(store)]
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [*command, "--json"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(env or {})},
        )
    try:
        url = _url(process, log)
        yield Server(process=process, url=url, port=int(url.rpartition(":")[2]), store=store, log=log)
    finally:
        _end(process)


def _url(process: "subprocess.Popen[str]", log: Path) -> str:
    """Where it listens, once it says so."""
    assert process.stdout is not None
    data, deadline = b"", time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        if select.select([process.stdout], [], [], 0.1)[0]:
            data += os.read(process.stdout.fileno(), 4096)
            with contextlib.suppress(ValueError, KeyError):
                return str(json.loads(data)["url"])
    raise RuntimeError(f"the server did not start: {data!r} {log.read_text(encoding='utf-8')[-800:]}")


def _end(process: "subprocess.Popen[str]") -> None:
    """SIGTERM, and SIGKILL if that is not enough."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40.0)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
