"""The engine in a process of its own: messages, supervisor, and the asyncio front end."""

from tokenmill.engine.serving.async_engine import AsyncEngine
from tokenmill.engine.serving.handle import Embedding
from tokenmill.engine.serving.messages import EngineSpec

__all__ = ["AsyncEngine", "Embedding", "EngineSpec"]
