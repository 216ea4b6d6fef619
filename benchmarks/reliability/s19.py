"""Line S19: batches over `kill -9`. Every line is answered once and billed once, none is lost.

    python -m benchmarks.reliability.s19 --kills 500 --lines 10000
    python -m benchmarks.reliability.s19 --kills 40 --lines 2000 --guard off

A child runs batches of LINES requests with the server's own store, accounts, gateway, router, routes and two
workers over a model that answers a text with the text reversed, after some milliseconds; every hundredth
asks for what cannot be. It is killed at random times, again and again, and started on what it left. When a
batch has ended, its files and the ledger are compared with what was asked. Controls (`--guard off`): the
ledger in a transaction of its own; lines that are taken without a lease. Both must be noticed.

The engine, HTTP and the disk's own lies are not in it: `tests/server/test_batches.py` kills whole servers,
and a loss of power is another line's matter.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias, TypeVar

import apsw

from benchmarks.reliability.mirror import Mirror
from scripts.scorecard.__main__ import origin
from tokenmill.router import Price, Router
from tokenmill.server.batch_room import BatchRoom, endpoints_of
from tokenmill.server.batches import BatchConfig, BatchWorker
from tokenmill.server.caller import ANONYMOUS
from tokenmill.server.files import new_id
from tokenmill.server.gateway import Gateway, GatewayConfig
from tokenmill.server.openai_api import OpenAIApi
from tokenmill.server.pricing import PriceList
from tokenmill.store import (
    Accounts,
    Batch,
    Entry,
    Key,
    Line,
    LineEnd,
    ObjectStore,
    SqliteStore,
    StoredFile,
)

__all__ = ["GUARDS", "Guard", "Report", "main", "run"]

T = TypeVar("T")

Guard: TypeAlias = Literal["on", "transaction", "lease"]
GUARDS: Final[tuple[Guard, ...]] = ("on", "transaction", "lease")
"""All on; without one transaction for answer and bill; without leases."""

_MAX_WRITES: Final = 150
_MAX_DELAY_S: Final = 0.02
_PATIENCE_S: Final = 300.0
_BAD_EVERY: Final = 100
_NEVER: Final = 1 << 40
_PRICE: Final = Price(input_usd=1.0, output_usd=1.0)
_NANO_A_TOKEN: Final = 1000


_CONFIG: Final = BatchConfig(max_in_flight=16, headroom=0, retry_s=0.01, idle_s=0.05, max_stage_tries=16)
"""Two workers begin each stage here: twice the tries."""


@dataclass
class Report:
    """What was found. A violation is a line that is lost, repeated, wrong, billed twice or not at all."""

    num_kills: int = 0
    num_batches: int = 0
    num_lines: int = 0
    lost: int = 0
    repeated: int = 0
    wrong: int = 0
    billed_twice: int = 0
    unbilled: int = 0
    num_interrupted: int = 0
    num_unpaid_tries: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def violations(self) -> int:
        """All of them."""
        return self.lost + self.repeated + self.wrong + self.billed_twice + self.unbilled + len(self.notes)


class _Telling(SqliteStore):
    """Writes a byte into a pipe after each write that is durable."""

    def __init__(self, path: Path, pipe: int) -> None:
        super().__init__(path)
        os.set_blocking(pipe, False)
        self._pipe = pipe

    async def write(self, work: Callable[[apsw.Connection], T], *, settles: bool = False) -> T:
        """As it is, and tell."""
        value = await super().write(work, settles=settles)
        with contextlib.suppress(BlockingIOError):
            os.write(self._pipe, b".")
        return value


class _TwoTransactions(ObjectStore):
    """Control: bills in a transaction of its own, under a name a try."""

    def __init__(self, store: SqliteStore) -> None:
        super().__init__(store)
        self._both = store

    async def close_line(self, line: Line, end: LineEnd, entries: Sequence[Entry]) -> int:
        name = f"{line.request_id}.{line.lease.rpartition('.')[2]}"
        num_new = await self._both.settle([replace(each, request_id=name) for each in entries])
        await super().close_line(line, end, [])
        return num_new


class _NoLease(_TwoTransactions):
    """Control: takes lines without marking them, and closes them whoever has them."""

    async def lease(
        self, batch_id: str, limit: int, until_s: float, *, suspects: bool = False, max_calm_tries: int = 2
    ) -> list[Line]:
        names = ("number", "custom_id", "offset", "length")
        sql = (
            f"SELECT {', '.join(names)} FROM lines WHERE batch_id = ? AND state = 'pending' "
            "ORDER BY number LIMIT ?"
        )
        found = await self._both.read(lambda db: db.execute(sql, (batch_id, limit)).fetchall())
        lease = f"{id(found)}.{time.monotonic_ns()}"
        return [
            Line(
                batch_id=batch_id,
                number=int(str(number)),
                custom_id=str(custom_id),
                offset=int(str(offset)),
                length=int(str(length)),
                num_tries=1,
                num_failures=0,
                lease=lease,
            )
            for number, custom_id, offset, length in found
        ]

    async def close_line(self, line: Line, end: LineEnd, entries: Sequence[Entry]) -> int:
        name = f"{line.request_id}.{line.lease.rpartition('.')[2]}"
        sql = "UPDATE lines SET state = 'leased', lease = ? WHERE batch_id = ? AND number = ?"
        values = (line.lease, line.batch_id, line.number)
        await self._both.write(lambda db: db.execute(sql, values).fetchall())
        return await ObjectStore.close_line(
            self, line, end, [replace(each, request_id=name) for each in entries]
        )


async def _serve(folder: Path, batch: Batch, file: StoredFile, guard: Guard, seed: int, pipe: int) -> None:
    """The child: run the batch to its end."""
    store = _Telling(folder / "server.db", pipe)
    accounts = Accounts(store)
    await accounts.start()
    prices = PriceList(prices={"m": {"standard": _PRICE}})
    gateway = Gateway(Router([Mirror(seed)]), accounts, prices, GatewayConfig())
    objects = {"on": ObjectStore, "transaction": _TwoTransactions, "lease": _NoLease}[guard](store)
    room = BatchRoom(
        store,
        accounts,
        folder / "files",
        endpoints_of(OpenAIApi(gateway, 0).routes()),
        lambda: 0,
        config=_CONFIG,
        objects=objects,
    )
    second = BatchWorker(
        objects,
        room.files,
        room.runner,
        room.config,
        find_key=_anonymous,
        num_calls=lambda: 0,
        now_s=accounts.now_s,
    )
    if (
        await store.read(lambda db: db.execute("SELECT 1 FROM batches WHERE id = ?", (batch.id,)).get)
    ) is None:
        await objects.add_batch(batch, 64, file=file)
    await room.start()
    second.start()
    while any(each.id == batch.id for each in await objects.open_batches()):
        await asyncio.sleep(0.01)
    await second.stop()
    await room.stop()
    await store.close()


async def _anonymous(key_id: str) -> Key:
    return ANONYMOUS


def run(
    *,
    kills: int,
    lines: int,
    seed: int,
    guard: Guard = "on",
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Kill at random until there were so many kills and the last batch has ended. `folder` is a new one."""
    rng = random.Random(seed)
    report, begun_s = Report(), time.monotonic()
    while report.num_kills < kills:
        batch, file = _new_batch(folder, lines, report.num_batches)
        while True:
            is_last = report.num_kills >= kills
            num_writes = _NEVER if is_last else rng.randrange(_MAX_WRITES)
            if _live(folder, batch, file, guard, rng.randrange(1 << 30), num_writes):
                break
            if is_last:
                report.notes.append(f"batch {report.num_batches} did not end")
                break
            report.num_kills += 1
            report.num_interrupted += _num_leased(folder)
        report.num_batches += 1
        report.num_lines += lines
        _check(folder, batch, lines, report)
        say(f"{report.num_kills} kills, {report.num_batches} batches, {report.violations} violations")
        if guard != "on" and report.violations:
            break
    report.seconds = time.monotonic() - begun_s
    return report


def _live(folder: Path, batch: Batch, file: StoredFile, guard: Guard, seed: int, num_writes: int) -> bool:
    """One child's life, which ends soon after so many of its writes; whether it came to its own end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            asyncio.run(_serve(folder, batch, file, guard, seed, writer))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    delay_s = random.Random(seed).uniform(0.0, _MAX_DELAY_S)
    if _follow(reader, num_writes, delay_s):
        _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError(f"a child ended with {status}")
        return True
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def _follow(reader: int, num_writes: int, delay_s: float) -> bool:
    """Read a byte a write until it is time; whether the child is gone before."""
    deadline = time.monotonic() + _PATIENCE_S
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while num_writes > 0 and time.monotonic() < deadline:
            if not select.select([pipe], [], [], 1.0)[0]:
                continue
            data = os.read(reader, min(num_writes, 4096))
            if not data:
                return True
            num_writes -= len(data)
        time.sleep(delay_s)
        return False


def _num_leased(folder: Path) -> int:
    """Lines that ran when the child was killed."""
    try:
        database = apsw.Connection(str(folder / "server.db"), flags=apsw.SQLITE_OPEN_READONLY)
        with contextlib.closing(database):
            return int(database.execute("SELECT count(*) FROM lines WHERE state = 'leased'").get or 0)
    except apsw.Error:  # killed before there were tables
        return 0


def _new_batch(folder: Path, lines: int, number: int) -> tuple[Batch, StoredFile]:
    """A batch whose input lies in the folder already."""
    (folder / "files").mkdir(exist_ok=True)
    now_s = time.time()
    file = StoredFile(
        id=new_id("file-"),
        project=ANONYMOUS.project,
        purpose="messages",
        filename="requests.jsonl",
        num_bytes=1,
        created_s=now_s,
    )
    batch = Batch(
        id=new_id("batch_"),
        project=ANONYMOUS.project,
        key_id=ANONYMOUS.id,
        api="openai",
        endpoint="/v1/completions",
        input_file_id=file.id,
        created_s=now_s,
        expires_s=now_s + 86400.0,
    )
    with (folder / "files" / file.id).open("w", encoding="utf-8") as out:
        for at in range(lines):
            body = {"model": "m", "prompt": _prompt(at)}
            line = {"custom_id": f"c{at}", "method": "POST", "url": "/v1/completions", "body": body}
            out.write(json.dumps(line) + "\n")
    # The file's row is made with the batch's; until then a child that starts must not sweep it away.
    return batch, file


def _prompt(at: int) -> str:
    return f"{'bad' if at % _BAD_EVERY == 1 else 'text'} {at}"


def _check(folder: Path, batch: Batch, lines: int, report: Report) -> None:
    """Compare files and ledger with what was asked."""
    database = apsw.Connection(str(folder / "server.db"), flags=apsw.SQLITE_OPEN_READONLY)
    sql = "SELECT status, output_file_id, error_file_id, num_answered, num_errored FROM batches WHERE id = ?"
    status, output_id, error_id, num_answered, num_errored = database.execute(sql, (batch.id,)).fetchall()[0]
    num_bad = len(range(1, lines, _BAD_EVERY))
    if (status, num_answered, num_errored) != ("completed", lines - num_bad, num_bad):
        report.notes.append(f"{status}, {num_answered} answered, {num_errored} errored")
    answered, errored = (_custom_ids(folder, str(each), report) for each in (output_id, error_id))
    expected = {f"c{at}": at % _BAD_EVERY == 1 for at in range(lines)}
    for custom_id, is_bad in expected.items():
        report.lost += not answered[custom_id] + errored[custom_id]
        report.repeated += max(0, answered[custom_id] + errored[custom_id] - 1)
        report.wrong += bool(answered[custom_id] if is_bad else errored[custom_id])
    billed: Counter[int] = Counter()
    sql = "SELECT request_id, price_nano_usd FROM ledger WHERE request_id GLOB ? || '_*'"
    for request_id, price in database.execute(sql, (batch.id,)):
        number = int(request_id.rpartition("_")[2].partition(".")[0])
        if not price:
            report.num_unpaid_tries += 1
            continue
        billed[number] += 1
        report.wrong += price != 2 * len(_prompt(number)) * _NANO_A_TOKEN
    report.billed_twice += sum(count - 1 for count in billed.values())
    report.unbilled += sum(not is_bad and not billed[int(name[1:])] for name, is_bad in expected.items())
    left = database.execute("SELECT count(*) FROM lines WHERE batch_id = ?", (batch.id,)).get
    if left > lines:
        report.notes.append(f"{left} rows are left")
    days, ledger = (
        database.execute(f"SELECT sum(price_nano_usd) FROM {table}").get for table in ("days", "ledger")
    )
    if days != ledger:
        report.notes.append(f"the days add up to {days}, the ledger to {ledger}")
    database.close()


def _custom_ids(folder: Path, file_id: str, report: Report) -> Counter[str]:
    """How often each custom id is in a file; answers that are not right are counted."""
    found: Counter[str] = Counter()
    if not file_id:
        return found
    with (folder / "files" / file_id).open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            found[line["custom_id"]] += 1
            response = line["response"]
            if response["status_code"] == 200:
                right = _prompt(int(line["custom_id"][1:]))[::-1]
                report.wrong += response["body"]["choices"][0]["text"] != right
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the line, or its controls, and print the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability.s19",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guard", choices=("on", "off"), default="on")
    options = parser.parse_args(arguments)
    good = True
    for guard in GUARDS[:1] if options.guard == "on" else GUARDS[1:]:
        folder = Path(tempfile.mkdtemp(prefix="s19-"))
        try:
            report = run(
                kills=options.kills,
                lines=options.lines,
                seed=options.seed,
                guard=guard,
                folder=folder,
                say=lambda text: print(text, file=sys.stderr, flush=True),
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        good = good and (report.violations == 0) == (guard == "on")
        name = "on" if guard == "on" else f"off ({guard})"
        print(f"S19 guard {name}: {report.violations} violations in {report.num_lines} lines")
        print("  batches over kill -9: every line answered once and billed once")
        print(f"  {report.seconds:.0f} s, seed {options.seed}, {origin()}")
        for key, value in asdict(report).items():
            if key != "seconds":
                print(f"  {key}: {value}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
