"""The head and the loss, for target rows only and some rows at a time.

Logits are the largest thing in the training of a small model: 49,152 of them stand for each 576 numbers of
the residual stream. Here they exist for some rows at a time, and their gradient is made at once and takes
their place; so the backward pass of the head is two matrix products.
"""

from itertools import pairwise
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from tokenmill.models.torch_twin import TorchDecoder
from tokenmill.train.losses import Loss
from tokenmill.train.packing import Targets, TrainRow

__all__ = ["backward", "total_loss"]

_HEAD_BYTES: Final = 64 << 20
_LOSS_BYTES: Final = 8 << 20


def backward(model: TorchDecoder, row: TrainRow, loss: Loss, scale: float) -> float:
    """The sum of the losses of a row; `scale` times its gradient is added to that of the parameters."""
    hidden_BTD = model.hidden(row.tokens_BT, row=row.packed)
    hidden_RD = hidden_BTD.detach()[0].index_select(0, row.rows_R)
    grad_RD = torch.empty_like(hidden_RD)
    weight = model.lm_head.weight
    total = 0.0
    with torch.no_grad():
        for rows in _chunks(len(row.rows_R), model, _HEAD_BYTES, hidden_RD.element_size()):
            logits_RV = functional.linear(hidden_RD[rows], weight)
            total += _loss_to_gradient(logits_RV, row.targets.part(rows), loss, scale, model)
            grad_RD[rows] = logits_RV @ weight
            if weight.requires_grad:
                _add_gradient(weight, logits_RV.T, hidden_RD[rows])
        grad_BTD = torch.zeros_like(hidden_BTD)
        grad_BTD[0].index_copy_(0, row.rows_R, grad_RD)
    torch.autograd.backward(hidden_BTD, grad_BTD)
    return total


@torch.inference_mode()
def total_loss(model: TorchDecoder, row: TrainRow, loss: Loss) -> float:
    """The sum of the losses of a row."""
    hidden_RD = model.hidden(row.tokens_BT, row=row.packed)[0].index_select(0, row.rows_R)
    total = 0.0
    for rows in _chunks(len(row.rows_R), model, _LOSS_BYTES, 4):
        logits_RV = functional.linear(hidden_RD[rows], model.lm_head.weight).float()
        total += float(loss(logits_RV, row.targets.part(rows)).sum())
    return total


def _loss_to_gradient(
    logits_RV: Tensor, targets: Targets, loss: Loss, scale: float, model: TorchDecoder
) -> float:
    """The sum of the losses; the logits become `scale` times its gradient."""
    total = 0.0
    for rows in _chunks(len(logits_RV), model, _LOSS_BYTES, 4):
        wide_RV = logits_RV[rows].float().requires_grad_()
        with torch.enable_grad():
            part = loss(wide_RV, targets.part(rows)).sum()
            (grad_RV,) = torch.autograd.grad(part * scale, wide_RV)
        logits_RV[rows] = grad_RV
        total += float(part.detach())
    return total


def _add_gradient(weight: Tensor, left: Tensor, right: Tensor) -> None:
    if weight.grad is None:
        weight.grad = left @ right
    else:
        weight.grad.addmm_(left, right)


def _chunks(num_rows: int, model: TorchDecoder, num_bytes: int, item_bytes: int) -> list[slice]:
    """Runs of rows whose logits take about `num_bytes`, all about equally long."""
    per_row = model.architecture.vocab_size * item_bytes
    count = max(1, min(num_rows, -(-num_rows * per_row // num_bytes)))
    edges = [num_rows * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(edges)]
