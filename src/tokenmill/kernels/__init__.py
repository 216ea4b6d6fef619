"""CPU kernels and the step executor: native where it can, and beside each kernel its numpy twin."""

from tokenmill.kernels.executor import NativeExecutor, create_executor, log_sum_exp_rows
from tokenmill.kernels.isa import available_isas, choose_isa, default_threads
from tokenmill.kernels.numpy_executor import NumpyExecutor
from tokenmill.kernels.plan import (
    KV_BLOCK,
    ActFormat,
    Attend,
    BufferName,
    Embed,
    EmbedTable,
    Executor,
    F32Array,
    I32Array,
    Linear,
    Norm,
    Op,
    PackedLinear,
    PlanShape,
    Quantize,
    RopeKv,
    Select,
    StepBatch,
    StepPlan,
)
from tokenmill.kernels.sampling import choose_tokens, top_token_ids
from tokenmill.kernels.sampling_twin import Choice, U32Array

__all__ = [
    "KV_BLOCK",
    "ActFormat",
    "Attend",
    "BufferName",
    "Choice",
    "Embed",
    "EmbedTable",
    "Executor",
    "F32Array",
    "I32Array",
    "Linear",
    "NativeExecutor",
    "Norm",
    "NumpyExecutor",
    "Op",
    "PackedLinear",
    "PlanShape",
    "Quantize",
    "RopeKv",
    "Select",
    "StepBatch",
    "StepPlan",
    "U32Array",
    "available_isas",
    "choose_isa",
    "choose_tokens",
    "create_executor",
    "default_threads",
    "log_sum_exp_rows",
    "top_token_ids",
]
