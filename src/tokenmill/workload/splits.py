"""Train, select, certify: which rows make candidates, which choose among them, and which prove the last one.

Rows that belong together (clusters.py) are never in two parts. With times, the newest clusters are certified,
as a deployment is judged on what comes after it was made; without, chance decides, slice by slice. A split is
written into the run's folder once; whoever comes later with another log is told what has changed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from tokenmill.core import UsageError
from tokenmill.runs import RunFolder, content_hash
from tokenmill.workload.clusters import clusters
from tokenmill.workload.row import Row, content_digest

__all__ = ["PARTS", "Splits", "freeze", "look", "num_looks", "split"]

PARTS: Final = ("train", "select", "certify")
_NAME: Final = "splits"
_LOOKS: Final = "looks"
_SHOWN: Final = 5


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The rows of each part, in the log's order. `digest` names them and what they say; `by` is "time" or
    "cluster"; `clusters` has for each row's id that of the first row of its cluster: what counts as one.
    """

    train: tuple[Row, ...]
    select: tuple[Row, ...]
    certify: tuple[Row, ...]
    digest: str
    by: str
    clusters: Mapping[str, str]
    seed: int
    shares: tuple[float, float, float] = (0.7, 0.1, 0.2)

    @property
    def certify_digest(self) -> str:
        """Names the rows that certify: looks at them are counted under it."""
        return content_hash([[row.id, content_digest(row)] for row in self.certify])

    def to_json(self) -> dict[str, Any]:
        """What is frozen: each row's id with a digest of what it says."""
        parts = {name: {row.id: content_digest(row) for row in getattr(self, name)} for name in PARTS}
        return {
            "digest": self.digest,
            "by": self.by,
            "seed": self.seed,
            "shares": list(self.shares),
            "num_clusters": len(set(self.clusters.values())),
            "parts": parts,
        }


def split(
    rows: Sequence[Row],
    seed: int = 0,
    shares: tuple[float, float, float] = (0.7, 0.1, 0.2),
    *,
    by: Literal["auto", "time", "cluster"] = "auto",
    near: float = 0.7,
) -> Splits:
    """Split whole clusters of rows. Raises UsageError for too few clusters, or a time that is missing."""
    has_times = bool(rows) and all(row.created is not None for row in rows)
    if by == "time" and not has_times:
        missing = next((row.number for row in rows if row.created is None), 0)
        raise UsageError(f"line {missing} has no time to split by", hint="use by: cluster")
    is_by_time = by == "time" or (by == "auto" and has_times and len({row.created for row in rows}) > 2)
    heads = clusters(rows, near)
    groups: dict[int, list[int]] = {}
    for at, head in enumerate(heads):
        groups.setdefault(head, []).append(at)
    if len(groups) < sum(share > 0 for share in shares):
        raise UsageError(
            f"{len(rows)} rows are {len(groups)} different questions, too few to split",
            hint="give a longer log",
        )
    whole = list(groups.values())
    parts = _by_time(rows, whole, shares) if is_by_time else _by_chance(rows, whole, shares, seed)
    chosen = [tuple(rows[at] for at in sorted(part)) for part in parts]
    digest = content_hash([[[row.id, content_digest(row)] for row in part] for part in chosen])
    return Splits(
        train=chosen[0],
        select=chosen[1],
        certify=chosen[2],
        digest=digest,
        by="time" if is_by_time else "cluster",
        clusters={row.id: rows[head].id for row, head in zip(rows, heads, strict=True)},
        seed=seed,
        shares=shares,
    )


def _by_time(
    rows: Sequence[Row], groups: list[list[int]], shares: tuple[float, float, float]
) -> list[list[int]]:
    """Clusters in the order of their first rows: what is certified has never been asked before."""

    def first(group: list[int]) -> tuple[float, str]:
        return min((rows[at].created or 0.0, rows[at].id) for at in group)

    return _cut(sorted(groups, key=first), shares, len(rows))


def _by_chance(
    rows: Sequence[Row], groups: list[list[int]], shares: tuple[float, float, float], seed: int
) -> list[list[int]]:
    """Clusters in an order that only seed and ids decide, cut for each slice of its own."""

    def place(group: list[int]) -> str:
        name = min(rows[at].id for at in group)
        return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()

    ordered = sorted(groups, key=place)
    slices: dict[str, list[list[int]]] = {}
    for group in ordered:
        slices.setdefault(rows[group[0]].slice, []).append(group)
    parts: list[list[int]] = [[], [], []]
    num_rows = 0
    for name in sorted(slices):
        num_rows += sum(map(len, slices[name]))
        _fill(parts, slices[name], shares, num_rows)
    is_whole = all(part or not share for part, share in zip(parts, shares, strict=True))
    return parts if is_whole else _cut(ordered, shares, len(rows))


def _fill(
    parts: list[list[int]], groups: Sequence[list[int]], shares: tuple[float, float, float], num_rows: int
) -> None:
    """Add the groups in order, to each part until it has its share of `num_rows`, with what it had before."""
    at = 0
    for group in groups:
        while at < len(parts) - 1 and len(parts[at]) >= shares[at] * num_rows:
            at += 1
        parts[at].extend(group)


def _cut(groups: Sequence[list[int]], shares: tuple[float, float, float], num_rows: int) -> list[list[int]]:
    """As `_fill`, but every part that has a share gets a group, however large the first ones are."""
    parts: list[list[int]] = [[], [], []]
    at = 0
    for number, group in enumerate(groups):
        num_waiting = sum(share > 0 for share in shares[at + 1 :])
        is_full = len(parts[at]) >= shares[at] * num_rows or len(groups) - number <= num_waiting
        while at < len(parts) - 1 and (not shares[at] or (parts[at] and is_full)):
            at += 1
            is_full = not shares[at]
        parts[at].extend(group)
    return parts


def freeze(run: RunFolder, splits: Splits) -> None:
    """Write the splits into the run's folder, or hold them against those that are there.

    Raises UsageError that says which rows came, went or changed.
    """
    before = run.read(_NAME)
    if before is None:
        run.write(_NAME, splits.to_json())
        return
    if before.get("digest") != splits.digest:
        raise UsageError(
            f"{run.path} was split from other rows: {_changes(before, splits)}",
            hint="use another folder for this run, or put the log back as it was",
        )


def _changes(before: Mapping[str, Any], splits: Splits) -> str:
    try:
        old = {id: (part, said) for part in PARTS for id, said in before["parts"][part].items()}
    except (KeyError, TypeError, AttributeError):
        return "its splits.json is damaged"
    rows = {row.id: (part, row) for part in PARTS for row in getattr(splits, part)}
    new = [row for id, (_, row) in rows.items() if id not in old]
    changed = [row for id, (_, row) in rows.items() if id in old and old[id][1] != content_digest(row)]
    moved = [row for id, (part, row) in rows.items() if id in old and old[id][0] != part]
    gone = len(old.keys() - rows.keys())
    said = [f"{len(new)} are new{_numbers(new)}"] if new else []
    said += [f"{gone} are gone"] if gone else []
    said += [f"{len(changed)} have another answer{_numbers(changed)}"] if changed else []
    said += (
        [f"{len(moved)} are in another part (other seed, shares or likeness)"] if moved and not said else []
    )
    return ", ".join(said) or "their order is another"


def _numbers(rows: Sequence[Row]) -> str:
    numbers = ", ".join(str(row.number) for row in sorted(rows, key=lambda row: row.number)[:_SHOWN])
    return f" (lines {numbers}{', ...' if len(rows) > _SHOWN else ''})"


def look(run: RunFolder, splits: Splits, what: str) -> int:
    """Note that `what` (a candidate's hash) was measured on the rows that certify; how many different things
    were so far. The same one again is no new look: a killed run goes on.
    """
    seen = _looks(run, splits)
    if what not in seen:
        run.append(_LOOKS, [{"certify": splits.certify_digest, "what": what}])
        seen.add(what)
    return len(seen)


def num_looks(run: RunFolder, splits: Splits) -> int:
    """How many different things were measured on the rows that certify."""
    return len(_looks(run, splits))


def _looks(run: RunFolder, splits: Splits) -> set[str]:
    digest = splits.certify_digest
    return {str(each.get("what")) for each in run.lines(_LOOKS) if each.get("certify") == digest}
