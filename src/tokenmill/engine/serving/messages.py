"""What the front end and the engine process say to each other, and how it looks on the socket.

A frame is four bytes of length (little-endian) and that much msgpack: one message. Both sides check every
frame against the types below, and its length against `MAX_FRAME_BYTES`, before they believe anything; no
code and no type name travels. Requests carry a key that is never used again, so an answer that comes late
cannot reach another request.

    front end                                   engine process
        Start (which model) ─────────────────────► opens it
        ◄───────────────────────── Ready, or StartFailed
        Submit, Embed, Cancel ───────────────────► between two steps
        ◄───────────── Advance ..., then one End  a completion; or Refused
        ◄──────────────────────────── Embedded    all texts of a request; or Refused
        ◄──────────────────────── Beat, all the time
        ◄──────── Draining, when it was told to end: no new requests
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Annotated, TypeAlias

import msgspec

from tokenmill.core import Completion, FinishReason, Request, ResourceError, Tier, TokenLogprobs, UsageError
from tokenmill.costs.metering import Charge
from tokenmill.engine.config import LLMConfig
from tokenmill.engine.counts import EngineCounts
from tokenmill.engine.embedding import EmbeddingRequest
from tokenmill.engine.mock import MockScript

__all__ = [
    "MAX_FRAME_BYTES",
    "Advance",
    "Beat",
    "Cancel",
    "Draining",
    "Embed",
    "Embedded",
    "End",
    "EngineSpec",
    "FrameReader",
    "FromEngine",
    "Ready",
    "Refused",
    "Start",
    "StartFailed",
    "Submit",
    "ToEngine",
    "decode_from_engine",
    "decode_to_engine",
    "encode",
]

MAX_FRAME_BYTES = 64 << 20
_HEAD_BYTES = 4

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A tagged record; a field that is missing, unknown or of another type makes it invalid."""


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model an engine process runs, and how: a model folder, or a mock's script.

    `draft` is the folder of a small model that guesses for it; `adapters` are pairs of name and folder. On
    SIGTERM the process takes no more requests and goes on for at most `drain_s` seconds.
    """

    model: str = ""
    draft: str = ""
    adapters: tuple[tuple[str, str], ...] = ()
    mock: MockScript | None = None
    config: LLMConfig = LLMConfig()
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if bool(self.model) == (self.mock is not None):
            raise UsageError("an engine runs a model or a mock", hint="give one of model and mock")


class Start(_Message, frozen=True, kw_only=True):
    """The first message to the process. It says how often to beat, in seconds."""

    spec: EngineSpec
    beat_s: float


class Submit(_Message, frozen=True, kw_only=True):
    """Compute this; `request.timeout_s` is what is left of it."""

    key: _Count
    request: Request


class Embed(_Message, frozen=True, kw_only=True):
    """Embed these texts; `request.timeout_s` is what is left of it."""

    key: _Count
    request: EmbeddingRequest


class Cancel(_Message, frozen=True, kw_only=True):
    """Give it up; its completions come nevertheless. Unknown keys are ignored: it may just have ended."""

    key: _Count


class Ready(_Message, frozen=True, kw_only=True):
    """The model is open."""

    context_length: _Count
    num_blocks: _Count


class StartFailed(_Message, frozen=True, kw_only=True):
    """The model cannot be opened: the class of the error tree, its message and hint."""

    kind: str
    message: str
    hint: str


class Advance(_Message, frozen=True, kw_only=True):
    """What one completion of a request gained since the last time."""

    key: _Count
    index: _Count
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class End(_Message, frozen=True, kw_only=True):
    """A completion's terminal state, after all of its `Advance`, and what it took."""

    key: _Count
    completion: Completion
    charge: Charge = Charge()


class Embedded(_Message, frozen=True, kw_only=True):
    """The terminal state of a request for embeddings, and what it took.

    `data` are the vectors as little-endian float32, one after the other, where it is `completed`; else it is
    empty. `error` says why it `failed`.
    """

    key: _Count
    finish_reason: FinishReason
    num_cached_tokens: _Count
    data: bytes = b""
    charge: Charge = Charge()
    error: str = ""


class Refused(_Message, frozen=True, kw_only=True):
    """The engine did not take a request. `again` says that another process may: this one is ending."""

    key: _Count
    kind: str
    message: str
    hint: str
    again: bool = False


class Beat(_Message, frozen=True, kw_only=True):
    """The process is alive. Whether it also works shows in `num_steps`, which grows while there is work,
    and `num_pauses`, which grows while there is none but to check grammars; a step that takes more than
    `patience_s` hangs. `busy_ns` and `busy_nj` were
    charged to requests, `idle_ns` passed without any. Counts by tier may be as old as a beat.
    """

    patience_s: Annotated[float, msgspec.Meta(ge=0)] = math.inf
    num_steps: _Count = 0
    num_pauses: _Count = 0
    num_waiting: _Count = 0
    num_running: _Count = 0
    num_blocks: _Count = 0
    num_blocks_in_use: _Count = 0
    running_by_tier: dict[Tier, _Count] = {}
    waiting_by_tier: dict[Tier, _Count] = {}
    counts: EngineCounts = msgspec.field(default_factory=EngineCounts)
    busy_ns: _Count = 0
    idle_ns: _Count = 0
    busy_nj: _Count = 0


class Draining(_Message, frozen=True, kw_only=True):
    """The process was told to end: it finishes what it has, and takes no more."""


ToEngine: TypeAlias = Start | Submit | Embed | Cancel
FromEngine: TypeAlias = Ready | StartFailed | Advance | End | Embedded | Refused | Beat | Draining


def _say_path(value: object) -> str:
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be said")


def _read_path(kind: type, value: object) -> Path:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"no {kind.__name__}")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_say_path)
_TO_ENGINE = msgspec.msgpack.Decoder(ToEngine, dec_hook=_read_path)
_FROM_ENGINE = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """The frame of a message.

    Raises UsageError if it holds what msgpack cannot say (half a surrogate pair, a number above 64 bits),
    ResourceError if it is longer than `MAX_FRAME_BYTES`.
    """
    try:
        data = _ENCODER.encode(message)
    except (UnicodeError, OverflowError, TypeError) as error:
        raise UsageError(f"a request cannot be sent to the engine ({error})") from error
    if len(data) > MAX_FRAME_BYTES:
        raise ResourceError(
            f"a message to or from the engine has {len(data)} bytes, at most {MAX_FRAME_BYTES}",
            hint="shorten the prompt, or ask for fewer tokens or log-probabilities",
        )
    return len(data).to_bytes(_HEAD_BYTES, "little") + data


def decode_to_engine(data: bytes) -> ToEngine:
    """The message in a frame's data. Raises ValueError if it is none, UsageError for a bad request."""
    with _nonsense_as_value_error():
        message: ToEngine = _TO_ENGINE.decode(data)
    return message


def decode_from_engine(data: bytes) -> FromEngine:
    """The message in a frame's data. Raises ValueError if it is none."""
    with _nonsense_as_value_error():
        message: FromEngine = _FROM_ENGINE.decode(data)
    return message


@contextmanager
def _nonsense_as_value_error() -> Iterator[None]:
    """What msgspec raises is a ValueError already, but for data nested too deeply."""
    try:
        yield
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


class FrameReader:
    """Cuts a stream of bytes into frames. It holds at most one frame that is not complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes; get the data of each frame that is complete now.

        Raises ValueError at a frame that is empty or too long: nothing after it can be trusted.
        """
        self._buffer += data
        frames = []
        at = 0
        while len(self._buffer) - at >= _HEAD_BYTES:
            size = int.from_bytes(self._buffer[at : at + _HEAD_BYTES], "little")
            if not 0 < size <= MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {size} bytes")
            if len(self._buffer) - at - _HEAD_BYTES < size:
                break
            at += _HEAD_BYTES
            frames.append(bytes(self._buffer[at : at + size]))
            at += size
        del self._buffer[:at]
        return frames
