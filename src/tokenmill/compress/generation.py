"""Answers that a model gives to the prompts of examples, through the engine, as examples again.

Of a teacher they are what a student learns from where none was recorded (sequence-level distillation: Kim
and Rush 2016); of the student itself, what its teacher corrects (on-policy).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tokenmill.core import SamplingParams
from tokenmill.engine import LLM, LLMConfig
from tokenmill.kernels import KV_BLOCK
from tokenmill.models.files import atomic_file, disk_errors
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.train import Example

__all__ = ["Answers", "answer_prompts", "kept_examples", "longest_answer", "prompt_of"]

_MAX_BATCH: Final = 64
_LARGER_ANSWER: Final = 1.25


class Answers(NamedTuple):
    """Examples whose targets were generated; `sources` are the indices of the prompts that they answer.

    `num_cut` answers reached the limit of tokens. They are left out, or their last target is no end token.
    """

    examples: tuple[Example, ...]
    sources: tuple[int, ...]
    num_cut: int


def prompt_of(example: Example) -> list[int]:
    """The tokens before the first that is to be learnt."""
    first = next(at for at, is_target in enumerate(example.is_target) if is_target and at)
    return list(example.tokens[:first])


def longest_answer(examples: Sequence[Example]) -> int:
    """A bound for an answer of this kind: a quarter more tokens than the longest has."""
    return round(_LARGER_ANSWER * max(each.num_targets for each in examples)) + 1


def kept_examples(path: Path, make: Callable[[], Sequence[Example]]) -> Sequence[Example]:
    """Examples that are in the file `path`; else they are made, and put there."""
    with disk_errors(path):
        if path.is_file():
            return [Example(*each) for each in json.loads(path.read_text())]
    examples = make()
    with atomic_file(path) as file:
        file.write(json.dumps([[list(each.tokens), list(each.is_target)] for each in examples]).encode())
    return examples


def answer_prompts(
    model: ModelDirectory,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    keep_cut: bool = False,
    weights: WeightFormat = "w8a8",
) -> Answers:
    """The model's own answers, `samples` a prompt, each with its end token. Draws follow from `seed`.

    An answer that is cut off by `max_tokens` is left out; with `keep_cut` its tokens are kept.
    """
    if not prompts:
        return Answers((), (), 0)
    limit = min(max_tokens, model.architecture.max_positions - max(map(len, prompts)))
    longest = max(map(len, prompts)) + limit
    blocks = -(-longest // KV_BLOCK) + 1
    config = LLMConfig(weights=weights, max_batch=_MAX_BATCH, kv_tokens=_MAX_BATCH * blocks * KV_BLOCK)
    llm = LLM(model, config)
    try:
        params = [
            SamplingParams(temperature=temperature, max_tokens=limit, n=samples, seed=seed + number)
            for number in range(len(prompts))
        ]
        completions = llm.generate_tokens(prompts, params)
    finally:
        llm.close()
    ends = set(model.architecture.eos_token_ids)
    end = model.architecture.eos_token_ids[0]
    examples, sources, num_cut = [], [], 0
    for number, completion in enumerate(completions):
        tokens, is_cut = list(completion.token_ids), completion.finish_reason == "length"
        num_cut += is_cut
        if is_cut and not keep_cut:
            continue
        if not is_cut and (not tokens or tokens[-1] not in ends):
            tokens.append(end)
        prompt = prompts[number // samples]
        marks = [False] * len(prompt) + [True] * len(tokens)
        examples.append(Example([*prompt, *tokens], marks))
        sources.append(number // samples)
    return Answers(tuple(examples), tuple(sources), num_cut)
