"""What a teacher thinks of every token that a student is to learn: computed once, kept small, never mixed up.

A folder holds, for each target of the examples in their order, the teacher's k likeliest tokens, their
log-probabilities and that of all other tokens together (the tail, without which a student would be told
that the rest of the vocabulary is impossible):

    run.json        what it belongs to: hashes of model, tokenizer, template and data, k, temperature
    progress.json   how many examples are done
    tokens.bin      [targets, k]        uint16, or int32 for a vocabulary of more than 65,536
    logprobs.bin    [targets, k + 1]    float16, natural logarithms, the tail last

A folder of something else is refused; one that was not finished is gone on with. It is read through memory
maps. The teacher is the torch twin in bf16, which reads packed rows and makes logits of targets only.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from tokenmill.core import UsageError
from tokenmill.models.files import disk_errors, hash_file
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder
from tokenmill.runs import RunFolder
from tokenmill.train import Example, Targets, make_row
from tokenmill.train.loop import Progress

__all__ = ["CacheConfig", "SparseRows", "TeacherLogits", "cache_teacher", "examples_digest"]

_TOKENS: Final = "tokens.bin"
_LOGPROBS: Final = "logprobs.bin"
_PROGRESS: Final = "progress"
_TOKENS_PER_ROW: Final = 2048
_HEAD_BYTES: Final = 64 << 20


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How much of the teacher is kept: `top_k` tokens a target, of its distribution at `temperature`."""

    top_k: int = 32
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= 4096:
            raise UsageError(f"top_k is {self.top_k}", hint="use a value from 1 to 4096")
        if not 0.05 <= self.temperature <= 100:
            raise UsageError(f"temperature is {self.temperature:g}", hint="use a value from 0.05 to 100")


class SparseRows(NamedTuple):
    """The teacher at R targets: its k tokens and their log-probabilities, which with the tail's sum to 1."""

    tokens_RK: Tensor
    logprobs_RK: Tensor


class TeacherLogits:
    """The distributions of a finished folder."""

    def __init__(
        self, folder: Path, examples: Sequence[Example], config: CacheConfig, vocab_size: int
    ) -> None:
        self._row_of = _row_numbers(examples)
        self._starts = np.cumsum([0, *(len(each.tokens) for each in examples)])
        num_rows, top_k = int(self._row_of.max()) + 1, min(config.top_k, vocab_size)
        self._tokens_RK = np.memmap(folder / _TOKENS, _token_type(vocab_size), "r", shape=(num_rows, top_k))
        self._logprobs_RC = np.memmap(folder / _LOGPROBS, np.float16, "r", shape=(num_rows, top_k + 1))

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return int(self._tokens_RK.nbytes + self._logprobs_RC.nbytes)

    def rows(self, targets: Targets) -> SparseRows:
        """The teacher at these targets, by example and position."""
        places = self._starts[targets.examples_R.numpy()] + targets.positions_R.numpy()
        rows_R = self._row_of[places]
        assert (rows_R >= 0).all(), "a place that is no target"
        logprobs_RC = torch.from_numpy(self._logprobs_RC[rows_R].astype(np.float32))
        # What float16 rounded is given back: all outcomes together are certain.
        logprobs_RC = functional.log_softmax(logprobs_RC, dim=1)
        tokens_RK = torch.from_numpy(self._tokens_RK[rows_R].astype(np.int64))
        return SparseRows(tokens_RK, logprobs_RC[:, :-1])


def cache_teacher(
    teacher: ModelDirectory,
    examples: Sequence[Example],
    folder: Path,
    config: CacheConfig | None = None,
    *,
    progress: Progress | None = None,
) -> TeacherLogits:
    """The teacher's distributions at every target of the examples, from `folder` as far as it has them.

    Raises UsageError if the folder belongs to another teacher, tokenizer, template, data or config.
    """
    config = config or CacheConfig()
    top_k, vocab_size = min(config.top_k, teacher.architecture.vocab_size), teacher.architecture.vocab_size
    with RunFolder(folder, _key(teacher, examples, config), resume=True) as run:
        done = (run.read(_PROGRESS) or {}).get("num_examples", 0)
        num_rows = sum(each.num_targets for each in examples[:done])
        files = _Files(folder, num_rows, top_k, _token_type(vocab_size))
        if done < len(examples):
            model = TorchDecoder.load(teacher.architecture, teacher.weights(), torch.bfloat16)
            for count, (tokens_RK, logprobs_RC) in _computed(
                model, examples[done:], config.temperature, top_k
            ):
                files.append(tokens_RK, logprobs_RC)
                done += count
                run.write(_PROGRESS, {"num_examples": done})
                if progress is not None:
                    progress("teacher", done, len(examples))
    return TeacherLogits(folder, examples, config, vocab_size)


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 of the examples: tokens and which of them are targets, in order."""
    digest = hashlib.sha256()
    for each in examples:
        digest.update(np.array([len(each.tokens), *each.tokens], np.int32).tobytes())
        digest.update(np.array(each.is_target, np.bool_).tobytes())
    return digest.hexdigest()


def _key(teacher: ModelDirectory, examples: Sequence[Example], config: CacheConfig) -> dict[str, Any]:
    template = teacher.chat_template()
    return {
        "teacher": teacher.digest,
        "tokenizer": hash_file(teacher.path / "tokenizer.json"),
        "template": hashlib.sha256(("" if template is None else template.source).encode()).hexdigest(),
        "data": examples_digest(examples),
        "num_examples": len(examples),
        **asdict(config),
    }


def _token_type(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def _row_numbers(examples: Sequence[Example]) -> npt.NDArray[np.int32]:
    """For each token of all examples the number of its target, -1 where it is none. First tokens are none."""
    is_target = np.concatenate([np.array([False, *each.is_target[1:]], np.bool_) for each in examples])
    numbers = np.cumsum(is_target, dtype=np.int32) - 1
    return np.where(is_target, numbers, np.int32(-1)).astype(np.int32)


class _Files:
    """The two growing files, cut to what is known to be whole."""

    def __init__(self, folder: Path, num_rows: int, top_k: int, token_type: Any) -> None:
        self._parts = (
            (folder / _TOKENS, np.dtype(token_type), num_rows * top_k),
            (folder / _LOGPROBS, np.dtype(np.float16), num_rows * (top_k + 1)),
        )
        for path, dtype, count in self._parts:
            with disk_errors(path):
                path.touch()
                with path.open("r+b") as file:
                    file.truncate(count * dtype.itemsize)

    def append(self, *values: npt.NDArray[Any]) -> None:
        """Add rows to both files, flushed to the disk."""
        for (path, dtype, _), rows in zip(self._parts, values, strict=True):
            with disk_errors(path), path.open("ab") as file:
                file.write(np.ascontiguousarray(rows, dtype).data)
                file.flush()
                os.fsync(file.fileno())


@torch.inference_mode()
def _computed(
    model: TorchDecoder, examples: Sequence[Example], temperature: float, top_k: int
) -> Iterator[tuple[int, tuple[npt.NDArray[Any], npt.NDArray[Any]]]]:
    """Runs of examples in order: how many, and the tokens and log-probabilities of their targets."""
    for indices in _runs(examples):
        row = make_row(examples, indices)
        hidden_RD = model.hidden(row.tokens_BT, row=row.packed)[0].index_select(0, row.rows_R)
        step = max(1, _HEAD_BYTES // (4 * model.architecture.vocab_size))
        parts = [_top(model.lm_head(part), temperature, top_k) for part in torch.split(hidden_RD, step)]
        tokens, logprobs = (torch.cat(each) for each in zip(*parts, strict=True))
        yield len(indices), (tokens.numpy(), logprobs.numpy())


def _top(logits_RV: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens [R, K]; their log-probabilities and the tail's [R, K + 1]."""
    logprobs_RV = functional.log_softmax(logits_RV.float() / temperature, dim=1)
    best = logprobs_RV.topk(top_k, dim=1)
    rest_R = torch.logsumexp(logprobs_RV.scatter(1, best.indices, float("-inf")), dim=1)
    return best.indices, torch.cat((best.values, rest_R[:, None]), 1)


def _runs(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Consecutive examples of about `_TOKENS_PER_ROW` tokens together, at least one."""
    run: list[int] = []
    num_tokens = 0
    for index, example in enumerate(examples):
        if run and num_tokens + example.num_inputs > _TOKENS_PER_ROW:
            yield run
            run, num_tokens = [], 0
        run.append(index)
        num_tokens += example.num_inputs
    if run:
        yield run
