"""The server's durable state: keys, budgets, the ledger, batches."""

from tokenmill.store.interface import Hold, LedgerQuery, LedgerSum, Store, SumBy
from tokenmill.store.records import Budget, BudgetPeriod, Entry, EntryKind, Key, Limits, Scope

__all__ = [
    "Budget",
    "BudgetPeriod",
    "Entry",
    "EntryKind",
    "Hold",
    "Key",
    "LedgerQuery",
    "LedgerSum",
    "Limits",
    "Scope",
    "Store",
    "SumBy",
]
