"""What a client hears of a call, and whether that is honest: a whole answer, an error that says so, or a
connection that visibly broke. An answer that just ends in the middle is none of these.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.reliability.client import connect

__all__ = ["Ended", "Heard", "Probe", "hear", "percentile", "watch"]

Ended = Literal["whole", "error", "refused", "absent", "broken", "truncated", "late"]
"""`absent`: nobody listened. `broken`: the connection ended before the answer did, as every client notices.
`truncated`: the HTTP answer is complete, but the stream in it is not, and no error says so."""


@dataclass(frozen=True, kw_only=True)
class Heard:
    """One call: how it ended, its status and id, when its first event came, the longest silence after it."""

    ended: Ended
    status: int = 0
    request_id: str = ""
    ttft_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    total_s: float = 0.0


async def hear(
    port: int,
    value: Mapping[str, Any],
    path: str = "/v1/completions",
    *,
    timeout_s: float = 60.0,
    on_first: Callable[[], None] = lambda: None,
) -> Heard:
    """Ask, and read to the end."""
    begun_s = time.perf_counter()
    last_s, status, name = begun_s, 0, ""
    ttft_s, gaps, body = 0.0, list[float](), b""
    ended: Ended = "absent"
    try:
        async with asyncio.timeout(timeout_s), connect(port) as connection:
            ended = "broken"
            connection.send("POST", path, json.dumps(value).encode())
            status, headers = await connection.head()
            name = headers.get("x-request-id") or headers.get("request-id", "")
            async for piece in connection.pieces(headers):
                now_s = time.perf_counter()
                if not ttft_s and not piece.startswith(b":"):
                    ttft_s = now_s - begun_s
                    on_first()
                elif ttft_s:
                    gaps.append(now_s - last_s)
                last_s, body = now_s, (body + piece)[-65536:]
            ended = _ended(status, body, bool(value.get("stream")))
    except TimeoutError:
        ended = "late"
    except (OSError, EOFError, ValueError):
        pass
    return Heard(
        ended=ended,
        status=status,
        request_id=name,
        ttft_s=ttft_s,
        gaps_s=tuple(gaps),
        total_s=time.perf_counter() - begun_s,
    )


def _ended(status: int, body: bytes, is_stream: bool) -> Ended:
    """What a body that came as a whole says of its end."""
    if status != 200:
        with contextlib.suppress(ValueError):
            return "refused" if "error" in json.loads(body) else "truncated"
        return "truncated"
    if not is_stream:
        with contextlib.suppress(ValueError):
            return "whole" if "usage" in json.loads(body) else "truncated"
        return "truncated"
    if body.endswith(b"data: [DONE]\n\n"):
        return "error" if b'\ndata: {"error"' in b"\n" + body else "whole"
    if b'"message_stop"' in body[-200:]:
        return "whole"
    return "error" if b'"error"' in body[-2000:] else "truncated"


@dataclass(kw_only=True)
class Probe:
    """What /health/ready and /health/live said, and when: (seconds, status, seconds that it took)."""

    ready: list[tuple[float, int, float]] = field(default_factory=list)
    live: list[tuple[float, int, float]] = field(default_factory=list)

    def first(self, status: int, since_s: float) -> float | None:
        """Seconds from then until ready first said this; any other status than 200 counts as 503."""
        for at_s, said, _ in self.ready:
            if at_s >= since_s and (said == 200) == (status == 200):
                return at_s - since_s
        return None


async def watch(port: int, probe: Probe, *, every_s: float = 0.05) -> None:
    """Ask both again and again, until cancelled. A probe without an answer in 1 s has the status 0."""
    while True:
        for path, said in (("/health/ready", probe.ready), ("/health/live", probe.live)):
            begun_s = time.perf_counter()
            status = 0
            with contextlib.suppress(OSError, EOFError, ValueError):
                async with asyncio.timeout(1.0), connect(port) as connection:
                    connection.send("GET", path)
                    status, headers = await connection.head()
                    async for _ in connection.pieces(headers):
                        pass
            now_s = time.perf_counter()
            said.append((now_s, status, now_s - begun_s))
        await asyncio.sleep(every_s)


def percentile(values: list[float], share: float) -> float:
    """The value that so large a share does not exceed; 0 of none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0
