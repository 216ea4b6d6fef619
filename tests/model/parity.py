"""The native executor on the real model against its numpy twin, teacher-forced, in every weight format.

Both run the same plan on the same tokens. The arithmetic is defined to the last bit, so agreement is
expected to be exact; what the test demands is looser: over at least 99 % of the positions the median
of the largest logit error is at most 1e-3 and its maximum at most 0.1 (bf16: median at most 0.05), and the
greedy token is the same wherever the twin's first two logits are further apart than that maximum.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.fast.random_plan import make_batch
from tokenmill.kernels import Executor, F32Array, NumpyExecutor, StepBatch
from tokenmill.models.packing.compile import ExecutorConfig, create_executor
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory

QUESTIONS = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
PER_STEP = 50
"""Prompts in one batch: the twin unpacks every matrix in every step."""

MEDIANS: dict[WeightFormat, float] = {"w8a8": 1e-3, "w4a8": 1e-3, "bf16": 0.05}


@dataclass(frozen=True)
class Errors:
    """Largest logit error a position, and where the greedy tokens differ beyond it."""

    largest_T: F32Array
    gap_T: F32Array
    same_T: "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]"


def prompts(model: ModelDirectory, count: int, num_tokens: int) -> list[list[int]]:
    tokenizer = model.tokenizer()
    lines = QUESTIONS.read_text().splitlines()[:count]
    return [tokenizer.encode(json.loads(line)["question"])[:num_tokens] for line in lines]


def batches(texts: list[list[int]]) -> list[StepBatch]:
    """Blocks in a scattered order, as a busy engine hands them out."""
    chunks = [texts[i : i + PER_STEP] for i in range(0, len(texts), PER_STEP)]
    return [make_batch([(ids, 0, [63 - i]) for i, ids in enumerate(chunk)]) for chunk in chunks]


def compare(native: Executor, twin: Executor, batch: StepBatch) -> Errors:
    native.run(batch)
    twin.run(batch)
    got, want = (ex.buffer("logits")[: batch.num_rows] for ex in (native, twin))
    second, first = np.partition(want, -2, axis=1)[:, -2:].T
    return Errors(
        largest_T=np.abs(got - want).max(axis=1),
        gap_T=first - second,
        same_T=got.argmax(axis=1) == want.argmax(axis=1),
    )


def check_parity(model_dir: Path, weights: WeightFormat, *, num_prompts: int, num_tokens: int) -> None:
    """Assert the bounds of the module's docstring; prints what was found."""
    model = ModelDirectory.open(model_dir)
    rows = PER_STEP * num_tokens
    native = create_executor(
        model, ExecutorConfig(weights=weights, max_rows=rows, max_out_rows=rows, num_blocks=64)
    )
    twin = NumpyExecutor(native.plan, max_rows=rows, max_out_rows=rows, num_blocks=64, ordered=True)
    texts = prompts(model, num_prompts, num_tokens)
    errors = [compare(native, twin, batch) for batch in batches(texts)]
    largest, gap = (np.concatenate([getattr(e, part) for e in errors]) for part in ("largest_T", "gap_T"))
    same = np.concatenate([e.same_T for e in errors])
    kept = np.sort(largest)[: int(np.ceil(0.99 * len(largest)))]
    print(
        f"{weights}: {len(texts)} prompts, {len(largest)} positions, {np.mean(largest == 0):.2%} equal to "
        f"the bit, median {np.median(kept):.2e}, largest {kept[-1]:.2e} (of all {largest.max():.2e})"
    )
    assert len(texts) == num_prompts
    assert np.median(kept) <= MEDIANS[weights]
    if weights != "bf16":
        assert kept[-1] <= 0.1
    assert same[gap > kept[-1]].all()
