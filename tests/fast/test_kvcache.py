"""Block accounting: random histories against a plain model, and each guard shown to bite."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.kvcache import BlockPool, BlockTable

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
