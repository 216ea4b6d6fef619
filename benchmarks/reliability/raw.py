"""HTTP written by hand, for what no client would send: bytes to a server on loopback, and what came back."""

import asyncio
import contextlib
from dataclasses import dataclass

__all__ = ["Came", "body_of", "exchange", "post", "status_of"]

_MOST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Came:
    """What a server sent, and whether it then closed the connection."""

    data: bytes
    closed: bool

    @property
    def statuses(self) -> list[int]:
        """The status of each answer in it."""
        lines = [part[:3] for part in self.data.split(b"HTTP/1.1 ")[1:]]
        return [int(line) for line in lines if line.isdigit()]


async def exchange(port: int, data: bytes, *, wait_s: float = 0.5, host: str = "127.0.0.1") -> Came:
    """Send bytes on a connection of their own, and read until it is closed or silent for so long."""
    came, closed = b"", False
    reader, writer = await asyncio.open_connection(host, port)
    with contextlib.suppress(ConnectionError):
        sending = asyncio.create_task(_send(writer, data))
        try:
            while len(came) < _MOST_BYTES and not _is_whole(came, data.startswith(b"HEAD")):
                more = await asyncio.wait_for(reader.read(65536), wait_s)
                if not more:
                    closed = True
                    break
                came += more
        except TimeoutError:
            pass
        except ConnectionError:
            closed = True
        finally:
            sending.cancel()
            writer.close()
            with contextlib.suppress(asyncio.CancelledError):
                await sending
            await writer.wait_closed()
    return Came(data=came, closed=closed)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        for at in range(0, len(data), 65536):
            writer.write(data[at : at + 65536])
            await writer.drain()


def post(path: str, body: bytes, headers: str = "", *, host: str = "localhost") -> bytes:
    """A whole request. `headers` are lines that end with CR LF."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode("latin-1") + body


def status_of(came: bytes) -> int:
    """The status of the first answer, 0 without one."""
    words = came[:16].split(b" ")
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


def body_of(came: bytes) -> bytes:
    """What follows the first head."""
    return came.partition(b"\r\n\r\n")[2]


def _is_whole(came: bytes, is_head: bool) -> bool:
    """Whether one answer is there as a whole, after which the connection stays open."""
    head, found, body = came.partition(b"\r\n\r\n")
    if not found or b"connection: close" in head:
        return False
    if is_head:
        return True
    at = head.lower().find(b"content-length: ")
    if at < 0:
        return came.endswith(b"0\r\n\r\n")
    return len(body) >= int(head[at + 16 :].split(b"\r\n")[0])
