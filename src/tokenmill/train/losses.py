"""Losses, as pure functions of logits: one number a row, natural logarithms, no mean and no mask.

A caller adds them up, weighs them and takes means. `student_RV` and `teacher_RV` are float32 logits; a
temperature divides both, and the loss is multiplied by its square, which keeps the size of the gradient
(Hinton et al. 2015). Gradients flow to the student only as far as the caller lets them.

    cross_entropy      -log q(target)
    forward_kl         KL(p || q)            covers all that the teacher p does
    reverse_kl         KL(q || p)            avoids what the teacher does not do
    jsd                beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
    skew_kl            KL(p || alpha p + (1 - alpha) q)
    skew_reverse_kl    KL(q || alpha q + (1 - alpha) p)
    sparse_*           of the teacher's k likeliest tokens and one outcome for all others

Sources: jsd is that of Agarwal et al. 2024 (GKD), the skewed ones are of Ko et al. 2024 (DistiLLM).
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from tokenmill.train.packing import Targets

__all__ = [
    "Loss",
    "cross_entropy",
    "forward_kl",
    "jsd",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "sparse_forward_kl",
    "sparse_jsd",
    "sparse_reverse_kl",
    "target_loss",
]

Loss: TypeAlias = Callable[[Tensor, Targets], Tensor]
"""What the trainer minimises: float32 logits [R, V] and their targets to losses [R]."""

_NONE: Final = float("-inf")


def cross_entropy(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """-log q(target), [R]."""
    return functional.cross_entropy(logits_RV, targets_R, reduction="none")


def target_loss(logits_RV: Tensor, targets: Targets) -> Tensor:
    """Cross entropy as the trainer's loss."""
    return cross_entropy(logits_RV, targets.tokens_R)


def forward_kl(student_RV: Tensor, teacher_RV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student), [R]."""
    q_RV, p_RV = _log_softmax(student_RV, temperature), _log_softmax(teacher_RV, temperature)
    return temperature**2 * _kl(p_RV, q_RV)


def reverse_kl(student_RV: Tensor, teacher_RV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher), [R]."""
    return forward_kl(teacher_RV, student_RV, temperature)


def jsd(student_RV: Tensor, teacher_RV: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """The generalised Jensen-Shannon divergence, [R], for 0 < beta < 1; divided by beta it is near the
    forward KL for a small beta.
    """
    q_RV, p_RV = _log_softmax(student_RV, temperature), _log_softmax(teacher_RV, temperature)
    return temperature**2 * _jsd(p_RV, q_RV, beta)


def skew_kl(student_RV: Tensor, teacher_RV: Tensor, alpha: float = 0.1, temperature: float = 1.0) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student), [R], for 0 <= alpha < 1."""
    q_RV, p_RV = _log_softmax(student_RV, temperature), _log_softmax(teacher_RV, temperature)
    return temperature**2 * _kl(p_RV, _mix(p_RV, q_RV, alpha))


def skew_reverse_kl(
    student_RV: Tensor, teacher_RV: Tensor, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(student || alpha student + (1 - alpha) teacher), [R], for 0 <= alpha < 1."""
    return skew_kl(teacher_RV, student_RV, alpha, temperature)


def sparse_forward_kl(
    student_RV: Tensor, tokens_RK: Tensor, logprobs_RK: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student), [R], over K tokens and the rest of the vocabulary as one more outcome.

    `logprobs_RK` are the teacher's at this temperature over its whole vocabulary: what their exponentials
    lack to 1 is the mass of the rest. With K = V it is the dense loss.
    """
    p_RC, q_RC = _outcomes(student_RV, tokens_RK, logprobs_RK, temperature)
    return temperature**2 * _kl(p_RC, q_RC)


def sparse_reverse_kl(
    student_RV: Tensor, tokens_RK: Tensor, logprobs_RK: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(student || teacher), [R]; arguments as in `sparse_forward_kl`."""
    p_RC, q_RC = _outcomes(student_RV, tokens_RK, logprobs_RK, temperature)
    return temperature**2 * _kl(q_RC, p_RC)


def sparse_jsd(
    student_RV: Tensor, tokens_RK: Tensor, logprobs_RK: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """The generalised Jensen-Shannon divergence, [R]; arguments as in `sparse_forward_kl`."""
    p_RC, q_RC = _outcomes(student_RV, tokens_RK, logprobs_RK, temperature)
    return temperature**2 * _jsd(p_RC, q_RC, beta)


_LEAST_REST: Final = 1e-6
"""Less than this is not told from the rounding of K probabilities in float32."""


def _outcomes(
    student_RV: Tensor, tokens_RK: Tensor, logprobs_RK: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student, [R, K + 1], last all other tokens; [R, K] if K = V."""
    q_RV = _log_softmax(student_RV, temperature)
    q_RK = q_RV.gather(1, tokens_RK)
    if tokens_RK.shape[1] == student_RV.shape[1]:
        return logprobs_RK, q_RK
    rest_R = torch.logsumexp(q_RV.scatter(1, tokens_RK, _NONE), dim=1)
    tail_R = (1 - logprobs_RK.double().exp().sum(1)).clamp_min(_LEAST_REST).log().float()
    return torch.cat((logprobs_RK, tail_R[:, None]), 1), torch.cat((q_RK, rest_R[:, None]), 1)


def _log_softmax(logits_RV: Tensor, temperature: float) -> Tensor:
    return functional.log_softmax(logits_RV if temperature == 1 else logits_RV / temperature, dim=-1)


def _kl(left_RV: Tensor, right_RV: Tensor) -> Tensor:
    """KL of two rows of log-probabilities."""
    return (left_RV.exp() * (left_RV - right_RV)).sum(-1)


def _mix(left_RV: Tensor, right_RV: Tensor, share: float) -> Tensor:
    """log(share left + (1 - share) right)."""
    if share == 0:
        return right_RV
    log_share, log_other = torch.tensor([share, 1 - share]).log().tolist()
    return torch.logaddexp(left_RV + log_share, right_RV + log_other)


def _jsd(p_RV: Tensor, q_RV: Tensor, beta: float) -> Tensor:
    mixed_RV = _mix(p_RV, q_RV, beta)
    return beta * _kl(p_RV, mixed_RV) + (1 - beta) * _kl(q_RV, mixed_RV)
