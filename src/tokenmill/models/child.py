"""A child process that serves over its standard streams, a line for a line: to ask it, to end it.

Every wait is bounded. What the child is and what it may do is the business of whoever starts it.
"""

import contextlib
import json
import os
import selectors
import subprocess
import time
from typing import Any, Final

__all__ = ["end_child", "exchange"]

_PIECE_BYTES: Final = 1 << 16
_MAX_ANSWER_BYTES: Final = 256 << 20


def exchange(
    child: "subprocess.Popen[bytes]", request: bytes, seconds: float, *, max_bytes: int = _MAX_ANSWER_BYTES
) -> dict[str, Any] | None:
    """Send a line and receive one, a JSON object, within `seconds` together.

    None if the child ended, is late, or answers with something else. It is then of no more use.
    """
    assert child.stdin is not None and child.stdout is not None
    deadline = time.monotonic() + seconds
    unsent, received = memoryview(request), bytearray()
    os.set_blocking(child.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector, contextlib.suppress(OSError, ValueError):
        selector.register(child.stdin, selectors.EVENT_WRITE)
        selector.register(child.stdout, selectors.EVENT_READ)
        while not received.endswith(b"\n"):
            ready = [key.fileobj for key, _ in selector.select(max(0.0, deadline - time.monotonic()))]
            if not ready or len(received) > max_bytes:
                return None
            if child.stdin in ready:
                unsent = unsent[os.write(child.stdin.fileno(), unsent[:_PIECE_BYTES]) :]
                if not unsent:
                    selector.unregister(child.stdin)
            if child.stdout in ready:
                piece = os.read(child.stdout.fileno(), _PIECE_BYTES)
                if not piece:
                    return None
                received += piece
        answer = json.loads(received)
        return answer if isinstance(answer, dict) else None
    return None


def end_child(child: "subprocess.Popen[bytes]") -> None:
    """Kill a child, close its streams and wait for it."""
    child.kill()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # bytes that the dead child will not read
                stream.close()
    child.wait()
