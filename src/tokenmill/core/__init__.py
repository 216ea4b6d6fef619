"""The nouns everything else speaks: messages, requests, completions, scores, and the error tree."""

from tokenmill.core.errors import (
    DownloadError,
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
    SamplingParams,
    Score,
    Usage,
)

__all__ = [
    "Completion",
    "DownloadError",
    "FinishReason",
    "Generator",
    "Message",
    "ModelFormatError",
    "NotFoundError",
    "Request",
    "ResourceError",
    "SamplingParams",
    "Score",
    "Scorer",
    "StorageError",
    "TokenmillError",
    "Usage",
    "UsageError",
]
