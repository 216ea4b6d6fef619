"""The engine process: one thread steps the engine, and reads its socket between two steps.

    python -m tokenmill.engine.serving.process FD PARENT_PID        started by `supervisor.py`, not by hand

It owns the model, the cache and nothing else: whatever must survive its death is kept by the front end. So
it never repairs itself. The engine fails a request that makes a step raise; any other exception, an account
of blocks that does not add up, a message that is none: it prints why and ends, and the supervisor starts
another.

Grammars that are not known yet are compiled in other threads (`grammar_checks.py`); until then a request
waits here. One more thread sends beats. They say that the process is alive, and carry the step counter and
the counts of the last step; whether the engine makes progress is for the front end to judge.

It ends with its parent, at once: the kernel kills it, and the socket closes. SIGTERM drains it.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from tokenmill.core import Request, ResourceError, TokenmillError
from tokenmill.costs.power import Unmeasured, find_counters
from tokenmill.engine.local import LocalEngine, guide
from tokenmill.engine.mock import MockModel
from tokenmill.engine.sequence import GenerationState
from tokenmill.engine.serving.embeddings import EmbeddingJobs
from tokenmill.engine.serving.grammar_checks import GrammarChecks
from tokenmill.engine.serving.messages import (
    Advance,
    Beat,
    Cancel,
    Draining,
    Embed,
    Embedded,
    End,
    EngineSpec,
    FrameReader,
    FromEngine,
    Ready,
    Refused,
    Start,
    StartFailed,
    Submit,
    ToEngine,
    decode_to_engine,
    encode,
)
from tokenmill.engine.structured.grammar import CheckedGrammar
from tokenmill.models.store.directory import ModelDirectory

__all__ = ["EngineServer", "Link", "main", "open_engine"]

_READ_BYTES = 1 << 18
_CHECK_POLL_S = 0.002
_PR_SET_PDEATHSIG = 1


class Link:
    """The process's end of the socket. Sending is safe from two threads; receiving is for one."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._reader = FrameReader()
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, messages: Sequence[FromEngine]) -> None:
        """Send messages, waiting while the front end does not read. One that is too long ends its request."""
        data = b"".join(map(_frame, messages))
        with self._lock:
            self._socket.sendall(data)

    def receive(self, timeout_s: float) -> list[ToEngine]:
        """The messages that are there, or that come within the timeout.

        Raises EOFError when the front end has closed its end, ValueError if it speaks nonsense.
        """
        if not self._poll.poll(1000 * timeout_s):
            return []
        data = self._socket.recv(_READ_BYTES)
        if not data:
            raise EOFError
        return [decode_to_engine(frame) for frame in self._reader.feed(data)]


@dataclass(eq=False)
class _Open:
    """A completion whose end was not sent yet: whose it is, where it comes from, tokens that are told."""

    key: int
    state: GenerationState
    num_told: int

    def news(self) -> Iterator[FromEngine]:
        """What it gained since the last time, then its end."""
        state = self.state
        self.num_told = len(state.tokens)
        delta = state.take()
        if delta.token_ids or delta.text:
            yield Advance(
                key=self.key,
                index=state.index,
                text=delta.text,
                token_ids=delta.token_ids,
                logprobs=delta.logprobs,
            )
        if state.finished:
            yield End(key=self.key, completion=state.completion(), charge=state.charge)


class EngineServer:
    """Serves one engine over one link until it is told to end, or the front end is gone."""

    def __init__(self, engine: LocalEngine, link: Link, *, beat_s: float, drain_s: float) -> None:
        self._engine = engine
        self._link = link
        self._beat_s = beat_s
        self._drain_s = drain_s
        self._open: dict[int, list[_Open]] = {}
        self._beat = Beat()
        self._embeddings = EmbeddingJobs(engine)
        self._checks = GrammarChecks(engine.check_grammar)
        self._checking: dict[int, tuple[GenerationState, ...]] = {}
        self._tiers_at = 0.0
        self._running_by_tier, self._waiting_by_tier = engine.by_tier()
        self._num_steps = 0
        self._num_pauses = 0
        self._told_to_end = False
        self._ends_at: float | None = None

    def tell_to_end(self) -> None:
        """Drain, then end. Safe to call from a signal handler."""
        self._told_to_end = True

    def run(self) -> None:
        """Serve. Returns when drained; raises EOFError when the front end is gone."""
        self._count()
        stop = threading.Event()
        beats = threading.Thread(target=self._send_beats, args=(stop,), daemon=True)
        beats.start()
        try:
            while not self._drained():
                for message in self._link.receive(self._patience()):
                    self._take(message)
                self._take_checked()
                if self._engine.has_work:
                    self._engine.step()
                    self._num_steps += 1
                elif self._checking:
                    self._num_pauses += 1
                self._report()
        finally:
            self._checks.close()
            stop.set()
            beats.join(1.0)

    @property
    def _has_work(self) -> bool:
        return self._engine.has_work or bool(self._checking)

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Submit | Embed) and self._ends_at is not None:
            self._link.send([Refused(key=message.key, kind="", message="", hint="", again=True)])
        elif isinstance(message, Submit):
            self._submit(message.key, message.request)
        elif isinstance(message, Embed):
            with self._refusing(message.key):
                self._embeddings.put(message.key, message.request)
        elif isinstance(message, Cancel):
            self._embeddings.cancel(message.key)
            for each in self._open.get(message.key, ()):
                self._engine.abort(each.state)
        else:
            raise ValueError("a second Start")

    def _patience(self) -> float:
        """Seconds to wait for a message when none is there."""
        if self._engine.has_work:
            return 0.0
        return _CHECK_POLL_S if self._checking else self._beat_s

    def _submit(self, key: int, request: Request) -> None:
        with self._refusing(key):
            states = self._engine.prepare_unguided(request)
            grammar = request.params.grammar
            found = None if grammar is None else self._engine.find_grammar(grammar, request.tenant)
            if grammar is None or found is not None:
                self._begin(states, found)
            else:
                self._checks.put(key, grammar, request.tenant)
                self._checking[key] = states
            self._open[key] = [_Open(key, state, len(state.tokens)) for state in states]

    def _begin(self, states: tuple[GenerationState, ...], grammar: CheckedGrammar | None) -> None:
        if grammar is not None:
            guide(states, grammar)
        self._engine.submit_state(states[0])

    def _take_checked(self) -> None:
        """Submit what had its grammar checked, or refuse it; forget who was cancelled or is too late."""
        for key, found in self._checks.collect():
            states = self._checking.pop(key, ())
            if not states or states[0].finished:
                continue
            with self._refusing(key):
                if isinstance(found, TokenmillError):
                    raise found
                self._begin(states, found)
        for key, states in list(self._checking.items()):
            if self._engine.is_late(states[0]):
                self._engine.abort(states[0], "expired")
            if states[0].finished:
                self._checks.drop(key)
                del self._checking[key]

    @contextlib.contextmanager
    def _refusing(self, key: int) -> Iterator[None]:
        """What is raised here refuses the request."""
        try:
            yield
        except TokenmillError as error:
            refusal = _refusal(key, error)
        except Exception as error:
            traceback.print_exc()
            refusal = _refusal(key, TokenmillError(f"the engine failed to take it ({error!r})"))
        else:
            return
        self._open.pop(key, None)
        self._link.send([refusal])

    def _report(self) -> None:
        """Send what every request has gained, and what has ended."""
        messages: list[FromEngine] = []
        everyone = (each for completions in self._open.values() for each in completions)
        for each in [e for e in everyone if len(e.state.tokens) > e.num_told or e.state.finished]:
            messages += each.news()
            if each.state.finished:
                self._open[each.key].remove(each)
                if not self._open[each.key]:
                    del self._open[each.key]
        messages += self._embeddings.collect()
        self._count()
        if messages and not self._has_work:
            self._engine.check_integrity()
            messages.append(self._beat)
        if messages:
            self._link.send(messages)

    def _count(self) -> None:
        engine = self._engine
        now_s = time.monotonic()
        # A long queue is counted now and then, and always once it is empty.
        if now_s >= self._tiers_at or not engine.has_work:
            self._running_by_tier, self._waiting_by_tier = engine.by_tier()
            self._tiers_at = now_s + self._beat_s
        self._beat = Beat(
            num_steps=self._num_steps,
            num_pauses=self._num_pauses,
            num_waiting=engine.num_waiting + len(self._checking),
            num_running=engine.num_running,
            num_blocks=engine.num_blocks,
            num_blocks_in_use=engine.num_blocks_in_use,
            running_by_tier=self._running_by_tier,
            waiting_by_tier=self._waiting_by_tier,
            counts=replace(engine.counts),
            busy_ns=engine.meter.busy_ns,
            idle_ns=engine.idle_ns,
            busy_nj=engine.meter.busy_nj,
        )

    def _send_beats(self, stop: threading.Event) -> None:
        with contextlib.suppress(OSError):  # the front end is gone: the other thread ends the process
            while not stop.wait(self._beat_s):
                beat = msgspec.structs.replace(self._beat, patience_s=self._engine.step_bound_s)
                self._link.send([beat])

    def _drained(self) -> bool:
        if not self._told_to_end:
            return False
        if self._ends_at is None:
            self._ends_at = time.monotonic() + self._drain_s
            self._link.send([Draining()])
        return not self._has_work or time.monotonic() >= self._ends_at


def open_engine(spec: EngineSpec) -> LocalEngine:
    """Open the model that the spec names, and the energy counters that may be read.

    Errors as of `ModelDirectory.open` and the engine.
    """
    found = find_counters()
    counters = None if isinstance(found, Unmeasured) else found
    if spec.mock is not None:
        model = MockModel(spec.mock)
        return LocalEngine(model, spec.config, create=model.create, counters=counters)
    draft = ModelDirectory.open(Path(spec.draft)) if spec.draft else None
    engine = LocalEngine(ModelDirectory.open(Path(spec.model)), spec.config, draft=draft, counters=counters)
    for name, folder in spec.adapters:
        engine.load_adapter(name, Path(folder))
    return engine


def main(argv: Sequence[str]) -> int:
    """Serve on the socket with this file descriptor; exit code 0 if it was drained or left alone."""
    descriptor, parent = map(int, argv)
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front end decides what Ctrl-C means
    with socket.socket(fileno=descriptor) as sock, contextlib.suppress(EOFError, ConnectionError):
        sock.set_inheritable(False)
        return _serve(Link(sock))
    return 0


def _serve(link: Link) -> int:
    start = _first(link)
    try:
        engine = open_engine(start.spec)
    except TokenmillError as error:
        failed = StartFailed(kind=type(error).__name__, message=error.message, hint=error.hint)
        link.send([failed])
        return error.exit_code
    server = EngineServer(engine, link, beat_s=start.beat_s, drain_s=start.spec.drain_s)
    signal.signal(signal.SIGTERM, lambda *_: server.tell_to_end())
    link.send([Ready(context_length=engine.context_length, num_blocks=engine.num_blocks)])
    try:
        server.run()
    finally:
        engine.close()
    return 0


def _first(link: Link) -> Start:
    while True:
        for message in link.receive(timeout_s=60.0):
            if not isinstance(message, Start):
                raise ValueError("the first message is no Start")
            return message


def _frame(message: FromEngine) -> bytes:
    try:
        return encode(message)
    except ResourceError as error:
        if not isinstance(message, Advance | End | Embedded):
            raise
        return encode(_refusal(message.key, error))


def _refusal(key: int, error: TokenmillError) -> Refused:
    return Refused(key=key, kind=type(error).__name__, message=error.message, hint=error.hint)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, also while it is stopped or in a long step."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
