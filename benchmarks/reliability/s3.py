"""S3: thousands of clients that send or read too slowly, beside one that does neither.

    python -m benchmarks.reliability.s3 [--cases 6000] [--seed 1] [--guard off]

Five of six cases send a request one byte a second, the others ask for pages or a stream and take nothing of
it, all from raw sockets, opened at 150 a second. Beside them a good client, in a process of its own, asks
20 times a second, before and during. Checked: the good client's p99 at most twice that without slow ones,
no error for it, every slow sender closed 30 s after it came, every slow reader 30 s after what it left
filled the buffers. Without the guard a request and a reader have an hour.
"""

import asyncio
import contextlib
import json
import math
import resource
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.reliability import command
from benchmarks.reliability.raw import exchange, post
from benchmarks.reliability.server import Server, deployment, running
from scripts.scorecard import Line

__all__ = ["main", "run"]

_OPENED_PER_S: Final = 150
_LIMIT_S: Final = 30.0
_SLACK_S: Final = 1.0
_GOOD_PER_S: Final = 20
_ALONE_S: Final = 15.0
_READERS: Final = 6
"""Every sixth is a reader."""
_READER_S: Final = 15.0
"""So long a reader's call may take to fill what the system keeps, after which its time begins."""
_MODULE: Final = "benchmarks.reliability.s3"


def _chat(**more: object) -> bytes:
    body = {"model": "mock", "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, **more}
    return post("/v1/chat/completions", json.dumps(body).encode())


_QUESTION: Final = _chat(max_tokens=4)
_STREAM: Final = _chat(max_tokens=40, stream=True, logprobs=True, top_logprobs=20)
"""Some 75 kB."""
_PAGES: Final = b"GET /dashboard/app.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 12
_BEGINNING: Final = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: "
_STREAMS: Final = 60
"""Every sixtieth client asks for a stream, other readers for pages, which take nothing of the engine."""


@dataclass
class _Slow:
    """Slow clients in one thread: how old each was, in seconds, when the server closed it."""

    port: int
    num: int
    ages_s: dict[str, list[float]] = field(default_factory=lambda: {"sender": [], "reader": []})
    num_refused: int = 0

    def __post_init__(self) -> None:
        self._open: dict[int, tuple[socket.socket, str, float]] = {}
        self._poll = select.epoll()

    @property
    def num_open(self) -> int:
        """How many hold a connection."""
        return len(self._open)

    def run(self, stop: threading.Event) -> None:
        """Open all, drip, and watch until all are closed or it is told to stop."""
        begun = last = time.monotonic()
        opened = 0
        while not stop.is_set() and (opened < self.num or self._open):
            now = time.monotonic()
            while opened < min(self.num, (now - begun) * _OPENED_PER_S):
                kind = "sender" if opened % _READERS else "reader"
                self._enter(kind, _PAGES if opened % _STREAMS else _STREAM)
                opened += 1
            if now - last >= 1.0:
                last = now
                self._drip()
            for number, _ in self._poll.poll(0.02):
                self._look(number)
        for client, _, _ in self._open.values():
            client.close()
        self._poll.close()

    def _enter(self, kind: str, asked: bytes) -> None:
        client = socket.socket()
        if kind == "reader":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            client.connect(("127.0.0.1", self.port))
            client.sendall(asked if kind == "reader" else _BEGINNING)
        except OSError:
            self.num_refused += 1
            client.close()
            return
        client.setblocking(False)
        self._open[client.fileno()] = (client, kind, time.monotonic())
        # A reader takes nothing, and is only told of the end of its connection.
        self._poll.register(client, 0 if kind == "reader" else select.EPOLLIN)

    def _drip(self) -> None:
        """One byte of each sender."""
        for client, kind, _ in self._open.values():
            if kind == "sender":
                with contextlib.suppress(OSError):
                    client.send(b"X")

    def _look(self, number: int) -> None:
        client, kind, since_s = self._open[number]
        with contextlib.suppress(BlockingIOError):
            if kind == "sender":
                with contextlib.suppress(ConnectionError):
                    if client.recv(4096):
                        return
            self.ages_s[kind].append(time.monotonic() - since_s)
            self._poll.unregister(client)
            del self._open[number]
            client.close()


async def _good(port: int, seconds: float, stop: threading.Event, taken_s: list[float]) -> list[str]:
    """Ask at a fixed rate, whether or not answers come; seconds of each from when it was due."""
    faults, asking = list[str](), set[asyncio.Task[None]]()

    async def ask(due_s: float) -> None:
        came = await exchange(port, _QUESTION, wait_s=10.0)
        taken_s.append(time.monotonic() - due_s)
        if came.statuses != [200]:
            faults.append(f"the good client got {came.statuses}")

    begun, number = time.monotonic(), 0
    while (due_s := begun + number / _GOOD_PER_S) < begun + seconds and not stop.is_set():
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        task = asyncio.create_task(ask(due_s))
        asking.add(task)
        task.add_done_callback(asking.discard)
        number += 1
    await asyncio.gather(*asking)
    return faults


def _ask(port: int, seconds: float) -> None:
    """As a process of its own: ask, and print what it took."""
    taken_s: list[float] = []
    faults = asyncio.run(_good(port, seconds, threading.Event(), taken_s))
    print(json.dumps({"faults": faults, "taken_s": taken_s}))


def _good_client(port: int, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", __name__.replace("__main__", _MODULE), "--ask", str(port), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _answers(process: "subprocess.Popen[str]") -> tuple[list[str], list[float]]:
    found = json.loads(process.communicate()[0])
    return found["faults"], sorted(found["taken_s"])


def _p99(values: list[float]) -> float:
    return values[max(0, math.ceil(0.99 * len(values)) - 1)]


def _measure(server: Server, cases: int, limit_s: float) -> tuple[list[str], dict[str, float | int | str]]:
    during_s = cases / _OPENED_PER_S + limit_s + 8.0
    faults, alone = _answers(_good_client(server.port, _ALONE_S))
    slow, stop, most = _Slow(server.port, cases), threading.Event(), 0
    thread = threading.Thread(target=slow.run, args=(stop,))
    good = _good_client(server.port, during_s)
    thread.start()
    until = time.monotonic() + during_s
    while time.monotonic() < until:
        most = max(most, slow.num_open)
        time.sleep(0.2)
    left = slow.num_open
    stop.set()
    thread.join()
    more, beside = _answers(good)
    faults += more
    for kind, ages_s in slow.ages_s.items():
        if kind == "sender" and ages_s and min(ages_s) < limit_s / 2:
            faults.append(f"a sender was refused after {min(ages_s):.1f} s: it was not slow")
        if ages_s and max(ages_s) > limit_s + (_SLACK_S if kind == "sender" else _READER_S):
            faults.append(f"a {kind} was held for {max(ages_s):.1f} s")
    if left or slow.num_refused:
        faults.append(f"{left} slow ones are still held, {slow.num_refused} were refused")
    if _p99(beside) > 2 * _p99(alone):
        faults.append("the good client's p99 is over twice that of before")
    return faults, {
        "held at once, most": most,
        "senders cut, and after s at most": _shown(slow.ages_s["sender"]),
        "readers cut, and after s at most": _shown(slow.ages_s["reader"]),
        "good client's answers": len(beside),
        "its p99 before and beside them, ms": f"{_p99(alone) * 1e3:.1f} {_p99(beside) * 1e3:.1f}",
        "its p50 before and beside them, ms": f"{statistics.median(alone) * 1e3:.1f} "
        f"{statistics.median(beside) * 1e3:.1f}",
    }


def _shown(ages_s: list[float]) -> str:
    return f"{len(ages_s)} {max(ages_s):.1f}" if ages_s else "0"


def run(*, cases: int, seed: int, guard: bool, limit_s: float = _LIMIT_S) -> Line:
    """Hold so many. Nothing is drawn at random: the seed is of the other lines."""
    began = time.monotonic()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limits = {name: limit_s if guard else 3600.0 for name in ("receive_s", "write_s")}
    http = {"limits": limits, "max_calls": 4096}
    engine = {"max_batch": 64, "kv_tokens": 1 << 17}
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            running(deployment(mock={}, http=http, engine=engine), Path(folder)) as server,
        ):
            asyncio.run(exchange(server.port, _QUESTION, wait_s=5.0))
            faults, figures = _measure(server, cases, limit_s)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return Line(
        name="s3",
        what="clients that send a byte a second, or take nothing of an answer, beside a good one",
        cases=cases,
        violations=len(faults),
        seconds=time.monotonic() - began,
        figures={**figures, **{f"fault {at}": fault for at, fault in enumerate(faults[:5])}},
    )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--ask"]:
        _ask(int(given[1]), float(given[2]))
        return 0
    return command.main("s3", run, 6000, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
