"""Embeddings of texts: the final norm's rows, pooled over the tokens of a sequence.

An `EmbeddingState` runs through the same steps and batches as everything else, but asks for the input of
the head, never for logits. Models trained to embed say which pooling they want; a plain decoder's mean is a
fair start.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from tokenmill.core import ModelFormatError, Tier, UsageError
from tokenmill.engine.sequence import SequenceState
from tokenmill.kernels import F32Array

__all__ = ["MAX_TEXTS", "POOLINGS", "EmbeddingRequest", "EmbeddingState", "Pooling", "embeddings"]

Pooling: TypeAlias = Literal["mean", "last"]

POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

MAX_TEXTS: Final = 2048
"""Texts of one request, as many as the OpenAI API takes."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """Texts to be embedded, as token ids, with the same fields as a `core.Request` where they mean the same.

    Raises UsageError for no text, too many, or a pooling or tier that does not exist.
    """

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    pooling: Pooling = "mean"
    normalize: bool = True
    tier: Tier = "standard"
    tenant: str = ""
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.prompts) <= MAX_TEXTS:
            raise UsageError(f"{len(self.prompts)} texts are to be embedded", hint=f"give 1 to {MAX_TEXTS}")
        for name, allowed in (("pooling", POOLINGS), ("tier", get_args(Tier))):
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}", hint=f"use one of {', '.join(allowed)}"
                )
        if self.timeout_s is not None and not 0.0 < self.timeout_s < math.inf:
            raise UsageError(f"timeout_s is {self.timeout_s}", hint="use seconds above 0, or none")


class EmbeddingState(SequenceState):
    """A text whose final norm's rows are pooled: the mean over its tokens, or the last token's alone."""

    wants_logits = False

    def __init__(self, request_id: str, token_ids: Iterable[int], pooling: Pooling) -> None:
        if pooling not in POOLINGS:
            raise UsageError(f"pooling is {pooling!r}", hint=f"use one of {', '.join(POOLINGS)}")
        ids = tuple(token_ids)
        assert ids, "a text has a token"
        super().__init__(request_id, ids, len(ids))
        self._first = 0 if pooling == "mean" else len(ids) - 1
        self._num_pooled = 0
        self._sum_D: npt.NDArray[np.float64] | None = None

    @property
    def first_logits(self) -> int:
        """The first position not pooled yet; after a preemption no row is pooled twice."""
        return self._first + self._num_pooled

    @property
    def finished(self) -> bool:
        """True once every row is pooled, or it has failed."""
        return bool(self.error) or self.first_logits == self.num_total

    def append(self, position: int, hidden_D: F32Array) -> None:
        """Take the final norm's row at this position; positions come in order. The row is not kept."""
        assert position == self.first_logits, f"{self.request_id} pools position {position} out of order"
        # Row after row, so that chunks do not change the order of the sum.
        row_D = hidden_D.astype(np.float64)
        self._sum_D = row_D if self._sum_D is None else self._sum_D + row_D
        self._num_pooled += 1

    def fail(self, error: str, *, now_s: float) -> None:
        """End without an embedding; `error` says why."""
        self.error = error

    def embedding(self) -> npt.NDArray[np.float64]:
        """The pooled row [D]. Raises `ModelFormatError` if the sequence failed."""
        if self.error:
            raise ModelFormatError(f"{self.request_id} has no embedding: {self.error}")
        assert self.finished and self._sum_D is not None, f"{self.request_id} is not finished"
        return self._sum_D / self._num_pooled


def embeddings(states: Sequence[EmbeddingState], *, hidden_size: int, normalize: bool) -> F32Array:
    """The embeddings [N, D] of finished states, scaled to length 1 where `normalize`.

    Raises `ModelFormatError` if one failed, or a value is not a finite number.
    """
    rows_ND = np.zeros((len(states), hidden_size), np.float64)
    for index, state in enumerate(states):
        rows_ND[index] = state.embedding()
    if not np.isfinite(rows_ND).all():
        raise ModelFormatError(
            "the model's activations are not finite numbers",
            hint="its weights may be damaged: pull it again",
        )
    if normalize:
        lengths_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
        rows_ND /= np.where(lengths_N1 > 0, lengths_N1, 1.0)
    return rows_ND.astype(np.float32)
