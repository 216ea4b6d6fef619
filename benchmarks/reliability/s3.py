"""S3: thousands of clients that send or read too slowly, beside one that does neither.

    python -m benchmarks.reliability.s3 [--cases 6000] [--seed 1] [--guard off]

Five of six cases send a request one byte a second, the others ask for a long stream and take nothing of it, all
from raw sockets, opened at 250 a second. Beside them a good client asks 20 times a second, on connections of its
own, before and during. Checked: the good client's p99 at most twice that without slow ones, no error for it, every
slow sender closed 30 s after it came, every slow reader 30 s after it took nothing more, and all calls ended.
Without the guard a request and a reader have an hour.
"""

import asyncio
import contextlib
import json
import math
import random
import resource
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.reliability.raw import exchange, post
from benchmarks.reliability.report import run_line
from benchmarks.reliability.server import Server, deployment, running
from scripts.scorecard import Line

__all__ = ["main", "run"]

_OPENED_PER_S: Final = 250
_LIMIT_S: Final = 30.0
_SLACK_S: Final = 1.0
_GOOD_PER_S: Final = 20
_ALONE_S: Final = 15.0
_READERS: Final = 6
"""Every sixth is a reader."""


@dataclass
class _Slow:
    """Slow clients in one thread, with one selector: when each came, and when it was closed."""

    port: int
    num_senders: int
    num_readers: int
    ages_s: list[float] = field(default_factory=list)
    num_open: int = 0
    num_refused: int = 0

    def run(self, stop: threading.Event) -> None:
        """Open all, drip, and watch until all are closed or it is told to stop."""
        with selectors.DefaultSelector() as selector:
            waiting = [at % _READERS == 0 for at in range(self.num_senders + self.num_readers)]
            begun = last = time.monotonic()
            opened = 0
            while not stop.is_set() and (opened < len(waiting) or self.num_open):
                now = time.monotonic()
                while opened < min(len(waiting), (now - begun) * _OPENED_PER_S):
                    self._open(selector, waiting[opened], now)
                    opened += 1
                if now - last >= 1.0:
                    last = now
                    self._drip(selector)
                for key, _ in selector.select(0.02):
                    self._read(selector, key)
            for key in list(selector.get_map().values()):
                self._close(selector, key, was_cut=False)

    def _open(self, selector: selectors.BaseSelector, is_reader: bool, now: float) -> None:
        client = socket.socket()
        if is_reader:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            client.connect(("127.0.0.1", self.port))
        except OSError:
            self.num_refused += 1
            client.close()
            return
        body = {"model": "mock", "prompt": "slow", "max_tokens": 600, "stream": True, "n": 8, "ignore_eos": True}
        if is_reader:
            client.sendall(post("/v1/completions", json.dumps(body).encode()))
        else:
            client.sendall(b"P")
        client.setblocking(False)
        self.num_open += 1
        # A reader is not asked for what it could read, but for the end of its connection.
        selector.register(client, selectors.EVENT_READ, (now, is_reader))

    def _drip(self, selector: selectors.BaseSelector) -> None:
        """One byte of each sender; of a reader, whether it still has a connection."""
        for key in list(selector.get_map().values()):
            client, (_, is_reader) = key.fileobj, key.data
            assert isinstance(client, socket.socket)
            if is_reader:
                if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    self._close(selector, key, was_cut=True)
                continue
            with contextlib.suppress(OSError):
                client.send(b"X")

    def _read(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        client, (_, is_reader) = key.fileobj, key.data
        assert isinstance(client, socket.socket)
        if is_reader:
            selector.modify(client, 0 or selectors.EVENT_WRITE, key.data)
            return
        try:
            if client.recv(4096):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._close(selector, key, was_cut=True)

    def _close(self, selector: selectors.BaseSelector, key: selectors.SelectorKey, *, was_cut: bool) -> None:
        client = key.fileobj
        assert isinstance(client, socket.socket)
        if was_cut:
            self.ages_s.append(time.monotonic() - key.data[0])
        selector.unregister(client)
        client.close()
        self.num_open -= 1
