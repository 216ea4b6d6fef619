"""S20: what the store said is durable is there, whatever happens to the process, the disk or the power.

Three parts, each with its control:

- kills: a process writes and says so; it is killed (SIGKILL) at a random time, `cases` times. Control: it
  says so before the store did.
- faults: operation N on the disk fails, for every N of a scenario, in four ways (below 1,000 `cases` for
  some N). After it the store takes no
  more writes, reads go on, and opened again everything it said is there. Control: it goes on writing.
- power: the power is cut at a random operation; what was not synced is lost or torn at 512 bytes, `cases`
  times, on files that have been through earlier cuts. Control: `synchronous=NORMAL`.

A violation is a line of the ledger that was acknowledged and is not there, half of a transaction, a daily sum
that is not that of the lines, a damaged file, a hang, or another error than StorageError.
"""

import asyncio
import contextlib
import itertools
import os
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final
from unittest.mock import patch

import apsw

from benchmarks.reliability.command import main
from benchmarks.reliability.disks import FAULTS, FaultyDisk, PowerDisk
from scripts.scorecard import Line
from tokenmill.core import StorageError
from tokenmill.store import Entry, Hold, Key, SqliteConfig, SqliteStore, database

__all__ = ["run", "run_faults", "run_kills", "run_power"]

_CASES: Final = 1000
_CYCLES_A_FILE: Final = 20
_CONFIG: Final = SqliteConfig(min_free_bytes=0, log_pages=12)
_HANG_S: Final = 30.0
_AT_S: Final = 1_790_000_000.0


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """All three parts."""
    began = time.perf_counter()
    parts = [
        run_kills(cases, seed, guard),
        run_faults(seed, guard, stride=max(1, _CASES // cases)),
        run_power(cases, seed, guard),
    ]
    figures = {f"{part.name}: {name}": value for part in parts for name, value in part.figures.items()}
    if not guard and not all(part.violations for part in parts):
        # Each control must find something; one that does not is reported as a control that failed.
        parts = [part for part in parts if not part.violations]
    return Line(
        name="S20",
        what="acknowledged writes of the store after kills, failing disks and power cuts",
        cases=sum(part.cases for part in parts),
        violations=sum(part.violations for part in parts),
        seconds=time.perf_counter() - began,
        figures={**figures, "SQLite": apsw.sqlite_lib_version()},
    )


class _Promises:
    """What a store acknowledged: requests whose two lines are written."""

    def __init__(self) -> None:
        self.acknowledged: list[str] = []
        self.num_checked = 0

    def breaches(self, path: Path) -> Counter[str]:
        """What is wrong with the file at `path`, opened as any program would."""
        found = Counter[str]()
        try:
            connection = apsw.Connection(str(path))
            lines = connection.execute(
                "SELECT request_id, count(*) FROM ledger GROUP BY request_id"
            ).fetchall()
            days = connection.execute("SELECT coalesce(sum(price_nano_usd), 0) FROM days").get
            total = connection.execute("SELECT coalesce(sum(price_nano_usd), 0) FROM ledger").get
            integrity = connection.pragma("integrity_check")
            connection.close()
        except apsw.Error as error:
            if not self.acknowledged and isinstance(error, apsw.SQLError):
                return found  # cut before the tables were made
            return Counter({f"damaged ({type(error).__name__})": 1})
        present = {str(name): num for name, num in lines}
        found["lost"] = sum(name not in present for name in self.acknowledged)
        found["half a transaction"] = sum(num != 2 for num in present.values())
        found["wrong daily sum"] = int(days != total)
        found["damaged"] = int(integrity != "ok")
        self.num_checked += len(self.acknowledged)
        return +found


def _pair(name: str) -> list[Entry]:
    return [_entry(name, 0), _entry(name, 1)]


def _entry(name: str, attempt: int) -> Entry:
    return Entry(
        request_id=name,
        attempt=attempt,
        kind="local",
        at_s=_AT_S,
        key_id="key_k",
        project="mill",
        model="small",
        deployment="here",
        tier="standard",
        finish="completed",
        num_prompt_tokens=1,
        num_cached_tokens=0,
        num_output_tokens=1,
        nanoseconds=1,
        nanojoules=1,
        cost_nano_usd=1,
        price_nano_usd=7,
    )


def run_kills(cases: int, seed: int, guard: bool) -> Line:
    """Part one. The child is forked, so this process has no threads and no open database."""
    began, rng, found = time.perf_counter(), Random(seed), Counter[str]()
    num_acknowledged = 0
    with tempfile.TemporaryDirectory(prefix="s20-") as folder:
        for first in range(0, cases, _CYCLES_A_FILE):
            path = Path(folder) / f"{first}.db"
            promises = _Promises()
            for cycle in range(first, min(first + _CYCLES_A_FILE, cases)):
                promises.acknowledged += _killed_child(path, f"c{cycle}", rng.uniform(0.0, 0.08), guard)
                found += promises.breaches(path) if path.exists() else Counter()
            num_acknowledged += len(promises.acknowledged)
    return Line(
        name="kills",
        what="acknowledged writes after SIGKILL",
        cases=cases,
        violations=found.total(),
        seconds=time.perf_counter() - began,
        figures={"cycles": cases, "acknowledged": num_acknowledged, **found},
    )


def _killed_child(path: Path, name: str, delay_s: float, guard: bool) -> list[str]:
    """What a child that writes until it is killed has acknowledged."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(reading)
            asyncio.run(_write_for_ever(path, name, writing, guard))
        os._exit(1)
    os.close(writing)
    said = b""
    # The first word says that the file is open; half of the kills come before it.
    if delay_s > 0.01:
        select.select([reading], [], [], 5.0)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    while part := os.read(reading, 1 << 16):
        said += part
    os.close(reading)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the child ended by itself ({status})"
    return said.decode().split()


async def _write_for_ever(path: Path, name: str, pipe: int, guard: bool) -> None:
    store = SqliteStore(path, _CONFIG)

    async def write(worker: int) -> None:
        for i in itertools.count():
            request = f"{name}-{worker}-{i}"
            if not guard:
                os.write(pipe, f"{request}\n".encode())
            await store.settle(_pair(request))
            if guard:
                os.write(pipe, f"{request}\n".encode())

    await asyncio.gather(*(write(worker) for worker in range(8)))


def run_faults(seed: int, guard: bool, stride: int = 1) -> Line:
    """Part two: every operation, or with a stride every so many, and every kind of fault."""
    began, found, counts = time.perf_counter(), Counter[str](), Counter[str]()
    names = itertools.count()
    patches: list[Any] = (
        [] if guard else [patch.object(database.Database, "_failure", _NeverFailed(), create=True)]
    )
    with contextlib.ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        for fault, first in zip(FAULTS, itertools.count(1), strict=False):
            for at in itertools.count(min(first, stride), stride):
                disk = FaultyDisk(f"s20-{os.getpid()}-{seed}-{next(names)}", fault, at)
                found += _one_fault(disk)
                disk.unregister()
                if not disk.has_failed:
                    break
                counts[fault] += 1
    return Line(
        name="faults",
        what="every operation on the disk fails once, in four ways",
        cases=counts.total(),
        violations=found.total(),
        seconds=time.perf_counter() - began,
        figures={**counts, **found},
    )


class _NeverFailed:
    """The control: a store that forgets that a write failed."""

    def __get__(self, _instance: object, _owner: object) -> str:
        return ""

    def __set__(self, _instance: object, _value: str) -> None:
        pass


def _one_fault(disk: FaultyDisk) -> Counter[str]:
    with tempfile.TemporaryDirectory(prefix="s20-") as folder:
        path, promises = Path(folder) / "server.db", _Promises()
        found = asyncio.run(_bounded(_scenario(path, disk, promises)))
        return found + promises.breaches(path)


async def _bounded(work: Any) -> Counter[str]:
    try:
        result: Counter[str] = await asyncio.wait_for(work, _HANG_S)
    except TimeoutError:
        return Counter({"hang": 1})
    except StorageError:
        return Counter()
    except Exception as error:
        return Counter({f"raised {type(error).__name__}": 1})
    return result


async def _scenario(path: Path, disk: FaultyDisk, promises: _Promises) -> Counter[str]:
    """A life of a store with all kinds of writes; what it raises must be StorageError."""
    store = SqliteStore(path, _CONFIG, vfs=disk.name)
    found = Counter[str]()
    try:
        refused = 0
        for i, write in enumerate(_writes(store, promises)):
            try:
                await write()
                if refused:
                    found["wrote after a failed write"] += 1
            except StorageError:
                refused += 1
                if i % 3 == 0:
                    found += await _still_reads(store, promises, disk)
    finally:
        await store.close()
    return found


async def _still_reads(store: SqliteStore, promises: _Promises, disk: FaultyDisk) -> Counter[str]:
    """Reads go on after a failed write, as long as the disk itself answers."""
    try:
        if await store.spent("key_k", 0.0) < 14 * len(promises.acknowledged):
            return Counter({"read less than was acknowledged": 1})
    except StorageError:
        # A dead disk opens no file any more for the first read.
        return Counter() if disk.num_operations else Counter({"no reads": 1})
    return Counter()


def _writes(store: SqliteStore, promises: _Promises) -> Sequence[Callable[[], Any]]:
    async def settle(name: str) -> None:
        await store.settle(_pair(name))
        promises.acknowledged.append(name)

    async def together(name: str) -> None:
        tasks = [settle(f"{name}-{i}") for i in range(4)]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    key = Key(id="key_k", name="k", project="mill", created_s=_AT_S)
    held = Hold(request_id="held", attempt=0, key_id="key_k", nano_usd=5, at_s=_AT_S)
    return [
        lambda: store.add_key(key, bytes(32)),
        lambda: together("a"),
        lambda: store.hold(held),
        lambda: settle("held"),
        lambda: store.remember("mill", "once", b"1", _AT_S),
        lambda: store.answer("mill", "once", 200, b"x" * 9000),
        lambda: together("b"),
        lambda: together("c"),
        lambda: store.erase_end_user("mill", "nobody"),
        lambda: together("d"),
        lambda: settle("last"),
    ]


def run_power(cases: int, seed: int, guard: bool) -> Line:
    """Part three."""
    began, rng, found = time.perf_counter(), Random(seed), Counter[str]()
    num_acknowledged = num_cuts = 0
    with patch.object(database, "_SYNCHRONOUS", "FULL" if guard else "NORMAL"):
        for chain in range(-(-cases // _CYCLES_A_FILE)):
            cycles = min(_CYCLES_A_FILE, cases - chain * _CYCLES_A_FILE)
            promises, cuts, breaches = _power_chain(rng, f"s20-{os.getpid()}-{seed}-power-{chain}", cycles)
            num_acknowledged += len(promises.acknowledged)
            num_cuts += cuts
            found += breaches
    return Line(
        name="power",
        what="acknowledged writes after a power cut",
        cases=cases,
        violations=found.total(),
        seconds=time.perf_counter() - began,
        figures={"cycles": cases, "power cuts": num_cuts, "acknowledged": num_acknowledged, **found},
    )


def _power_chain(rng: Random, name: str, cycles: int) -> tuple[_Promises, int, Counter[str]]:
    """One file through power cut after power cut, some of them while it is being opened."""
    found, promises, num_cuts = Counter[str](), _Promises(), 0
    with tempfile.TemporaryDirectory(prefix="s20-") as made:
        before = Path(made) / "start"
        before.mkdir()
        for cycle in range(cycles):
            disk = PowerDisk(f"{name}-{cycle}", before, rng.choice([rng.randint(1, 30), rng.randint(1, 250)]))
            found += asyncio.run(_bounded(_powered(before / "server.db", disk, promises, f"p{cycle}")))
            num_cuts += disk.is_cut
            disk.unregister()
            after = Path(made) / str(cycle)
            after.mkdir()
            disk.leave(after, rng)
            found += _breaches_of_a_copy(after, promises, Path(made) / f"{cycle}-look")
            if found:
                break
            before = after
    return promises, num_cuts, found


async def _powered(path: Path, disk: PowerDisk, promises: _Promises, name: str) -> Counter[str]:
    store = SqliteStore(path, _CONFIG, vfs=disk.name)

    async def write(worker: int) -> None:
        for i in range(12):
            await store.settle(_pair(f"{name}-{worker}-{i}"))
            promises.acknowledged.append(f"{name}-{worker}-{i}")

    results = await asyncio.gather(*(write(worker) for worker in range(3)), return_exceptions=True)
    await store.close()
    errors = [each for each in results if each is not None and not isinstance(each, StorageError)]
    return Counter(f"raised {type(error).__name__}" for error in errors)


def _breaches_of_a_copy(folder: Path, promises: _Promises, copy: Path) -> Counter[str]:
    """Looking moves the log into the file, so it looks at a copy."""
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    path = copy / "server.db"
    if not path.exists():
        return Counter({"lost": len(promises.acknowledged)}) if promises.acknowledged else Counter()
    return promises.breaches(path)


if __name__ == "__main__":
    sys.exit(main("s20", run, _CASES, __doc__))
