"""The server's durable state: keys, budgets, the ledger, batches."""

from tokenmill.store.accounts import Accounts, Ticket
from tokenmill.store.database import SqliteConfig
from tokenmill.store.interface import (
    Hold,
    LedgerQuery,
    LedgerSum,
    Remembered,
    RememberedState,
    Store,
    SumBy,
)
from tokenmill.store.object_records import (
    Batch,
    BatchApi,
    BatchFault,
    BatchOutcome,
    BatchStatus,
    FilePurpose,
    Line,
    LineEnd,
    LineResult,
    LineState,
    NewLine,
    StoredFile,
    line_request_id,
)
from tokenmill.store.objects import Answered, ObjectStore
from tokenmill.store.open import open_store
from tokenmill.store.periods import Period, SteadyClock, period_of
from tokenmill.store.records import Budget, BudgetPeriod, Entry, EntryKind, Key, Limits, Scope
from tokenmill.store.secrets import NewSecret, hash_secret, new_key_id, new_secret
from tokenmill.store.sqlite import SqliteStore

__all__ = [
    "Accounts",
    "Answered",
    "Batch",
    "BatchApi",
    "BatchFault",
    "BatchOutcome",
    "BatchStatus",
    "Budget",
    "BudgetPeriod",
    "Entry",
    "EntryKind",
    "FilePurpose",
    "Hold",
    "Key",
    "LedgerQuery",
    "LedgerSum",
    "Limits",
    "Line",
    "LineEnd",
    "LineResult",
    "LineState",
    "NewLine",
    "NewSecret",
    "ObjectStore",
    "Period",
    "Remembered",
    "RememberedState",
    "Scope",
    "SqliteConfig",
    "SqliteStore",
    "SteadyClock",
    "Store",
    "StoredFile",
    "SumBy",
    "Ticket",
    "hash_secret",
    "line_request_id",
    "new_key_id",
    "new_secret",
    "open_store",
    "period_of",
]
