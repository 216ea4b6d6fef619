"""Models behind a URL: `Generator` and `Scorer` over a compatible endpoint, and streams with times."""

from tokenmill.remote.client import RemoteClient, TimedPiece
from tokenmill.remote.connection import Passing
from tokenmill.remote.endpoint import Endpoint, Timeouts, is_url, parse_endpoint
from tokenmill.remote.http import Progress
from tokenmill.remote.model import RemoteConfig, RemoteModel, served_models
from tokenmill.remote.retry import RetryConfig

__all__ = [
    "Endpoint",
    "Passing",
    "Progress",
    "RemoteClient",
    "RemoteConfig",
    "RemoteModel",
    "RetryConfig",
    "TimedPiece",
    "Timeouts",
    "is_url",
    "parse_endpoint",
    "served_models",
]
