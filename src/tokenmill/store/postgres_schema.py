"""The tables of a PostgreSQL store: numbered migrations, as those of SQLite in `schema.py`."""

from typing import Final

__all__ = ["MIGRATIONS"]

_FIRST: Final = """
CREATE TABLE keys (
    id text PRIMARY KEY,
    secret_hash bytea NOT NULL UNIQUE CHECK (length(secret_hash) = 32),
    created_s double precision NOT NULL,
    body text NOT NULL
);
CREATE TABLE counters (name text PRIMARY KEY, value bigint NOT NULL);
INSERT INTO counters VALUES ('key_version', 0);
CREATE TABLE ledger (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    request_id text NOT NULL,
    attempt bigint NOT NULL,
    kind text NOT NULL,
    at_s double precision NOT NULL,
    key_id text NOT NULL,
    project text NOT NULL,
    feature text NOT NULL,
    end_user text NOT NULL,
    model text NOT NULL,
    deployment text NOT NULL,
    tier text NOT NULL,
    finish text NOT NULL,
    num_prompt_tokens bigint NOT NULL CHECK (num_prompt_tokens >= 0),
    num_cached_tokens bigint NOT NULL CHECK (num_cached_tokens >= 0),
    num_output_tokens bigint NOT NULL CHECK (num_output_tokens >= 0),
    nanoseconds bigint NOT NULL CHECK (nanoseconds >= 0),
    nanojoules bigint NOT NULL CHECK (nanojoules >= 0),
    cost_nano_usd bigint NOT NULL CHECK (cost_nano_usd >= 0),
    price_nano_usd bigint NOT NULL CHECK (price_nano_usd >= 0),
    UNIQUE (request_id, attempt, kind)
);
CREATE INDEX ledger_by_key ON ledger (key_id, at_s);
CREATE INDEX ledger_by_time ON ledger (at_s, id);
CREATE INDEX ledger_by_end_user ON ledger (project, end_user) WHERE end_user <> '';
CREATE TABLE days (
    key_id text NOT NULL,
    day bigint NOT NULL,
    price_nano_usd bigint NOT NULL,
    PRIMARY KEY (key_id, day)
);
CREATE TABLE holds (
    request_id text NOT NULL,
    attempt bigint NOT NULL,
    key_id text NOT NULL,
    nano_usd bigint NOT NULL CHECK (nano_usd >= 0),
    at_s double precision NOT NULL,
    PRIMARY KEY (request_id, attempt)
);
CREATE INDEX holds_by_key ON holds (key_id);
CREATE TABLE idempotency (
    project text NOT NULL,
    name text NOT NULL,
    body_hash bytea NOT NULL,
    owner text NOT NULL,
    at_s double precision NOT NULL,
    status bigint,
    response bytea,
    PRIMARY KEY (project, name)
);
CREATE INDEX idempotency_by_time ON idempotency (at_s);
"""

MIGRATIONS: Final = (_FIRST,)
"""The script that takes a database of version n to n + 1 is at n. One that was released is never changed."""
