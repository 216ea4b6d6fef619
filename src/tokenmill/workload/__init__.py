"""Workloads: calls that were answered, kept to be evaluated, replayed and trained on; and their erasure."""

from tokenmill.workload.erasure import Erasure, erase, read_erasures, verify_erasures
from tokenmill.workload.folder import FolderConfig, WorkloadFolder
from tokenmill.workload.record import Given, Origin, WorkloadCall, read_calls, write_call

__all__ = [
    "Erasure",
    "FolderConfig",
    "Given",
    "Origin",
    "WorkloadCall",
    "WorkloadFolder",
    "erase",
    "read_calls",
    "read_erasures",
    "verify_erasures",
    "write_call",
]
