"""Holding a process to a memory limit, so that what is said to fit is shown to fit.

Memory for a file counts for whoever reads it first, as in a container: a control group holds the pages of
mapped weights too, which no resource limit does.
"""

import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["forget_pages", "limiter", "memory_group"]

_ROOTS = (
    ("memory", Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    ("", Path("/sys/fs/cgroup"), "memory.max"),
)
"""Both versions of control groups: the controller's name, where its groups are, the file with the limit."""


@contextmanager
def memory_group(limit: int) -> Iterator[Path | None]:
    """A control group inside our own that may use `limit` bytes; None where none can be made."""
    group = None
    for controller, root, file in _ROOTS:
        own = re.search(rf"^\d+:{controller}:/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        if own is not None and root.is_dir():
            group = _make(root / own[1] / f"tokenmill_{os.getpid()}", file, limit)
        if group is not None:
            break
    try:
        yield group
    finally:
        if group is not None:
            group.rmdir()


def limiter(group: Path | None, limit: int) -> Callable[[], None]:
    """What a child calls before it runs: it joins the group, or without one limits its own data."""

    def enter() -> None:
        if group is None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        else:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    return enter


def forget_pages(*folders: Path) -> None:
    """Have files leave the system's cache, where they count for whoever read or wrote them first."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _make(group: Path, file: str, limit: int) -> Path | None:
    try:
        group.mkdir()
    except OSError:
        return None
    try:
        (group / file).write_text(str(limit))
    except OSError:
        group.rmdir()
        return None
    return group
