"""The numpy twin of the native sampler: what a choice is, with plain sorts, to the last bit.

The choice is a race: of the logits x that are left after edits and filters, divided by the temperature,
the token with the largest x + G wins, where G is Gumbel noise, a pure function of (seed, position, token).
That is a draw from the softmax, and two distributions that race with the same noise mostly agree, without
knowing of each other (Daliri et al. 2024, "Coupling without Communication and Drafter-Invariant Speculative
Decoding"). So a draft is accepted if it is the token that is drawn anyway, and speculation changes nothing.

Which parameters a request may have, what is forbidden now, and log-probabilities are the engine's part.

Each step of the arithmetic is in float32 and in the order of `csrc/sample.h`; sums of weights are exact,
because weights are multiples of 2^-32 and their float64 sums fit. The noise comes in groups of 64 tokens:
one of them, the owner, has the least noise of its group, the others that and more. Exponential numbers
allow that: the least of 64 is exponential with a 64th of the mean, falls on each of them alike, and
what the others have above it is exponential again. So a group's least is known from one hash.

Shape legend: V vocabulary, G groups, K kept tokens.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.kernels.plan import F32Array, I32Array
from tokenmill.kernels.twin import exp2

__all__ = [
    "Choice",
    "U32Array",
    "choose_tokens",
    "edited_logits",
    "kept_tokens",
    "noise",
    "philox",
    "top_token_ids",
]

U32Array: TypeAlias = npt.NDArray[np.uint32]

_NO_TOKENS = np.empty(0, np.int32)
_GROUP = 64
_WORD = np.uint64(0xFFFFFFFF)
_LOG2E = np.float32(1.44269504088896341)
_LN2 = np.float32(0.69314718)
_LOG = tuple(
    np.float32(c)
    for c in (
        *(-0.076344304, 0.12761557, -0.13160197, 0.1420176),
        *(-0.16623355, 0.20001227, -0.25000823, 0.3333333),
    )
)


class Choice(NamedTuple):
    """How a token is chosen from row `logits_row`. The order of the fields is the order of what is done.

    `bias` (id, value) is added, `banned` ids are impossible. If `tokens` is not empty, penalties follow: for
    each id in it x / repetition (x * repetition where x is negative), then for each id of the output, which
    begins at index `num_prompt`, minus count * frequency and minus presence. `mask` has a bit for each token,
    set if it is allowed, lowest bit first. Ids outside the vocabulary count for nothing.

    `inverse_temperature` 0 takes the largest. `top_k` (0: all) and then `top_p` of the rest keep the most
    likely tokens, of equals the lowest ids; then only those with at least `min_p` of the largest's
    probability stay. `seed` and `position` (of the new token) give the noise.
    """

    logits_row: int
    bias: tuple[tuple[int, float], ...] = ()
    banned: Sequence[int] = ()
    tokens: I32Array = _NO_TOKENS
    num_prompt: int = 0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    mask: U32Array | None = None
    inverse_temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0

    @property
    def edited(self) -> bool:
        """True if the logits are changed before the choice."""
        return bool(self.bias or self.banned or len(self.tokens)) or self.mask is not None

    @property
    def farthest(self) -> float:
        """The largest distance from the most likely token, in units of x / temperature, by `min_p`."""
        return -math.log(self.min_p) if self.min_p > 0.0 else math.inf


def choose_tokens(logits_LV: F32Array, choices: Sequence[Choice]) -> I32Array:
    """A token id for each choice, or -1."""
    with np.errstate(all="ignore"):
        return np.array([_choose(logits_LV[c.logits_row], c) for c in choices], np.int32)


def top_token_ids(logits_LV: F32Array, num_top: int) -> I32Array:
    """The ids of the largest logits of each row, of equals the lowest id first."""
    return np.argsort(-logits_LV, axis=1, kind="stable")[:, :num_top].astype(np.int32)


def _choose(logits_V: F32Array, choice: Choice) -> int:
    if not np.isfinite(logits_V.max()):
        return -1
    x_V = edited_logits(logits_V, choice) if choice.edited else logits_V
    top = x_V.max()
    if not np.isfinite(top):
        return -1
    if choice.inverse_temperature == 0.0:
        return int(x_V.argmax())
    distance_V = (top - x_V) * np.float32(choice.inverse_temperature)
    kept_K = kept_tokens(distance_V, choice)
    noise_V = noise(choice.seed, choice.position, len(x_V))
    return int(kept_K[(distance_V[kept_K] + _log(noise_V[kept_K])).argmin()])


def edited_logits(logits_V: F32Array, choice: Choice) -> F32Array:
    """A copy with bias, bans, penalties and mask."""
    x_V, vocab = logits_V.copy(), len(logits_V)
    for token_id, value in choice.bias:
        if 0 <= token_id < vocab:
            x_V[token_id] += np.float32(value)
    x_V[[i for i in choice.banned if 0 <= i < vocab]] = -np.inf
    if len(choice.tokens):
        seen_V = _counts(choice.tokens, vocab) > 0
        repetition = np.float32(choice.repetition)
        x_V[seen_V] = np.where(x_V > 0, x_V / repetition, x_V * repetition)[seen_V]
        count_V = _counts(choice.tokens[choice.num_prompt :], vocab)
        penalised_V = (x_V - np.float32(choice.frequency) * count_V) - np.float32(choice.presence)
        x_V = np.where(count_V > 0, penalised_V, x_V)
    if choice.mask is not None:
        bits = np.unpackbits(np.ascontiguousarray(choice.mask, "<u4").view(np.uint8), bitorder="little")
        x_V[bits[:vocab] == 0] = -np.inf
    return x_V


def _counts(tokens: I32Array, vocab: int) -> F32Array:
    inside = tokens[(tokens >= 0) & (tokens < vocab)]
    return np.bincount(inside, minlength=vocab).astype(np.float32)


def kept_tokens(distance_V: F32Array, choice: Choice) -> npt.NDArray[np.intp]:
    """The ids that the filters keep, nearest first until the last step, which sorts them."""
    kept_K = np.argsort(distance_V, kind="stable")
    kept_K = kept_K[np.isfinite(distance_V[kept_K])]
    if choice.top_k:
        kept_K = kept_K[: choice.top_k]
    if choice.top_p < 1.0:
        weight_K = exp2(np.maximum(-distance_V[kept_K] * _LOG2E, np.float32(-125)))
        grid = np.float32(2.0**-9)
        weight_K = np.where(weight_K < grid, (weight_K + grid) - grid, weight_K)
        sum_K = np.cumsum(weight_K, dtype=np.float64)
        kept_K = kept_K[: int(np.searchsorted(sum_K, choice.top_p * sum_K[-1])) + 1]
    return np.sort(kept_K[distance_V[kept_K] <= np.float32(choice.farthest)])


def noise(seed: int, position: int, vocab: int) -> F32Array:
    """Exponential noise of each token, mean 1; minus its logarithm is Gumbel noise."""
    num_groups = -(-vocab // _GROUP)
    w0_G, w1_G, owner_G, _ = philox(np.arange(num_groups), position, 0, seed)
    fraction_G = ((w1_G >> np.uint32(8)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-24)
    least_G = _exponential(w0_G, fraction_G) * np.float32(1 / _GROUP)
    # A counter's four words are 16 tokens apart.
    words = [word.reshape(num_groups, 16) for word in philox(np.arange(num_groups * 16), position, 1, seed)]
    noise_GV = least_G[:, None] + _exponential(np.concatenate(words, axis=1), np.float32(0.5))
    noise_GV[np.arange(num_groups), owner_G >> np.uint32(26)] = least_G
    return noise_GV.reshape(-1)[:vocab]


def philox(
    index: npt.NDArray[np.int64], position: int, stream: int, seed: int
) -> tuple[npt.NDArray[np.uint32], ...]:
    """Philox 4x32-10 (Salmon et al. 2011): four words for each counter (index, position, stream, 0)."""
    words = (index, position, stream, 0)
    c0, c1, c2, c3 = (np.broadcast_to(np.asarray(word, np.uint64), index.shape) for word in words)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0), b & _WORD
        c2, c3 = (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1), a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))


def _exponential(bits: npt.NDArray[np.uint32], fraction: F32Array | np.float32) -> F32Array:
    """-log(1 - u) with u = ((bits >> 1) + fraction) / 2^31, below 1; precise where u is small."""
    one = np.float32(1)
    u = ((bits >> np.uint32(1)).astype(np.int32).astype(np.float32) + fraction) * np.float32(2.0**-31)
    u = np.minimum(u, one - np.float32(2.0**-24))
    rest = one - u
    gone = one - rest
    result: F32Array = np.where(gone == 0, u, -_log(rest) * (u / np.where(gone == 0, one, gone)))
    return result


def _log(x: F32Array) -> F32Array:
    """Natural logarithm of normal positive numbers: a degree-10 polynomial, relative error about 1e-7."""
    bits = x.view(np.int32)
    e = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    f = (bits - (e << np.int32(23))).view(np.float32) - np.float32(1)
    square = f * f
    p = np.full_like(f, _LOG[0])
    for c in _LOG[1:]:
        p = p * f + c
    result: F32Array = ((square * f) * p - square * np.float32(0.5) + f) + e.astype(np.float32) * _LN2
    return result
