"""What the tests of tasks share: answers without a model, and the folder of data where it is there."""

from pathlib import Path
from typing import Any

import pytest

from tokenmill.core import Completion, Usage
from tokenmill.evals.task import Answer, Generate, Question

SHARED = Path(__file__).parents[3] / "shared" / "data"


def data_folder(name: str) -> Path:
    """A folder of the shared data; the test is skipped where there is none."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"no data in {SHARED / name}")
    return SHARED / name


def completion(text: str) -> Completion:
    return Completion(
        request_id="r",
        text=text,
        token_ids=(),
        finish_reason="completed",
        usage=Usage(num_prompt_tokens=1, num_cached_tokens=0, num_output_tokens=1),
        ttft_s=0.0,
        total_s=0.0,
    )


def written(*texts: str) -> Answer:
    """An answer with these completions."""
    return Answer(completions=tuple(completion(text) for text in texts))


def prompt_of(question: Question) -> Any:
    """What is asked: a text, or the contents of the messages."""
    assert isinstance(question.ask, Generate)
    prompt = question.ask.prompt
    return prompt if isinstance(prompt, str) else [message.content for message in prompt]
