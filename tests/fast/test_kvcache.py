"""Block accounting: random histories against a plain model, and each guard shown to bite."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.kvcache import BlockPool, BlockTable, PrefixChain, prefix_root

Action = tuple[str, int]
ACTIONS = st.lists(st.tuples(st.sampled_from(["allocate", "share", "free"]), st.integers(0, 9)), max_size=60)


@given(num_blocks=st.integers(1, 12), actions=ACTIONS)
def test_random_histories_keep_the_accounts(num_blocks: int, actions: list[Action]) -> None:
    pool = BlockPool(num_blocks)
    owners: list[list[int]] = []
    for kind, number in actions:
        if kind == "allocate":
            assert pool.can_allocate(number) == (number <= pool.num_free)
            if pool.can_allocate(number):
                owners.append(pool.allocate(number))
        elif owners and kind == "share":
            pool.share(owners[number % len(owners)])
            owners.append(list(owners[number % len(owners)]))
        elif owners:
            pool.free(owners.pop(number % len(owners)))
        held = [block for blocks in owners for block in blocks]
        pool.check_integrity(held)
        assert pool.num_in_use == len(set(held))
        assert all(pool.num_owners(block) == held.count(block) for block in range(num_blocks))
    for blocks in owners:
        pool.free(blocks)
    pool.check_integrity([])
    assert pool.num_free == num_blocks


def test_last_freed_is_first_out_so_unused_memory_stays_untouched() -> None:
    pool = BlockPool(100)
    for _ in range(50):
        pool.free(pool.allocate(3))
    assert sorted(pool.allocate(3)) == [0, 1, 2]


def test_freeing_twice_is_an_assertion() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_sharing_a_free_block_is_an_assertion() -> None:
    with pytest.raises(AssertionError, match="cannot be shared"):
        BlockPool(4).share([1])


def test_allocating_too_much_is_an_assertion() -> None:
    pool = BlockPool(4)
    assert not pool.can_allocate(5)
    with pytest.raises(AssertionError, match="5 asked, 4 available"):
        pool.allocate(5)


def test_integrity_sees_leaks_lost_blocks_and_duplicates() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="leaked or lost"):
        pool.check_integrity(blocks[:1])
    with pytest.raises(AssertionError, match="leaked or lost"):
        pool.check_integrity([*blocks, 3])
    pool._free.append(pool._free[0])
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity()
    pool._free[-1] = blocks[0]
    with pytest.raises(AssertionError, match="two states"):
        pool.check_integrity()


@given(size=st.integers(1, 7), stop=st.integers(0, 40), data=st.data())
def test_spans_and_slots_are_where_the_blocks_are(size: int, stop: int, data: st.DataObject) -> None:
    table = BlockTable(size)
    num_blocks = table.num_missing(stop)
    blocks = data.draw(st.permutations(range(num_blocks + 3)))[:num_blocks]
    table.extend(blocks)
    assert table.num_missing(stop) == 0 and table.blocks == list(blocks)
    start = data.draw(st.integers(0, stop))
    expected = [blocks[p // size] * size + p % size for p in range(start, stop)]
    assert table.slots(start, stop).tolist() == expected
    spans = table.spans(stop).tolist()
    seen = [
        (b * size + row, first + row)
        for b, first, rows in zip(spans[::3], spans[1::3], spans[2::3], strict=True)
        for row in range(rows)
    ]
    assert seen == list(zip(table.slots(0, stop).tolist(), range(stop), strict=True))
    assert table.spans(stop).tolist() == spans, "asking does not change the table"
    assert table.clear() == list(blocks)
    assert table.num_blocks == 0


def test_a_table_without_room_is_an_assertion() -> None:
    table = BlockTable(4)
    table.extend([7])
    with pytest.raises(AssertionError, match="no room for 5"):
        table.slots(0, 5)
    with pytest.raises(AssertionError, match="no room for 5"):
        table.spans(5)


def published(pool: BlockPool, *names: str) -> list[int]:
    """Blocks with these contents, without owners, given up in this order."""
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks, names, strict=True):
        pool.publish(block, name.encode(), name.encode())
    pool.free(blocks)
    return blocks


def test_a_block_without_owners_is_cached_if_its_content_has_a_name() -> None:
    pool = BlockPool(4)
    named, nameless = pool.allocate(2)
    pool.publish(named, b"key", b"tokens")
    pool.free([named, nameless])
    assert (pool.num_free, pool.num_cached, pool.num_in_use) == (3, 1, 0)
    assert pool.find(b"key", b"tokens") == named and pool.find(b"other", b"tokens") is None
    pool.share([named])
    assert (pool.num_free, pool.num_cached, pool.num_in_use) == (3, 0, 1)
    pool.check_integrity([named])


def test_a_hit_compares_tokens_so_that_equal_keys_are_not_believed() -> None:
    pool = BlockPool(4)
    published(pool, "a")
    assert pool.find(b"a", b"b") is None


def test_the_block_unused_longest_is_evicted_and_only_when_none_is_free() -> None:
    pool = BlockPool(4)
    a, b, c = published(pool, "a", "b", "c")
    pool.share([a])
    pool.free([a])
    assert pool.allocate(1) not in ([a], [b], [c])
    assert pool.allocate(2) == [b, c] or set(pool._content) == {a}
    assert pool.find(b"a", b"a") == a and pool.find(b"b", b"b") is None
    pool.check_integrity()


def test_one_content_has_one_block() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.publish(first, b"key", b"tokens")
    pool.publish(second, b"key", b"tokens")
    assert pool.find(b"key", b"tokens") == first
    pool.free([second, first])
    assert (pool.num_free, pool.num_cached) == (3, 1)


def test_forgotten_content_is_not_found_in_use_nor_cached() -> None:
    pool = BlockPool(4)
    (cached,) = published(pool, "cached")
    pool.forget(cached)
    (used,) = pool.allocate(1)
    pool.publish(used, b"used", b"")
    pool.forget(used)
    pool.free([used])
    assert pool.num_free == 4 and pool.find(b"cached", b"cached") is pool.find(b"used", b"") is None
    pool.forget(used)
    pool.check_integrity([])


def test_only_blocks_in_use_are_published() -> None:
    with pytest.raises(AssertionError, match="not in use"):
        BlockPool(4).publish(1, b"key", b"")


def test_integrity_sees_a_name_without_content() -> None:
    pool = BlockPool(4)
    (block,) = published(pool, "a")
    del pool._content[block]
    with pytest.raises(AssertionError, match="out of step"):
        pool.check_integrity()


ROOT = {"tenant": "t", "model": "m", "layout": "bf16", "adapter": "", "intervention": ""}


def test_every_field_of_the_root_gives_another_chain() -> None:
    roots = {prefix_root(**ROOT)} | {prefix_root(**{**ROOT, name: "x"}) for name in ROOT}
    assert len(roots) == 1 + len(ROOT)
    # Lengths are part of it: a border cannot be moved from one field to the next.
    assert prefix_root(**{**ROOT, "tenant": "ab", "model": "c"}) != prefix_root(
        **{**ROOT, "tenant": "a", "model": "bc"}
    )
    assert prefix_root(**{**ROOT, "tenant": "t6:model:1:"}) != prefix_root(**ROOT)


@given(
    st.lists(st.integers(0, 3), min_size=8, max_size=24), st.lists(st.integers(0, 3), min_size=8, max_size=24)
)
def test_keys_are_equal_exactly_as_far_as_the_tokens(first: list[int], second: list[int]) -> None:
    chains = [(PrefixChain(b"root", 4), array("i", tokens)) for tokens in (first, second)]
    for index in range(min(len(first), len(second)) // 4):
        keys = [chain.key(index, tokens) for chain, tokens in chains]
        stop = (index + 1) * 4
        assert (keys[0] == keys[1]) == (first[:stop] == second[:stop])
    with pytest.raises(AssertionError, match="not full"):
        chains[0][0].key(len(first) // 4, chains[0][1])


def _kept(pool: BlockPool, tenant: str, keys: range) -> int:
    return sum(pool.find(f"{tenant}{key}".encode(), b"") is not None for key in keys)


def _cache(pool: BlockPool, tenant: str, keys: range, group: int = 1) -> None:
    """Use a block for each key and give it up, `group` at a time."""
    for first in range(keys.start, keys.stop, group):
        blocks = pool.allocate(group)
        for key, block in enumerate(blocks, start=first):
            pool.publish(block, f"{tenant}{key}".encode(), b"", tenant)
        pool.free(blocks)
        pool.check_integrity()


def test_who_floods_the_cache_evicts_itself() -> None:
    pool = BlockPool(100)
    _cache(pool, "victim", range(40))
    _cache(pool, "flooder", range(1000), group=10)
    assert _kept(pool, "victim", range(40)) == 40
    assert _kept(pool, "flooder", range(940, 1000)) == 60, "of a tenant the newest are kept"
    control = BlockPool(100)
    _cache(control, "", range(40))
    _cache(control, "", range(40, 1040), group=10)
    assert _kept(control, "", range(40)) == 0, "the control: all are one tenant"


def test_two_that_want_all_get_a_half_each() -> None:
    pool = BlockPool(100)
    _cache(pool, "a", range(100))
    _cache(pool, "b", range(1000))
    assert 49 <= _kept(pool, "a", range(50, 100)) <= 51 and 49 <= _kept(pool, "b", range(1000)) <= 51
    _cache(pool, "c", range(1000))
    assert min(_kept(pool, tenant, range(1000)) for tenant in "abc") >= 33


def test_what_a_flood_holds_counts_too() -> None:
    pool = BlockPool(100)
    _cache(pool, "victim", range(20))
    held = pool.allocate(60)
    for key, block in enumerate(held):
        pool.publish(block, f"flooder{key}".encode(), b"", "flooder")
    _cache(pool, "flooder", range(1000, 1100), group=10)
    assert _kept(pool, "victim", range(20)) == 20
    pool.free(held)
    pool.check_integrity([])
