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
from tokenmill.store.open import open_store
from tokenmill.store.periods import Period, SteadyClock, period_of
from tokenmill.store.records import Budget, BudgetPeriod, Entry, EntryKind, Key, Limits, Scope
from tokenmill.store.secrets import NewSecret, hash_secret, new_key_id, new_secret
from tokenmill.store.sqlite import SqliteStore

__all__ = [
    "Accounts",
    "Budget",
    "BudgetPeriod",
    "Entry",
    "EntryKind",
    "Hold",
    "Key",
    "LedgerQuery",
    "LedgerSum",
    "Limits",
    "NewSecret",
    "Period",
    "Remembered",
    "RememberedState",
    "Scope",
    "SqliteConfig",
    "SqliteStore",
    "SteadyClock",
    "Store",
    "SumBy",
    "Ticket",
    "hash_secret",
    "new_key_id",
    "new_secret",
    "open_store",
    "period_of",
]
