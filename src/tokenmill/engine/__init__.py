"""Running a model: batches of many requests, step by step, to text or to scores."""

from tokenmill.engine.config import LLMConfig
from tokenmill.engine.core import StepStats
from tokenmill.engine.llm import LLM, Progress, ProgressCallback

__all__ = ["LLM", "LLMConfig", "Progress", "ProgressCallback", "StepStats"]
