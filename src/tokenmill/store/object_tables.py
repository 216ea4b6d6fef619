"""The tables of files, batches and lines in an SQLite store: its second migration.

A line is found by its state through indices that hold only open ones, so that the end of a batch of 50,000
lines costs as little as its beginning. A row of `lines` goes once the batch's files are written.
"""

from typing import Final

__all__ = ["OBJECT_TABLES"]

OBJECT_TABLES: Final = """
CREATE TABLE files (
    id TEXT PRIMARY KEY,
    project TEXT NOT NULL,
    purpose TEXT NOT NULL,
    filename TEXT NOT NULL,
    num_bytes INTEGER NOT NULL CHECK (num_bytes >= 0),
    created_s REAL NOT NULL,
    expires_s REAL
) STRICT;
CREATE INDEX files_by_project ON files (project, created_s);
CREATE INDEX files_by_expiry ON files (expires_s) WHERE expires_s IS NOT NULL;

CREATE TABLE batches (
    id TEXT PRIMARY KEY,
    project TEXT NOT NULL,
    key_id TEXT NOT NULL,
    feature TEXT NOT NULL,
    api TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    status TEXT NOT NULL,
    outcome TEXT NOT NULL,
    metadata TEXT NOT NULL,
    model TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    output_file_id TEXT NOT NULL,
    error_file_id TEXT NOT NULL,
    created_s REAL NOT NULL,
    expires_s REAL NOT NULL,
    in_progress_s REAL,
    cancelling_s REAL,
    finalizing_s REAL,
    ended_s REAL,
    num_lines INTEGER NOT NULL,
    num_answered INTEGER NOT NULL,
    num_errored INTEGER NOT NULL,
    num_cancelled INTEGER NOT NULL,
    num_expired INTEGER NOT NULL,
    num_prompt_tokens INTEGER NOT NULL,
    num_cached_tokens INTEGER NOT NULL,
    num_output_tokens INTEGER NOT NULL,
    num_stage_tries INTEGER NOT NULL,
    faults TEXT NOT NULL
) STRICT;
CREATE INDEX batches_by_project ON batches (project, api, created_s);
CREATE INDEX batches_open ON batches (created_s) WHERE ended_s IS NULL;

CREATE TABLE lines (
    id INTEGER PRIMARY KEY,
    batch_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    custom_id TEXT NOT NULL,
    offset INTEGER NOT NULL,
    length INTEGER NOT NULL,
    state TEXT NOT NULL,
    num_tries INTEGER NOT NULL DEFAULT 0,
    num_failures INTEGER NOT NULL DEFAULT 0,
    lease TEXT NOT NULL DEFAULT '',
    leased_until_s REAL NOT NULL DEFAULT 0,
    status INTEGER NOT NULL DEFAULT 0,
    body BLOB NOT NULL DEFAULT x'',
    UNIQUE (batch_id, number),
    UNIQUE (batch_id, custom_id)
) STRICT;
CREATE INDEX lines_pending ON lines (batch_id, number) WHERE state = 'pending';
CREATE INDEX lines_leased ON lines (batch_id, leased_until_s) WHERE state = 'leased';
"""
