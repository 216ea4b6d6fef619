"""Frames of nonsense for the engine process: what it must refuse, survive, or end at, and nothing else.

Frames are made from sound messages by hostile values in their fields and by changed bytes. The messages'
reader must refuse a frame with ValueError or UsageError, or take it. What it takes is sent to one engine
process, which has to answer every request once. What it refuses ends a process by its own will (exit code 1,
within seconds), which is tried on some of them.
"""

import copy
import math
import os
import random
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from tokenmill.core import Request, SamplingParams, UsageError
from tokenmill.engine import LLMConfig
from tokenmill.engine.mock import MockScript
from tokenmill.engine.serving.messages import (
    Cancel,
    End,
    EngineSpec,
    FrameReader,
    FromEngine,
    Ready,
    Refused,
    Start,
    Submit,
    ToEngine,
    decode_from_engine,
    encode,
)

__all__ = ["Engine", "fuzz_frames", "hostile_frame", "naive_decode"]

_BATCH = 64
_PATIENCE_S = 30.0
_SPEC = EngineSpec(mock=MockScript(context_length=64), config=LLMConfig(max_batch=16, kv_tokens=4096))
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, -0.0, 1e308),
    *(math.nan, math.inf, -math.inf),
    *("", "x", "\x00", "\ud7ff", "x" * 70_000, b"", b"\xff", [], [[]], [1, "x"], [2**40], {}),
    *({"a": 1}, [None] * 3000),
)  # fmt: skip


def fuzz_frames(
    count: int, seed: int, num_endings: int, decode: Callable[[bytes], ToEngine]
) -> tuple[list[str], Counter[str]]:
    """Try `count` frames; `num_endings` of those that are refused end a process. Returns what went wrong."""
    rng = random.Random(seed)
    found: list[str] = []
    counts: Counter[str] = Counter()
    taken: list[ToEngine] = []
    refused: list[bytes] = []
    for _ in range(count):
        body = hostile_frame(rng)
        try:
            taken.append(decode(body))
        except (ValueError, UsageError):
            refused.append(body)
        except BaseException as error:
            found.append(f"{type(error).__name__} at {body[:80]!r}")
    counts |= {"frames taken": len(taken), "frames refused": len(refused)}
    if found:  # a reader that fails has nothing to offer to an engine
        return found, counts
    found += _serve(taken, counts)
    for body in rng.sample(refused, min(num_endings, len(refused))):
        found += _end_at(body)
        counts["processes ended"] += 1
    return found, counts


def hostile_frame(rng: random.Random) -> bytes:
    """The body of a frame: a message with a few hostile fields, or with a few other bytes."""
    params = SamplingParams(
        max_tokens=rng.choice((1, 4, 90)), stop=("x",), logit_bias=((1, -2.0),), seed=rng.randrange(9)
    )
    request = Request(
        request_id="a", prompt=(1, 2, 3), params=params, tenant="t", timeout_s=rng.choice((None, 5.0))
    )
    message: ToEngine = rng.choice(
        (Submit(key=7, request=request), Submit(key=8, request=request), Cancel(key=7))
    )
    value = copy.deepcopy(msgspec.to_builtins(message))
    for _ in range(rng.choice((0, 1, 1, 2))):
        _spoil(value, rng)
    body = bytearray(msgspec.msgpack.encode(value))
    if rng.random() < 0.3:
        for _ in range(rng.randrange(1, 5)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        del body[rng.choice((len(body), rng.randrange(1, len(body) + 1))) :]
        body += rng.randbytes(rng.choice((0, 0, 2)))
    return bytes(body)


def _spoil(value: dict[str, Any], rng: random.Random) -> None:
    """Change, remove or add one field somewhere inside."""
    places: list[dict[str, Any]] = [value]
    for place in places:
        places += [each for each in place.values() if isinstance(each, dict)]
    place = rng.choice(places)
    key = rng.choice((*place, "evil"))
    if rng.random() < 0.1:
        place.pop(key, None)
    else:
        place[key] = copy.deepcopy(rng.choice(_VALUES))


class Engine:
    """A real engine process with a mock model, and our end of its socket. A context manager."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        module = "tokenmill.engine.serving.process"
        with theirs:
            self.child = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._reader = FrameReader()
        self.socket.sendall(encode(Start(spec=_SPEC, beat_s=0.5)))
        assert any(isinstance(each, Ready) for each in self.receive())

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        try:
            self.child.wait(5.0)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()

    def receive(self) -> list[FromEngine]:
        """The next messages; [] at the end of the stream, or when nothing comes for long."""
        is_ready, _, _ = select.select([self.socket], [], [], _PATIENCE_S)
        try:
            data = self.socket.recv(1 << 20) if is_ready else b""
        except ConnectionError:
            data = b""
        return [decode_from_engine(frame) for frame in self._reader.feed(data)] if data else []


def _serve(messages: Sequence[ToEngine], counts: Counter[str]) -> list[str]:
    """Send what was taken to one process; every request is answered, and the process lives."""
    requests = [each.request for each in messages if isinstance(each, Submit)]
    with Engine() as engine:
        for first in range(0, len(requests), _BATCH):
            batch = dict(enumerate(requests[first : first + _BATCH], start=first))
            data = b"".join(encode(Submit(key=key, request=each)) for key, each in batch.items())
            cancels = b"".join(encode(Cancel(key=key)) for key in (*batch, 1 << 62))
            engine.socket.sendall(data + cancels)
            if lost := _missing(engine, {key: each.params.n for key, each in batch.items()}, counts):
                first_lost = f"exit code {engine.child.poll()}: {requests[min(lost)]}"[:400]
                return [f"{len(lost)} requests were not answered, {first_lost}"]
    return []


def _missing(engine: Engine, awaited: dict[int, int], counts: Counter[str]) -> dict[int, int]:
    """The keys that are not answered: by a refusal, or by the end of each completion."""
    deadline = time.monotonic() + _PATIENCE_S
    while awaited and time.monotonic() < deadline:
        news = engine.receive()
        if not news:
            break
        for each in news:
            if isinstance(each, Refused):
                awaited.pop(each.key, None)
                counts["requests refused"] += 1
            elif isinstance(each, End):
                counts["requests ended"] += 1
                awaited[each.key] -= 1
                if not awaited[each.key]:
                    del awaited[each.key]
    return awaited


def _end_at(body: bytes) -> list[str]:
    """Whether a process ends by itself, with exit code 1, at a frame that is none."""
    with Engine() as engine:
        engine.socket.sendall(len(body).to_bytes(4, "little") + body)
        while engine.receive():
            pass
        try:
            code = engine.child.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            return [f"did not end at {body[:80]!r}"]
    return [] if code == 1 else [f"ended with {code} at {body[:80]!r}"]


def naive_decode(body: bytes) -> ToEngine:
    """The control: believes what it is sent."""
    value = msgspec.msgpack.decode(body)
    kinds: dict[str, Any] = {"Submit": Submit, "Cancel": Cancel}
    message: ToEngine = kinds[value.pop("type")](**value)
    return message
