"""Workloads: calls that were answered, read from any log, split, and kept to be trained on and certified."""

from tokenmill.workload.config import (
    Incumbent,
    Quality,
    Scorer,
    Slo,
    SplitConfig,
    WorkloadConfig,
    read_workload,
)
from tokenmill.workload.erasure import Erasure, erase, read_erasures, verify_erasures
from tokenmill.workload.folder import FolderConfig, WorkloadFolder
from tokenmill.workload.inference import Inference, infer_log, infer_workload
from tokenmill.workload.log import read_log
from tokenmill.workload.record import Given, Origin, WorkloadCall, read_calls, write_call
from tokenmill.workload.row import (
    Fault,
    Log,
    Row,
    canonical_json,
    content_digest,
    estimated_tokens,
    prompt_text,
)
from tokenmill.workload.rows import read_rows, split_rows
from tokenmill.workload.splits import PARTS, Splits, freeze, look, num_looks, split
from tokenmill.workload.summary import Cost, Summary, incumbent_cost, summarise
from tokenmill.workload.terms import Action, Ruling, Terms, TermsCount, count_terms
from tokenmill.workload.write import write_rejected, write_workload

__all__ = [
    "PARTS",
    "Action",
    "Cost",
    "Erasure",
    "Fault",
    "FolderConfig",
    "Given",
    "Incumbent",
    "Inference",
    "Log",
    "Origin",
    "Quality",
    "Row",
    "Ruling",
    "Scorer",
    "Slo",
    "SplitConfig",
    "Splits",
    "Summary",
    "Terms",
    "TermsCount",
    "WorkloadCall",
    "WorkloadConfig",
    "WorkloadFolder",
    "canonical_json",
    "content_digest",
    "count_terms",
    "erase",
    "estimated_tokens",
    "freeze",
    "incumbent_cost",
    "infer_log",
    "infer_workload",
    "look",
    "num_looks",
    "prompt_text",
    "read_calls",
    "read_erasures",
    "read_log",
    "read_rows",
    "read_workload",
    "split",
    "split_rows",
    "summarise",
    "verify_erasures",
    "write_call",
    "write_rejected",
    "write_workload",
]
