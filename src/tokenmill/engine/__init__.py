"""Running a model: batches of many requests, step by step, to text or to scores."""

from tokenmill.engine.core import StepStats
from tokenmill.engine.llm import LLM, LLMConfig, Progress, ProgressCallback

__all__ = ["LLM", "LLMConfig", "Progress", "ProgressCallback", "StepStats"]
