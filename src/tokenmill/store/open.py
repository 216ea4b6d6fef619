"""Which database keeps the state: a path is an SQLite file, `postgresql://` a server for several hosts."""

from pathlib import Path

from tokenmill.core import UsageError
from tokenmill.store.interface import Store
from tokenmill.store.postgres import PostgresStore
from tokenmill.store.sqlite import SqliteStore

__all__ = ["open_store"]


def open_store(url: str) -> Store:
    """The store at a path, or at `postgresql://USER:PASSWORD@HOST/NAME` (the extra `postgres`).

    Raises UsageError for another scheme, StorageError if it cannot be opened.
    """
    scheme, found, _ = url.partition("://")
    if not found:
        return SqliteStore(Path(url).expanduser())
    if scheme in ("postgresql", "postgres"):
        return PostgresStore(url)
    raise UsageError(f"a store cannot be at {scheme}://", hint="give the path of a file, or postgresql://...")
