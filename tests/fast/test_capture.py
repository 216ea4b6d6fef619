"""Capture: which calls become lines, what is in them, what is counted when something goes wrong."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fast.settled_calls import settled
from tokenmill.core import FinishReason, Message, Usage, UsageError
from tokenmill.router import AttemptRecord, Job, Pair, Spent
from tokenmill.server import capture as capture_module
from tokenmill.server.capture import Capture, CaptureConfig, Provenance
from tokenmill.store import Entry
from tokenmill.wire import Call, Choice, Reply, TokenText
from tokenmill.workload import Origin, WorkloadCall, erase, read_calls

ASKED = Call(
    model="mock",
    messages=(Message(role="user", content="I am bob@example.com, user u-777"),),
    user="u-777",
    metadata={"who": "u-777"},
    stream=True,
)


def reply(text: str = "hello eve@example.com") -> Reply:
    choice = Choice(text=text, finish_reason="completed", logprobs=(TokenText(text, -0.1),))
    usage = Usage(num_prompt_tokens=10, num_cached_tokens=4, num_output_tokens=5)
    return Reply(id="r", model="mock", choices=(choice,), usage=usage)


def shout(text: str) -> str:
    """A redactor of an operator."""
    if "fail" in text:
        raise RuntimeError("no")
    return text.upper()


def captured(
    folder: Path, feed: Callable[[Capture], None], **config: Any
) -> tuple[Capture, list[WorkloadCall], list[Entry]]:
    """What is in the files and the ledger after `feed`."""
    entries: list[Entry] = []

    async def settle(new: Sequence[Entry]) -> int:
        entries.extend(new)
        return len(new)

    async def run() -> Capture:
        origin = Provenance(origin=Origin(model="m", source="hub", digest="d"), terms=("mit",))
        capture = Capture(CaptureConfig(**config), folder, {"deployment-0": origin}, settle)
        feed(capture)
        await capture.close()
        return capture

    capture = asyncio.run(run())
    return capture, [each for path in capture.folder.files() for each in read_calls(path)], entries


def test_a_call_becomes_a_line(tmp_path: Path) -> None:
    _, lines, _ = captured(tmp_path, lambda capture: capture.take(settled(), ASKED, reply()))
    (line,) = lines
    assert line.request == {
        "model": "mock",
        "messages": [{"role": "user", "content": f"I am [EMAIL], user {line.end_user}"}],
        "max_tokens": line.request["max_tokens"],
        "temperature": line.request["temperature"],
        "metadata": {"who": line.end_user},
    }
    (choice,) = line.response["choices"]
    assert choice["message"]["content"] == "hello [EMAIL]" and choice["logprobs"] is None
    assert line.response["usage"]["completion_tokens"] == 5
    assert (line.origin.model, line.origin.source, line.terms) == ("m", "hub", ("mit",))
    assert (line.cost_nano_usd, line.price_nano_usd, line.tier) == (7000, 9000, "fast")
    assert line.end_user.startswith("u_") and 0 <= time.time() - line.created < 60
    assert "u-777" not in "".join(path.read_text() for path in tmp_path.glob("calls*"))


@pytest.mark.parametrize("finish", ["cancelled", "failed", "expired"])
def test_what_is_no_answer_is_left_out(tmp_path: Path, finish: FinishReason) -> None:
    _, lines, _ = captured(tmp_path, lambda c: c.take(settled(finishes=(finish,)), ASKED, reply()))
    assert lines == []


def test_who_wants_it(tmp_path: Path) -> None:
    caller = settled().caller
    other = replace(caller, key=replace(caller.key, capture=True))

    def feed(capture: Capture) -> None:
        assert capture.wants(ASKED, caller) and not capture.wants(replace(ASKED, model="x"), caller)
        assert capture.wants(replace(ASKED, model="x"), other)

    captured(tmp_path, feed, routes=("mock",))


def test_what_cannot_be_redacted_is_never_written(tmp_path: Path) -> None:
    def feed(capture: Capture) -> None:
        capture.take(settled(), ASKED, reply("fine"))
        capture.take(settled(), ASKED, reply("fail"))
        capture.take(settled(), Call(model="mock", prompts=((1, 2),)), reply())

    capture, lines, _ = captured(tmp_path, feed, redact="tests.fast.test_capture:shout")
    assert [each.response["choices"][0]["message"]["content"] for each in lines] == ["FINE"]
    counts = {name: capture.counts[name] for name in ("written", "not_redacted", "token_ids")}
    assert counts == {"written": 1, "not_redacted": 1, "token_ids": 1}
    (gauge,) = capture.gauges()
    assert (("written",), 1.0) in list(gauge.read())
    with pytest.raises(UsageError):
        captured(tmp_path, feed, redact="tests.fast.test_capture:nothing")
    with pytest.raises(UsageError):
        CaptureConfig(patterns=("names",))  # type: ignore[arg-type]


def test_a_full_queue_drops_and_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "_MAX_QUEUED", 5)

    def feed(capture: Capture) -> None:
        with capture.folder.locked():  # the writer waits for this
            begun_s = time.perf_counter()
            for _ in range(1000):
                capture.take(settled(), ASKED, reply())
            assert time.perf_counter() - begun_s < 5.0

    capture, lines, _ = captured(tmp_path, feed)
    assert len(lines) == capture.counts["written"] < 1000
    assert capture.counts["written"] + capture.counts["queue_full"] == 1000


def test_a_disk_that_fails_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    capture, _, _ = captured_nowhere(tmp_path / "file" / "captures")
    assert capture.counts["not_redacted"] + capture.counts["not_written"] == 1


def captured_nowhere(folder: Path) -> tuple[Capture, None, None]:
    async def settle(new: Sequence[Entry]) -> int:
        return 0

    async def run() -> Capture:
        capture = Capture(CaptureConfig(), folder, {}, settle)
        capture.take(settled(), ASKED, reply())
        await capture.close()
        return capture

    return asyncio.run(run()), None, None


def test_a_call_in_the_queue_of_somebody_erased_is_not_written(tmp_path: Path) -> None:
    def feed(capture: Capture) -> None:
        capture.take(settled(), ASKED, reply())
        while not capture.folder.files():
            time.sleep(0.01)
        erasing = threading.Thread(
            target=erase, args=(capture.folder,), kwargs={"project": "canary-9f3", "end_user": "u-777"}
        )
        with capture._wake:  # nothing leaves the queue meanwhile
            capture._queue.append(capture_job(capture))
            erasing.start()
            erasing.join()

    def capture_job(capture: Capture) -> Any:
        jobs: list[Any] = []
        put, capture._put = capture._put, jobs.append  # type: ignore[method-assign, assignment]
        capture.take(settled(), ASKED, reply())
        capture._put = put  # type: ignore[method-assign]
        return jobs[0]

    capture, lines, _ = captured(tmp_path, feed)
    assert lines == [] and capture.counts["erased"] == 1


@pytest.mark.parametrize("has_shadow", [True, False])
def test_pairs_are_settled_and_kept(tmp_path: Path, has_shadow: bool) -> None:
    usage = Usage(num_prompt_tokens=3, num_cached_tokens=0, num_output_tokens=2)
    record = AttemptRecord(
        number=1,
        backend="deployment-1",
        model="big",
        is_local=False,
        spent=Spent(usage=usage, finish="completed", nanoseconds=5, cost_nano_usd=77),
    )
    pair = Pair(
        route="mock",
        call=ASKED,
        job=Job(request_id="req_9", tenant="p", key_id="key_1", feature="f"),
        primary_backend="deployment-0",
        primary=reply("one"),
        shadow_backend="deployment-1",
        shadow=reply("two") if has_shadow else None,
        record=record,
    )
    entries: list[Entry] = []

    async def settle(new: Sequence[Entry]) -> int:
        entries.extend(new)
        return len(new)

    async def run() -> Capture:
        capture = Capture(CaptureConfig(), tmp_path, {}, settle)
        await capture.pair(pair)
        await capture.close()
        return capture

    capture = asyncio.run(run())
    (entry,) = entries
    assert (entry.kind, entry.key_id, entry.project, entry.price_nano_usd) == ("shadow", "key_1", "p", 0)
    assert (entry.cost_nano_usd, entry.deployment, entry.end_user) == (77, "deployment-1", "u-777")
    lines = [each for path in capture.folder.files() for each in read_calls(path)]
    assert len(lines) == has_shadow == capture.counts["pairs"]
    for line in lines:
        assert line.shadow is not None and line.shadow.cost_nano_usd == 77
        answers = [line.response, line.shadow.response]
        assert [json.loads(json.dumps(a))["choices"][0]["message"]["content"] for a in answers] == [
            "one",
            "two",
        ]
