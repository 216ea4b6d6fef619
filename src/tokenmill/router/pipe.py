"""Pieces from the task that makes them to the one that reads them: bounded, in order, with one end."""

import asyncio
from collections import deque
from typing import Final

from tokenmill.core import TokenmillError
from tokenmill.wire import Piece

__all__ = ["Pipe"]

_MAX_PIECES: Final = 64


class Pipe:
    """One writer, one reader, one event loop. A writer waits while the reader is far behind."""

    def __init__(self) -> None:
        self.is_full = False
        self._pieces: deque[Piece] = deque()
        self._is_ended = self._is_left = False
        self._error: TokenmillError | None = None
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()

    async def put(self, piece: Piece) -> None:
        """Pass a piece on. Once the reader has left, nothing is kept."""
        while len(self._pieces) >= _MAX_PIECES and not self._is_left:
            self.is_full = True
            self._taken.clear()
            await self._taken.wait()
        self.is_full = False
        if not self._is_left:
            self._pieces.append(piece)
            self._arrived.set()

    def leave(self) -> None:
        """The reader wants no more."""
        self._is_left = True
        self._taken.set()

    def end(self, error: TokenmillError | None = None) -> None:
        """Nothing follows; the reader gets this error after the pieces that were passed on."""
        self._is_ended = True
        self._error = error
        self._arrived.set()

    async def get(self) -> Piece | None:
        """The next piece, None at the end. Raises the error."""
        while not self._pieces:
            if self._is_ended:
                if self._error is not None:
                    raise self._error
                return None
            self._arrived.clear()
            await self._arrived.wait()
        piece = self._pieces.popleft()
        self._taken.set()
        return piece
