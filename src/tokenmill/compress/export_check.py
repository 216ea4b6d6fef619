"""Does the engine serve what was trained? Asked after every export, before anybody evaluates it.

The directory is loaded again as a server would load it, and runs sample texts: every logit in bf16 and in
w8a8 is compared with the torch twin's (the model in memory, or the directory's weights in the twin), and
answers that the engine generates greedily, through its paged cache and sampler, must be what the twin finds
most likely, as nearly as the format allows. A transposed matrix, a wrong rotation, a stale tokenizer or
a head of another model are far beyond the bounds; the formats' own rounding is far within.

    format   logits: relative error   measured on SmolLM2-135M, trimmed, and on a student of 4M of it
    bf16     at most 0.06             0.009 and 0.004
    w8a8     at most 0.30             0.096 and 0.045
    w4a8     at most 0.60             not measured

Whether the rounding costs quality is not asked here; the measurement of the candidate says that.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch

from tokenmill.compress.drift_figures import Drift, DriftRows, drift, row_drift
from tokenmill.core import ModelFormatError, SamplingParams, UsageError
from tokenmill.engine import LLM, LLMConfig
from tokenmill.kernels import KV_BLOCK, F32Array, StepBatch
from tokenmill.models.packing.compile import ExecutorConfig, create_executor
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder

__all__ = ["BOUNDS", "ExportMismatch", "ExportReport", "FormatReport", "check_export", "engine_logits"]

BOUNDS: Final[Mapping[WeightFormat, float]] = {"bf16": 0.06, "w8a8": 0.30, "w4a8": 0.60}
"""The largest relative error of the logits that is the format's own rounding."""

_ANSWER_TOKENS: Final = 16
_NUM_ANSWERS: Final = 4
_GAPS: Final = 4.0
"""A greedy token may be this many typical logit errors below the twin's first choice."""


class ExportMismatch(ModelFormatError):
    """The engine does not compute what the torch twin does: the directory must not be used."""

    default_hint = "the export is broken; nothing that was measured on this directory counts"


class FormatReport(NamedTuple):
    """One format against the twin: logits, and how many tokens of greedy answers the twin would not take."""

    weights: WeightFormat
    drift: Drift
    num_answer_tokens: int
    num_wrong_tokens: int


class ExportReport(NamedTuple):
    """What was compared, by format."""

    path: Path
    formats: tuple[FormatReport, ...]

    def lines(self) -> list[str]:
        """One line a format."""
        return [
            f"{each.weights}: relative error of logits {each.drift.relative_error:.4f} "
            f"(at most {BOUNDS[each.weights]}), same top p {each.drift.same_top_p:.2%}, "
            f"mean KLD {each.drift.mean_kld:.2e}, largest logit difference "
            f"{each.drift.largest_difference:.3f}, {each.num_wrong_tokens} of {each.num_answer_tokens} "
            "greedy tokens wrong"
            for each in self.formats
        ]


def check_export(
    model: ModelDirectory,
    windows: Sequence[Sequence[int]],
    *,
    twin: TorchDecoder | None = None,
    formats: Sequence[WeightFormat] = ("bf16", "w8a8"),
) -> ExportReport:
    """Compare the directory in the engine with the twin on token windows of the workload (some dozens do).

    `twin` is the model that was exported, if it is still in memory. Raises ExportMismatch naming the format
    and the figure that is out of bounds.
    """
    windows = [list(each)[: model.architecture.max_positions] for each in windows if len(each) > 1]
    if not windows:
        raise UsageError("no texts to compare on", hint="give token windows of two tokens or more")
    if twin is None:
        twin = TorchDecoder.load(model.architecture, model.weights())
    wanted = [_twin_logits(twin, window) for window in windows]
    reports = tuple(_check_format(model, weights, windows, wanted, twin) for weights in formats)
    report = ExportReport(path=model.path, formats=reports)
    for each, line in zip(reports, report.lines(), strict=True):
        is_near = each.drift.relative_error <= BOUNDS[each.weights]  # false for NaN
        if not is_near or each.num_wrong_tokens:
            raise ExportMismatch(f"{model.path}: the engine differs from the torch twin ({line})")
    return report


def engine_logits(
    model: ModelDirectory, weights: WeightFormat, windows: Sequence[Sequence[int]]
) -> Iterator[F32Array]:
    """Logits [T, V] of each window, as the engine's executor computes them in this format."""
    longest = max(map(len, windows))
    config = ExecutorConfig(
        weights=weights, max_rows=longest, max_out_rows=longest, num_blocks=-(-longest // KV_BLOCK)
    )
    executor = create_executor(model, config)
    for window in windows:
        executor.run(_batch(window))
        yield np.array(executor.buffer("logits")[: len(window)], np.float32)


def _check_format(
    model: ModelDirectory,
    weights: WeightFormat,
    windows: Sequence[Sequence[int]],
    wanted: Sequence[F32Array],
    twin: TorchDecoder,
) -> FormatReport:
    figures = drift(
        _rows(want, got, window)
        for want, got, window in zip(wanted, engine_logits(model, weights, windows), windows, strict=True)
    )
    scale = np.sqrt(np.mean([np.square(each - each.mean(1, keepdims=True)).mean() for each in wanted]))
    tolerance = float(_GAPS * BOUNDS[weights] * scale)
    num_tokens, num_wrong = _wrong_tokens(model, weights, windows[:_NUM_ANSWERS], twin, tolerance)
    return FormatReport(weights, figures, num_tokens, num_wrong)


def _rows(want_TV: F32Array, got_TV: F32Array, window: Sequence[int]) -> DriftRows:
    return row_drift(want_TV[:-1], got_TV[:-1], np.array(window[1:], np.int64))


def _twin_logits(twin: TorchDecoder, window: Sequence[int]) -> F32Array:
    with torch.inference_mode():
        logits_TV: F32Array = twin(torch.tensor([list(window)]))[0].float().numpy()
    return logits_TV


def _wrong_tokens(
    model: ModelDirectory,
    weights: WeightFormat,
    windows: Sequence[Sequence[int]],
    twin: TorchDecoder,
    tolerance: float,
) -> tuple[int, int]:
    """Greedy tokens that the engine generated, and how many the twin finds worse than its first choice by
    more than `tolerance`.
    """
    limit = model.architecture.max_positions - _ANSWER_TOKENS
    prompts = [list(window)[: max(1, min(len(window) // 2, limit))] for window in windows]
    longest = max(map(len, prompts)) + _ANSWER_TOKENS
    llm = LLM(model, LLMConfig(weights=weights, kv_tokens=len(prompts) * (longest + KV_BLOCK)))
    try:
        params = SamplingParams(temperature=0.0, max_tokens=_ANSWER_TOKENS, ignore_eos=True)
        answers = [list(each.token_ids) for each in llm.generate_tokens(prompts, params)]
    finally:
        llm.close()
    num_wrong = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        logits_TV = _twin_logits(twin, [*prompt, *answer])[len(prompt) - 1 : -1]
        gap_T = logits_TV.max(1) - logits_TV[np.arange(len(answer)), answer]
        num_wrong += int((gap_T > tolerance).sum())
    return sum(map(len, answers)), num_wrong


def _batch(window: Sequence[int]) -> StepBatch:
    """One sequence from its start, in blocks in order."""
    total = len(window)
    starts = range(0, total, KV_BLOCK)
    blocks = [(i, first, min(KV_BLOCK, total - first)) for i, first in enumerate(starts)]
    positions = np.arange(total, dtype=np.int32)
    return StepBatch(
        tokens=np.array(window, np.int32),
        positions=positions,
        kv_slots=positions,
        row_starts=np.array([0, total], np.int32),
        block_starts=np.array([0, len(blocks)], np.int32),
        blocks=np.array(blocks, np.int32),
        out_rows=positions,
    )
