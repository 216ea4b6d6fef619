"""Splits: nothing that belongs together is parted, the same rows split the same way, and a change is told."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from tests.fast.workload_tools import row
from tokenmill.core import UsageError
from tokenmill.runs import RunFolder
from tokenmill.workload import PARTS, Row, Splits, freeze, look, num_looks, split
from tokenmill.workload.clusters import clusters, signatures

WORDS = [
    f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "ru", "so", "tu", "va") for b in ("bel", "dor", "fin", "gam")
]


def sentence(rng: random.Random, num_words: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def part_of(splits: Splits) -> dict[str, str]:
    return {each.id: name for name in PARTS for each in getattr(splits, name)}


def test_every_row_is_in_one_part_and_shares_are_kept() -> None:
    rows = [row(number, slice="ab"[number % 7 == 0]) for number in range(1000)]
    splits = split(rows)
    assert sorted(part_of(splits)) == sorted(each.id for each in rows)
    assert [len(getattr(splits, name)) for name in PARTS] == [700, 100, 200]
    rare = [sum(each.slice == "b" for each in getattr(splits, name)) for name in PARTS]
    assert all(abs(count - share * 143) <= 1.5 for count, share in zip(rare, (0.7, 0.1, 0.2), strict=True))
    assert splits.by == "cluster"


def test_seed_decides_and_the_order_of_the_log_does_not() -> None:
    rows = [row(number) for number in range(200)]
    mixed = rows[:]
    random.Random(1).shuffle(mixed)
    assert part_of(split(rows, 3)) == part_of(split(mixed, 3))
    assert part_of(split(rows, 3)) != part_of(split(rows, 4))
    assert split(rows, 3).digest == split(rows, 3).digest != split(rows, 4).digest


@pytest.mark.parametrize("by", ["cluster", "time"])
def test_rows_that_belong_together_are_never_parted(by: str) -> None:
    rng = random.Random(5)
    rows: list[Row] = []
    for group in range(120):
        text = sentence(rng)
        words = text.split()
        for at in range(3):
            words[rng.randrange(12)] += "s"[: at > 0]
            same = [text, " ".join(words), text.upper() + "  "][at]
            created = float(rng.randrange(10_000))
            rows.append(
                row(
                    len(rows),
                    same if group % 2 else sentence(rng),
                    created=created,
                    conversation="" if group % 2 else f"c{group}",
                )
            )
    splits = split(rows, by=by)  # type: ignore[arg-type]
    parts = part_of(splits)
    for start in range(0, len(rows), 3):
        assert len({parts[each.id] for each in rows[start : start + 3]}) == 1
        assert len({splits.clusters[each.id] for each in rows[start : start + 3]}) == 1
    assert len(set(splits.clusters.values())) == 120
    apart = split([dataclasses.replace(each, conversation="") for each in rows], near=1.0, by="cluster")
    assert len(set(apart.clusters.values())) > 200, "without clusters they would be apart"


def test_with_times_the_newest_are_certified() -> None:
    rng = random.Random(2)
    rows = [row(number, created=float(rng.randrange(10**6))) for number in range(300)]
    splits = split(rows)
    assert splits.by == "time"
    times = {name: [each.created or 0.0 for each in getattr(splits, name)] for name in PARTS}
    assert max(times["train"]) <= min(times["select"]) and max(times["select"]) <= min(times["certify"])
    asked_again = dataclasses.replace(rows[0], id="again", created=2e6, number=300)
    parts = part_of(split([*rows, asked_again]))
    assert parts["again"] == parts[rows[0].id], "what was asked before is not certified"
    with pytest.raises(UsageError, match="line 7 has no time"):
        split([*rows[:7], dataclasses.replace(rows[7], created=None)], by="time")


@pytest.mark.parametrize("num", [3, 4, 5, 10])
def test_every_part_of_a_small_log_has_a_row(num: int) -> None:
    for rows in ([row(n) for n in range(num)], [row(n, created=float(n)) for n in range(num)]):
        splits = split(rows)
        assert all(getattr(splits, name) for name in PARTS)


def test_too_few_questions_are_an_error() -> None:
    with pytest.raises(UsageError, match="3 rows are 1 different questions"):
        split([row(n, "the same question") for n in range(3)])
    with pytest.raises(UsageError, match="too few"):
        split([])


def test_a_part_may_have_no_share() -> None:
    splits = split([row(n) for n in range(50)], 0, (0.8, 0.0, 0.2))
    assert (len(splits.train), len(splits.select), len(splits.certify)) == (40, 0, 10)


def test_likeness_is_estimated_well() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        words = rng.permutation(400)
        common = int(rng.integers(20, 180))
        first = {f"{word:05}" for word in words[:200]}
        second = {f"{word:05}" for word in words[200 - common : 400 - common]}
        texts = ["".join(sorted(each)) for each in (first, second)]
        pieces = [{text[at : at + 5] for at in range(len(text) - 4)} for text in texts]
        true = len(pieces[0] & pieces[1]) / len(pieces[0] | pieces[1])
        found = signatures(texts)
        assert abs(float((found[0] == found[1]).mean()) - true) < 0.25


def test_near_texts_are_found_and_others_are_not() -> None:
    rng = random.Random(7)
    texts = ["".join(rng.choice("abcdefgh ") for _ in range(100)).strip() for _ in range(400)]
    near = [text[:50] + "xyz" + text[50:] for text in texts[:200]]
    apart = [text[:30] + "x" + text[30:50] + "y" + text[50:70] + "z" + text[70:] for text in texts[200:]]
    heads = clusters([row(number, text) for number, text in enumerate([*texts, *near, *apart])], 0.8)
    assert sum(heads[400 + at] == at for at in range(200)) >= 199, "about 0.89 alike"
    assert heads[:400] == list(range(400)) and heads[600:] == list(range(600, 800)), "at most 0.79 alike"


def test_a_system_prompt_makes_nobody_alike() -> None:
    system = {"role": "system", "content": "You are a helpful assistant. " * 50}
    rows = [
        dataclasses.replace(row(n), request={"messages": [system, *row(n).request["messages"]]})
        for n in range(100)
    ]
    assert len(set(clusters(rows, 0.7))) > 95


def test_a_service_that_asks_everything_is_no_conversation() -> None:
    rows = [row(n, conversation="backend" if n % 2 else f"c{n // 20}") for n in range(400)]
    heads = clusters(rows, 0.9)
    assert len({heads[at] for at in range(1, 400, 2)}) == 200
    assert len({heads[at] for at in range(0, 400, 2)}) == 20


def test_odd_texts_are_clustered_too() -> None:
    texts = ["", "a", "\U0001f600", "\ud800", "x" * 100_000, " ", "\uff21\uff22\uff23", "abc"]
    heads = clusters([row(at, text) for at, text in enumerate(texts)], 0.8)
    assert heads[7] == heads[6] == 6


def test_splits_are_frozen_and_what_changed_is_told(tmp_path: Path) -> None:
    rows = [row(number) for number in range(50)]
    with RunFolder(tmp_path / "run", {}) as run:
        freeze(run, split(rows))
        freeze(run, split(rows))
        changed = [dataclasses.replace(rows[0], answer="other"), *rows[1:]]
        with pytest.raises(UsageError, match=r"1 have another answer \(lines 0\)"):
            freeze(run, split(changed))
        with pytest.raises(UsageError, match=r"1 are new \(lines 50\), 2 are gone"):
            freeze(run, split([*rows[2:], row(50)]))
        with pytest.raises(UsageError, match="in another part"):
            freeze(run, split(rows, 1))
        freeze(run, split(rows))


def test_looks_at_the_certifying_rows_are_counted_once_each(tmp_path: Path) -> None:
    rows = [row(number) for number in range(50)]
    splits, other = split(rows), split(rows, 9)
    with RunFolder(tmp_path / "run", {}) as run:
        assert [look(run, splits, what) for what in ("a", "b", "a", "c")] == [1, 2, 2, 3]
        assert look(run, other, "a") == 1
    with RunFolder(tmp_path / "run", {}, resume=True) as run:
        assert (num_looks(run, splits), num_looks(run, other)) == (3, 1)
        assert look(run, splits, "b") == 3
