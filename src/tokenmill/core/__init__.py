"""The nouns everything else speaks: messages, requests, completions, scores, and the error tree."""

from tokenmill.core.errors import (
    BudgetError,
    DownloadError,
    EndpointError,
    ExpiredError,
    ModelFormatError,
    NotFoundError,
    ResourceError,
    StorageError,
    TokenmillError,
    UsageError,
)
from tokenmill.core.protocols import Generator, Scorer
from tokenmill.core.request import (
    Completion,
    FinishReason,
    Message,
    Request,
    Score,
    Tier,
    TokenLogprobs,
    ToolCall,
    Usage,
)
from tokenmill.core.sampling import Grammar, SamplingParams

__all__ = [
    "BudgetError",
    "Completion",
    "DownloadError",
    "EndpointError",
    "ExpiredError",
    "FinishReason",
    "Generator",
    "Grammar",
    "Message",
    "ModelFormatError",
    "NotFoundError",
    "Request",
    "ResourceError",
    "SamplingParams",
    "Score",
    "Scorer",
    "StorageError",
    "Tier",
    "TokenLogprobs",
    "TokenmillError",
    "ToolCall",
    "Usage",
    "UsageError",
]
