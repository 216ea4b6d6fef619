"""Messages and frames: everything that is sent comes back, and nothing else is believed."""

import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.core import (
    Completion,
    Grammar,
    Request,
    ResourceError,
    SamplingParams,
    TokenLogprobs,
    Usage,
    UsageError,
)
from tokenmill.engine import LLMConfig
from tokenmill.engine.mock import MockFault, MockScript
from tokenmill.engine.serving import messages
from tokenmill.engine.serving.messages import (
    MAX_FRAME_BYTES,
    Advance,
    Beat,
    Cancel,
    Draining,
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
    decode_from_engine,
    decode_to_engine,
    encode,
)

LOGPROBS = TokenLogprobs(token_id=3, logprob=-0.5, top=((3, -0.5), (4, -1.5)))
COMPLETION = Completion(
    request_id="a",
    text="h\u00e9",
    token_ids=(1, 2),
    finish_reason="length",
    usage=Usage(num_prompt_tokens=3, num_cached_tokens=1, num_output_tokens=2),
    ttft_s=0.1,
    total_s=0.2,
    logprobs=(LOGPROBS, LOGPROBS),
)
REQUEST = Request(
    request_id="a",
    prompt=(1, 2, 3),
    params=SamplingParams(
        stop=("x",),
        logit_bias=((1, -2.0),),
        seed=2**63 - 1,
        grammar=Grammar(kind="regex", source="a+"),
    ),
    tier="fast",
    tenant="t",
    timeout_s=1.5,
)
SPEC = EngineSpec(
    mock=MockScript(answers=((b"a", (1, 2)),), faults=(MockFault(kind="nan", marker=(9,)),)),
    config=LLMConfig(max_batch=3, swap_folder=Path("swap")),
)
TO_ENGINE: list[ToEngine] = [Start(spec=SPEC, beat_s=0.5), Submit(key=7, request=REQUEST), Cancel(key=7)]
FROM_ENGINE: list[FromEngine] = [
    Ready(context_length=8, num_blocks=2),
    StartFailed(kind="NotFoundError", message="m", hint="h"),
    Advance(key=1, index=0, text="x", token_ids=(1,), logprobs=(LOGPROBS,)),
    End(key=1, completion=COMPLETION),
    Refused(key=1, kind="UsageError", message="m", hint=""),
    Beat(num_steps=3, num_blocks=4),
    Draining(),
]


def bodies(data: bytes) -> list[bytes]:
    return FrameReader().feed(data)


def test_every_message_comes_back() -> None:
    assert [decode_to_engine(bodies(encode(each))[0]) for each in TO_ENGINE] == TO_ENGINE
    assert [decode_from_engine(bodies(encode(each))[0]) for each in FROM_ENGINE] == FROM_ENGINE


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 9))
def test_frames_come_back_however_they_are_cut(sizes: list[int], step: int) -> None:
    sent = [bytes([size]) * size for size in sizes]
    stream = b"".join(len(each).to_bytes(4, "little") + each for each in sent)
    reader = FrameReader()
    got = [frame for at in range(0, len(stream), step) for frame in reader.feed(stream[at : at + step])]
    assert got == sent


@pytest.mark.parametrize("size", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_frame_of_no_or_too_great_length_is_refused_at_its_head(size: int) -> None:
    with pytest.raises(ValueError, match="a frame of"):
        FrameReader().feed(size.to_bytes(4, "little"))


def test_messages_of_the_other_side_are_refused() -> None:
    for from_engine in FROM_ENGINE:
        with pytest.raises(ValueError):
            decode_to_engine(bodies(encode(from_engine))[0])
    for to_engine in TO_ENGINE:
        with pytest.raises(ValueError):
            decode_from_engine(bodies(encode(to_engine))[0])


def test_damaged_messages_raise_only_value_error_or_usage_error() -> None:
    """Each byte of each message replaced, cut off, or followed by others: 20,000 bodies."""
    rng = random.Random(1)
    to_engine = [bodies(encode(each))[0] for each in TO_ENGINE]
    from_engine = [bodies(encode(each))[0] for each in FROM_ENGINE]
    num_refused = 0
    for _ in range(20_000):
        body = bytearray(rng.choice(to_engine + from_engine))
        for _ in range(rng.randrange(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        del body[rng.randrange(1, len(body) + 1) :]
        body += rng.randbytes(rng.choice((0, 0, 3)))
        try:
            decode_to_engine(bytes(body))
            decode_from_engine(bytes(body))
        except UsageError:
            pass
        except ValueError:
            num_refused += 1
    assert num_refused > 15_000


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"type": "System"},
        {"type": "Cancel", "key": -1},
        {"type": "Cancel", "key": 1.5},
        {"type": "Cancel", "key": 1, "more": 1},
        {"type": "Advance", "key": 1, "index": 0, "text": b"x", "token_ids": [1]},
        {"type": "Advance", "key": 1, "index": 0, "text": "x", "token_ids": ["1"]},
        {"type": "End", "key": 1, "completion": {"request_id": "a"}},
    ],
)
def test_wrong_types_are_refused(value: object) -> None:
    body = msgspec.msgpack.encode(value)
    with pytest.raises(ValueError):
        decode_from_engine(body)
    with pytest.raises(ValueError):
        decode_to_engine(b"\x81\xa4type" + body)


def test_nesting_without_end_is_refused() -> None:
    """A field that a dataclass does not have is skipped, which must not overflow the stack."""
    deep = b"\x82\xa4type\xa6Submit\xa7request\x81\xa1x" + b"\x91" * 1_000_000
    with pytest.raises(ValueError):
        decode_to_engine(deep)


def test_bounds_of_a_request_hold_on_the_other_side_too() -> None:
    body = msgspec.to_builtins(Submit(key=1, request=REQUEST))
    body["request"]["params"]["max_tokens"] = 0
    with pytest.raises(UsageError, match="max_tokens"):
        decode_to_engine(msgspec.msgpack.encode(body))


def test_what_cannot_be_said_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in (Request(request_id="\ud800", prompt=(1,)), Request(request_id="a", prompt=(1 << 70,))):
        with pytest.raises(UsageError, match="cannot be sent"):
            encode(Submit(key=1, request=bad))
    monkeypatch.setattr(messages, "MAX_FRAME_BYTES", 100)
    with pytest.raises(ResourceError, match="at most 100"):
        encode(Submit(key=1, request=REQUEST))


def test_an_engine_runs_a_model_or_a_mock() -> None:
    for both in ({}, {"model": "a", "mock": MockScript()}):
        with pytest.raises(UsageError, match="model or a mock"):
            EngineSpec(**both)  # type: ignore[arg-type]
