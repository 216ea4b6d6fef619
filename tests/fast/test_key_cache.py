"""Keys that are kept: found by the whole hash, good while nothing changes."""

import asyncio
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.core import StorageError
from tokenmill.server.keys import KeyCache
from tokenmill.store import Key, hash_secret

KEY = Key(id="key_1", name="a", project="p", created_s=0.0)


class FakeStore:
    """Keys in a dict, and how often it was asked."""

    def __init__(self, **keys: Key) -> None:
        self.keys = {hash_secret(secret): key for secret, key in keys.items()}
        self.version = 1
        self.num_finds = 0
        self.num_versions = 0
        self.fails = False

    async def find_key(self, secret_hash: bytes) -> Key | None:
        found = self.keys.get(secret_hash)
        self.num_finds += 1
        await asyncio.sleep(0)
        return found

    async def key_version(self) -> int:
        self.num_versions += 1
        await asyncio.sleep(0)
        if self.fails:
            raise StorageError("the disk is gone")
        return self.version


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_key_is_asked_for_once_while_nothing_changes() -> None:
    store, clock = FakeStore(tm_a=KEY), Clock()
    cache = KeyCache(store, clock)

    async def run() -> None:
        assert await asyncio.gather(*(cache("tm_a") for _ in range(50))) == [KEY] * 50
        first = store.num_finds
        for _ in range(10):
            clock.now_s += 0.3
            assert await cache("tm_a") == KEY
        assert store.num_finds == first and store.num_versions == 11

    asyncio.run(run())


def test_a_revoked_key_is_seen_as_soon_as_the_count_is_asked_for() -> None:
    store, clock = FakeStore(tm_a=KEY), Clock()
    cache = KeyCache(store, clock)

    async def run() -> None:
        assert await cache("tm_a") == KEY
        gone = dataclasses.replace(KEY, revoked_s=1.0)
        store.keys[hash_secret("tm_a")], store.version = gone, 2
        assert await cache("tm_a") == KEY  # the control: within a quarter of a second it is believed
        clock.now_s += 0.26
        assert await cache("tm_a") == gone

    asyncio.run(run())


def test_a_key_that_changes_while_it_is_looked_up_is_not_kept() -> None:
    store, clock = FakeStore(tm_a=KEY), Clock()
    cache = KeyCache(store, clock)

    async def run() -> None:
        await cache("tm_b")
        lookup = asyncio.create_task(cache("tm_a"))
        await asyncio.sleep(0)
        gone = dataclasses.replace(KEY, revoked_s=1.0)
        store.keys[hash_secret("tm_a")], store.version = gone, 2
        clock.now_s += 0.26
        await cache("tm_b")
        await lookup
        assert await cache("tm_a") == gone

    asyncio.run(run())


def test_unknown_secrets_are_not_kept_and_a_broken_store_opens_nothing() -> None:
    store, clock = FakeStore(tm_a=KEY), Clock()
    cache = KeyCache(store, clock)

    async def run() -> None:
        for at in range(100):
            assert await cache(f"tm_{at}") is None
        assert len(cache) == 0
        assert await cache("tm_a") == KEY
        store.fails = True
        clock.now_s += 0.26
        for _ in range(2):
            with pytest.raises(StorageError):
                await cache("tm_a")
        store.fails = False
        assert await cache("tm_a") == KEY

    asyncio.run(run())


@given(st.text(min_size=1, max_size=300), st.text(min_size=1, max_size=300))
def test_no_secret_opens_another_ones_key(one: str, other: str) -> None:
    """Also if the first twenty characters are the same."""
    one, other = "tm_" + "x" * 20 + one, "tm_" + "x" * 20 + other
    store = FakeStore(**{one: KEY})
    cache = KeyCache(store)

    async def run() -> None:
        await cache(one)
        found = await cache(other)
        same = hash_secret(one) == hash_secret(other)
        assert (found is not None) == same
        assert not same or one == other or not (one.isascii() and other.isascii() and len(one) < 257)

    asyncio.run(run())
