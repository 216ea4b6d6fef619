"""Batches: each line answered and billed once, whatever fails beside it."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability.mirror import Mirror
from tests.fast.batch_tools import Rig, open_rig, request_line
from tokenmill.core import NotFoundError, ResourceError, TokenmillError, UsageError
from tokenmill.server.caller import ANONYMOUS
from tokenmill.store import (
    Accounts,
    Budget,
    Entry,
    Key,
    LedgerQuery,
    LineEnd,
    ObjectStore,
    SqliteStore,
    hash_secret,
)

OTHER = Key(id="other", name="other", project="elsewhere", created_s=0.0)


def test_every_line_is_answered_once_and_billed_once(tmp_path: Path) -> None:
    async def go() -> None:
        async with open_rig(tmp_path) as rig:
            served = await rig.served(await rig.submit([f"text {at}" for at in range(100)]))
            assert served.answers == {f"text {at}": f"text {at}"[::-1] for at in range(100)}
            assert served.bills == Counter(range(100)) and not served.unpaid and not served.errors
            assert served.batch.num_answered == served.batch.num_lines == 100
            assert served.batch.num_output_tokens == sum(len(f"text {at}") for at in range(100))
            assert 1 < rig.backend.most_running <= 8
            entries = [each async for each in rig.store.entries(LedgerQuery())]
            assert {(each.kind, each.tier) for each in entries} == {("batch", "batch")}
            assert rig.gateway.num_calls == 0
            while await rig.store.read(lambda db: db.execute("SELECT count(*) FROM lines").get):
                await asyncio.sleep(0.01)  # rows go once the files are there

    asyncio.run(go())


def test_a_line_that_cannot_be_asked_is_an_error_of_its_own(tmp_path: Path) -> None:
    lines: list[Any] = [
        "text",
        "bad",
        request_line("stream", stream=True),
        request_line("what", nonsense=1),
        b'{"custom_id":"none","body":[]}\n',
    ]

    async def go() -> None:
        async with open_rig(tmp_path) as rig:
            served = await rig.served(await rig.submit(lines))
            assert list(served.answers) == ["text"] and served.batch.status == "completed"
            assert {each["status_code"] for each in served.errors.values()} == {400}
            assert served.errors["stream"]["body"]["error"]["param"] == "stream"
            assert served.bills == Counter([0]) and served.batch.num_errored == 4

    asyncio.run(go())


def test_a_line_that_fails_is_tried_again_and_then_refused_alone(tmp_path: Path) -> None:
    calls: Counter[str] = Counter()

    def fail(text: str) -> None:
        calls[text] += 1
        if text == "poison" or (text == "weak" and calls[text] < 5):
            raise TokenmillError("it broke")

    async def go() -> None:
        async with open_rig(tmp_path, Mirror(on_start=fail)) as rig:
            served = await rig.served(await rig.submit([*map(str, range(20)), "poison", "weak"]))
            assert set(served.answers) == {*map(str, range(20)), "weak"}
            assert served.errors["poison"]["status_code"] == 500
            assert served.bills[21] == 1 and not served.bills[20]
            assert served.unpaid[20] == calls["poison"] <= 9, "three tries, of at most three attempts each"

    asyncio.run(go())


def test_a_full_engine_is_no_failure(tmp_path: Path) -> None:
    calls: Counter[str] = Counter()

    def full(text: str) -> None:
        calls[text] += 1
        if calls[text] <= 12:
            raise ResourceError("full")

    async def go() -> None:
        async with open_rig(tmp_path, Mirror(on_start=full)) as rig:
            served = await rig.served(await rig.submit(["a", "b", "c"]))
            assert set(served.answers) == {"a", "b", "c"} and served.bills == Counter(range(3))
            assert rig.room.worker.limit < 8, "fewer at once after he was full"

    asyncio.run(go())


def test_a_line_that_was_given_back_runs_again_though_its_last_try_is_slow_to_go(tmp_path: Path) -> None:
    calls: Counter[str] = Counter()

    def full(text: str) -> None:
        calls[text] += 1
        if calls[text] <= 6:  # more often than a call tries by itself
            raise ResourceError("full")

    async def go() -> None:
        async with open_rig(tmp_path, Mirror(on_start=full), starts=False) as rig:
            run = rig.room.runner.run

            async def slow_to_go(*args: Any) -> Any:
                fate = await run(*args)
                await asyncio.sleep(0.2)
                return fate

            rig.room.runner.run = slow_to_go  # type: ignore[method-assign, assignment]
            await rig.room.start()
            async with asyncio.timeout(20.0):
                assert set((await rig.served(await rig.submit(["a"]))).answers) == {"a"}

    asyncio.run(go())


@pytest.mark.parametrize("stage", ["read", "write"])
def test_a_batch_that_cannot_be_read_or_written_fails_alone(tmp_path: Path, stage: str) -> None:
    async def go() -> None:
        async with open_rig(tmp_path, starts=False, max_stage_tries=3) as rig:
            poisoned = await rig.submit(["a"])
            good, tried = getattr(rig.room.files, stage), []

            async def work(batch: Any) -> None:
                if batch.id == poisoned.id:
                    tried.append(batch.id)
                    raise RuntimeError("poison")
                await good(batch)

            setattr(rig.room.files, stage, work)
            await rig.room.start()
            assert len((await rig.served(await rig.submit(["b"]))).answers) == 1
            served = await rig.served(poisoned)
            assert served.batch.status == "failed" and len(tried) == 3
            assert served.batch.faults[0].code == "server_error"

    asyncio.run(go())


def test_an_input_that_is_gone_fails_its_batch(tmp_path: Path) -> None:
    async def go() -> None:
        async with open_rig(tmp_path, starts=False, max_stage_tries=2) as rig:
            batch = await rig.submit(["a"])
            rig.room.files.folder.remove(batch.input_file_id)
            await rig.room.start()
            assert (await rig.served(batch)).batch.status == "failed"

    asyncio.run(go())


def test_what_is_wrong_with_the_input_is_said_by_line(tmp_path: Path) -> None:
    lines = [
        request_line("a"),
        b"no json\n",
        request_line("a"),
        b"\n",
        request_line("b").replace(b"POST", b"GET"),
        request_line("c").replace(b"/v1/completions", b"/v1/embeddings"),
        b'{"custom_id":"","body":{}}\n',
        b"[" * 100_000 + b"\n",
        b'{"custom_id":"d","body":{},"more":1}',
    ]

    async def go() -> None:
        async with open_rig(tmp_path) as rig:
            served = await rig.served(await rig.submit(lines))
            assert served.batch.status == "failed" and not served.bills
            assert [(each.line, each.code) for each in served.batch.faults] == [
                (2, "invalid_json_line"),
                (3, "duplicate_custom_id"),
                (5, "invalid_method"),
                (6, "mismatched_endpoint"),
                (7, "invalid_custom_id"),
                (8, "invalid_json_line"),
                (9, "invalid_json_line"),
            ]
            empty = await rig.served(await rig.submit([b"\n \n"]))
            assert [each.code for each in empty.batch.faults] == ["empty_file"]

    asyncio.run(go())


def test_cancel_keeps_what_is_done(tmp_path: Path) -> None:
    async def go() -> None:
        async with open_rig(tmp_path, Mirror(delay_s=0.05), max_in_flight=4) as rig:
            batch = await rig.submit([f"t{at}" for at in range(200)])
            await rig.until(batch, lambda each: each.num_answered >= 10)
            await rig.room.objects.cancel_batch(batch.project, batch.id, "openai", rig.accounts.now_s())
            rig.room.worker.wake()
            served = await rig.served(batch)
            assert served.batch.status == "cancelled" and 10 <= len(served.answers) < 200
            assert served.batch.num_cancelled == 200 - len(served.answers) == len(served.errors)
            assert {each["code"] for each in served.errors.values()} == {"batch_cancelled"}
            assert len(served.bills) == len(served.answers) == sum(served.bills.values())
            assert rig.backend.num_running == 0

    asyncio.run(go())


def test_a_batch_that_expires_gives_what_is_done(tmp_path: Path) -> None:
    async def go() -> None:
        async with open_rig(tmp_path, Mirror(delay_s=0.05), max_in_flight=4) as rig:
            served = await rig.served(await rig.submit([f"t{at}" for at in range(500)], window_s=0.6))
            assert served.batch.status == "expired" and 0 < len(served.answers) < 500
            assert len(served.answers) + len(served.errors) == 500
            assert {each["code"] for each in served.errors.values()} == {"batch_expired"}
            assert sum(served.bills.values()) == len(served.answers)

    asyncio.run(go())


def test_a_worker_that_stops_gives_its_lines_back(tmp_path: Path) -> None:
    async def go() -> None:
        async with open_rig(tmp_path, Mirror(delay_s=0.05), max_in_flight=4) as rig:
            batch = await rig.submit([f"t{at}" for at in range(60)])
            await rig.until(batch, lambda each: each.num_answered >= 5)
            await rig.room.stop()
            tries = await rig.store.read(
                lambda db: db.execute("SELECT max(num_tries) FROM lines WHERE state = 'pending'").get
            )
            assert tries == 0, "to be stopped is no try"
            assert (await rig.room.objects.open_lines(batch.id))[2] == 0
        async with open_rig(tmp_path) as rig:
            served = await rig.served(batch)
            assert len(served.answers) == 60 and served.bills == Counter(range(60))

    asyncio.run(go())


async def _leased(rig: Rig) -> tuple[Any, Any]:
    """A batch with one line, and its lease."""
    batch = await rig.submit(["a"])
    await rig.room.files.read(batch)
    (line,) = await rig.room.objects.lease(batch.id, 9, rig.accounts.now_s() + 60)
    assert not await rig.room.objects.lease(batch.id, 9, 1e12), "a line is leased once"
    return batch, line


def _entry(request_id: str) -> Entry:
    return Entry(
        request_id=request_id,
        attempt=1,
        kind="batch",
        at_s=1.0,
        key_id="k",
        project="p",
        model="m",
        deployment="m",
        tier="batch",
        finish="completed",
        num_prompt_tokens=1,
        num_cached_tokens=0,
        num_output_tokens=1,
        nanoseconds=1,
        nanojoules=0,
        cost_nano_usd=0,
        price_nano_usd=7,
    )


def test_who_lost_the_lease_writes_nothing(tmp_path: Path) -> None:
    async def go() -> None:
        async with open_rig(tmp_path, starts=False) as rig:
            batch, line = await _leased(rig)
            successor = ObjectStore(rig.store)
            assert await rig.room.objects.free_lost(rig.accounts.now_s()) == 0, "it lives"
            assert await successor.free_lost(rig.accounts.now_s()) == 1, "another process' lease is free"
            end = LineEnd(state="answered", status=200, body=b"{}")
            assert await rig.room.objects.close_line(line, end, [_entry(line.request_id)]) == 0
            assert await rig.store.spent("k", 0.0) == 0
            (again,) = await successor.lease(batch.id, 1, rig.accounts.now_s() + 60)
            assert again.num_tries == 2
            assert await successor.close_line(again, end, [_entry(again.request_id)]) == 1
            assert await successor.close_line(again, end, [_entry(again.request_id)]) == 0
            assert await rig.store.spent("k", 0.0) == 7

    asyncio.run(go())


def test_a_lease_that_is_not_renewed_runs_out(tmp_path: Path) -> None:
    async def go() -> None:
        async with open_rig(tmp_path, starts=False) as rig:
            _, line = await _leased(rig)
            now_s, objects = rig.accounts.now_s(), rig.room.objects
            await objects.renew([line.lease], now_s + 1000)
            assert await objects.free_lost(now_s + 999) == 0
            assert await objects.free_lost(now_s + 1001) == 1

    asyncio.run(go())


def test_the_answer_and_its_bill_are_one_transaction(tmp_path: Path) -> None:
    async def go() -> None:
        async with open_rig(tmp_path, starts=False) as rig:
            batch, line = await _leased(rig)
            wrong = _entry(line.request_id)
            object.__setattr__(wrong, "price_nano_usd", -1)
            with pytest.raises(Exception, match="CHECK"):
                await rig.room.objects.close_line(line, LineEnd(state="answered", status=200), [wrong])
            assert await rig.room.objects.open_lines(batch.id) == (0, 0, 1), "neither is written"

    asyncio.run(go())


def test_lines_in_whose_company_the_server_died_run_alone(tmp_path: Path) -> None:
    async def go() -> None:
        async with open_rig(tmp_path, starts=False, max_tries=4) as rig:
            batch = await rig.submit([f"t{at}" for at in range(10)])
            await rig.room.files.read(batch)
            sql = "UPDATE lines SET num_tries = CASE number WHEN 3 THEN 4 ELSE 2 END"
            await rig.store.write(lambda db: db.execute(sql).fetchall())
            await rig.room.start()
            served = await rig.served(batch)
            assert rig.backend.most_running == 1
            assert list(served.errors) == ["t3"] and len(served.answers) == 9
            assert "died 4 times" in json.dumps(served.errors["t3"])

    asyncio.run(go())


def test_a_budget_is_never_overspent_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    key = Key(
        id="poor", name="poor", project="default", created_s=0.0, budget=Budget(nano_usd=4 * 4 * 1000 + 500)
    )

    async def go() -> None:
        async with open_rig(tmp_path) as rig:
            await rig.store.add_key(key, hash_secret("x"))
            served = await rig.served(await rig.submit([f"{at:02d}" for at in range(20)], key=key))
            assert len(served.answers) == 4, "each comes to 4,000 nanodollars"
            assert await rig.store.spent("poor", 0.0) == 16_000
            codes = {each["body"]["error"]["code"] for each in served.errors.values()}
            assert codes == {"insufficient_quota"} and len(served.errors) == 16

    asyncio.run(go())


def test_a_key_that_is_revoked_cancels_its_batches(tmp_path: Path) -> None:
    async def go() -> None:
        async with open_rig(tmp_path) as rig:
            served = await rig.served(await rig.submit(["a", "b"], key=OTHER))
            assert served.batch.status == "cancelled" and not served.answers

    asyncio.run(go())


def test_others_leave_batches_fewer_rows_but_one(tmp_path: Path) -> None:
    async def go() -> None:
        async with open_rig(tmp_path, starts=False, max_in_flight=32, headroom=4) as rig:
            worker, limits = rig.room.worker, []
            for others in (0, 1, 10, 40):
                worker._num_calls = lambda others=others: others  # type: ignore[misc]
                limits.append(worker.limit)
            assert limits == [32, 27, 18, 1]

    asyncio.run(go())


def test_batches_take_turns(tmp_path: Path) -> None:
    async def go() -> None:
        async with open_rig(tmp_path, Mirror(delay_s=0.02), max_in_flight=4) as rig:
            large = await rig.submit([f"t{at}" for at in range(400)])
            await rig.until(large, lambda each: each.num_answered > 0)
            await rig.served(await rig.submit(["small"]))
            assert not (await rig.until(large, lambda each: True)).has_ended
            await rig.room.objects.cancel_batch(large.project, large.id, "openai", 1.0)

    asyncio.run(go())


def test_what_belongs_to_another_project_is_not_found(tmp_path: Path) -> None:
    async def go() -> None:
        async with open_rig(tmp_path, starts=False) as rig:
            batch, objects = await rig.submit(["a"]), rig.room.objects
            for project, api in (("elsewhere", "openai"), (ANONYMOUS.project, "anthropic")):
                with pytest.raises(NotFoundError):
                    await objects.batch(project, batch.id, api)  # type: ignore[arg-type]
                with pytest.raises(NotFoundError):
                    await objects.cancel_batch(project, batch.id, api, 1.0)  # type: ignore[arg-type]
                with pytest.raises(NotFoundError):
                    await objects.delete_batch(project, batch.id, api)  # type: ignore[arg-type]
                assert not await objects.batches(project, api, limit=9)  # type: ignore[arg-type]
            with pytest.raises(NotFoundError):
                await objects.file("elsewhere", batch.input_file_id)
            with pytest.raises(NotFoundError):
                await objects.delete_file("elsewhere", batch.input_file_id)
            with pytest.raises(NotFoundError):
                await objects.files(
                    "elsewhere", ["batch"], after=batch.input_file_id, limit=9, newest_first=True
                )
            with pytest.raises(UsageError, match="has not ended"):
                await objects.delete_file(ANONYMOUS.project, batch.input_file_id)

    asyncio.run(go())


def test_accounts_count_what_another_transaction_wrote(tmp_path: Path) -> None:
    key = Key(id="k", name="k", project="p", created_s=0.0, budget=Budget(nano_usd=100))

    async def go() -> None:
        store = SqliteStore(tmp_path / "x.db")
        accounts = Accounts(store)
        await store.add_key(key, hash_secret("x"))
        await accounts.reserve(key, "r", 1, 50, durable=False)
        assert await accounts.remaining(key) == 50
        assert await accounts.settle([_entry("r")], store.settle) == 1
        assert await accounts.remaining(key) == 93
        await accounts.reserve(key, "s", 1, 50, durable=False)

        async def refuse(entries: Any) -> int:
            return 0

        assert await accounts.settle([_entry("s")], refuse) == 0
        assert await accounts.remaining(key) == 93, "what was not written is not counted"
        await store.close()

    asyncio.run(go())
