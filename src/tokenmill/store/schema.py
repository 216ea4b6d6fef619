"""The tables of an SQLite store: numbered migrations, applied in order, each once.

Integers are exact to 2^63; what is larger (a sum of nanojoules) is put together from two halves by whoever
reads it. `days` is derived from `ledger`, in the same transaction, so that a budget need not add up lines.
"""

from typing import Final

from tokenmill.store.object_tables import OBJECT_TABLES

__all__ = ["APPLICATION_ID", "MIGRATIONS"]

APPLICATION_ID: Final = 0x746D6C31
"""`tml1`: what tells our file from another program's."""

_FIRST: Final = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    secret_hash BLOB NOT NULL UNIQUE CHECK (length(secret_hash) = 32),
    created_s REAL NOT NULL,
    body TEXT NOT NULL
) STRICT;

CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO counters VALUES ('key_version', 0);

CREATE TABLE ledger (
    id INTEGER PRIMARY KEY,
    request_id TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    kind TEXT NOT NULL,
    at_s REAL NOT NULL,
    key_id TEXT NOT NULL,
    project TEXT NOT NULL,
    feature TEXT NOT NULL,
    end_user TEXT NOT NULL,
    model TEXT NOT NULL,
    deployment TEXT NOT NULL,
    tier TEXT NOT NULL,
    finish TEXT NOT NULL,
    num_prompt_tokens INTEGER NOT NULL CHECK (num_prompt_tokens >= 0),
    num_cached_tokens INTEGER NOT NULL CHECK (num_cached_tokens >= 0),
    num_output_tokens INTEGER NOT NULL CHECK (num_output_tokens >= 0),
    nanoseconds INTEGER NOT NULL CHECK (nanoseconds >= 0),
    nanojoules INTEGER NOT NULL CHECK (nanojoules >= 0),
    cost_nano_usd INTEGER NOT NULL CHECK (cost_nano_usd >= 0),
    price_nano_usd INTEGER NOT NULL CHECK (price_nano_usd >= 0),
    UNIQUE (request_id, attempt, kind)
) STRICT;
CREATE INDEX ledger_by_key ON ledger (key_id, at_s, price_nano_usd);
CREATE INDEX ledger_by_time ON ledger (at_s);
CREATE INDEX ledger_by_end_user ON ledger (project, end_user) WHERE end_user <> '';

CREATE TABLE days (
    key_id TEXT NOT NULL,
    day INTEGER NOT NULL,
    price_nano_usd INTEGER NOT NULL,
    PRIMARY KEY (key_id, day)
) STRICT, WITHOUT ROWID;

CREATE TABLE holds (
    request_id TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    key_id TEXT NOT NULL,
    nano_usd INTEGER NOT NULL CHECK (nano_usd >= 0),
    at_s REAL NOT NULL,
    PRIMARY KEY (request_id, attempt)
) STRICT, WITHOUT ROWID;
CREATE INDEX holds_by_key ON holds (key_id, nano_usd);

CREATE TABLE idempotency (
    project TEXT NOT NULL,
    name TEXT NOT NULL,
    body_hash BLOB NOT NULL,
    owner TEXT NOT NULL,
    at_s REAL NOT NULL,
    status INTEGER,
    response BLOB,
    PRIMARY KEY (project, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_by_time ON idempotency (at_s);
"""

MIGRATIONS: Final = (_FIRST, OBJECT_TABLES)
"""The script that takes a file of version n to n + 1 is at n. One that was released is never changed."""
