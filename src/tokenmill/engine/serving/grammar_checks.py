"""Compiles the grammars of new requests beside the step loop, so that no stream waits for a stranger's one.

A few threads, started at the first grammar, take what waits in order of arrival. What waits and what one
compilation may take is bounded, so a request knows soon that it comes too late. The step loop puts, drops
and collects; it never waits. Requests, their cancellation and their deadlines are its own affair.
"""

import threading
import traceback
from collections.abc import Callable
from typing import NamedTuple

from tokenmill.core import Grammar, ResourceError, TokenmillError
from tokenmill.engine.structured.grammar import CheckedGrammar

__all__ = ["GrammarChecks", "GrammarVerdict"]

_NUM_THREADS = 2
_MAX_WAITING = 64


class GrammarVerdict(NamedTuple):
    """What came of the check with this key: the grammar, or why it is refused."""

    key: int
    found: CheckedGrammar | TokenmillError


class GrammarChecks:
    """Runs `check(grammar, tenant)` in threads. Its own methods are for one thread."""

    def __init__(self, check: Callable[[Grammar, str], CheckedGrammar]) -> None:
        self._check = check
        self._changed = threading.Condition()
        self._waiting: dict[int, tuple[Grammar, str]] = {}
        self._verdicts: list[GrammarVerdict] = []
        self._threads: list[threading.Thread] = []
        self._closed = False

    def put(self, key: int, grammar: Grammar, tenant: str) -> None:
        """Queue a check. Raises ResourceError if too many wait."""
        with self._changed:
            if len(self._waiting) >= _MAX_WAITING:
                raise ResourceError(f"{_MAX_WAITING} grammars wait to be compiled", hint="try again later")
            self._waiting[key] = (grammar, tenant)
            self._changed.notify()
        if len(self._threads) < _NUM_THREADS:
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()

    def drop(self, key: int) -> None:
        """Nobody wants this any longer. If it has begun it goes on, and its verdict comes."""
        with self._changed:
            self._waiting.pop(key, None)

    def collect(self) -> list[GrammarVerdict]:
        """The verdicts since the last call."""
        with self._changed:
            verdicts, self._verdicts = self._verdicts, []
        return verdicts

    def close(self) -> None:
        """Begin nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                key = next(iter(self._waiting))
                grammar, tenant = self._waiting.pop(key)
            found: CheckedGrammar | TokenmillError
            try:
                found = self._check(grammar, tenant)
            except TokenmillError as error:
                found = error
            except Exception as error:
                traceback.print_exc()
                found = TokenmillError(f"the engine failed to check the grammar ({error!r})")
            with self._changed:
                self._verdicts.append(GrammarVerdict(key, found))
