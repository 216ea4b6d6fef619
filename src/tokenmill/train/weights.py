"""The weights that are trained, twice: float32 ones that the optimiser moves, and those that are multiplied.

All lie one after the other in flat buffers, so that a step costs a few operations over all of them and not
a few for each: one rounding to bf16, one sum of squares, one AdamW. The model's own parameters become views
of the buffer that is multiplied.
"""

from typing import Final

import torch
from torch import Tensor, nn

from tokenmill.core import UsageError

__all__ = ["FlatWeights"]

_ALIGNMENT: Final = 64  # weights; a cache line of bf16 and two


class FlatWeights:
    """The trainable parameters of a model. Matrices come first, then what has no weight decay.

    `master` and `gradient` are float32; `work` has `dtype` and is `master` itself where that is float32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.parameters = [each for each in model.parameters() if each.requires_grad]
        if not self.parameters:
            raise UsageError("the model has no trainable weight")
        self.parameters.sort(key=lambda each: each.ndim < 2)
        starts, end, self.num_decayed = [], 0, 0
        for each in self.parameters:
            starts.append(end)
            end += -(-each.numel() // _ALIGNMENT) * _ALIGNMENT
            self.num_decayed = end if each.ndim >= 2 else self.num_decayed
        self.master = torch.zeros(end)
        self.gradient = torch.zeros(end)
        for view, each in zip(self._views(self.master, starts), self.parameters, strict=True):
            view.copy_(each.detach())
        model.to(dtype)
        self.work = self.master if dtype == torch.float32 else self.master.to(dtype)
        for view, each in zip(self._views(self.work, starts), self.parameters, strict=True):
            each.data = view
        self._gradient_views = self._views(self.gradient, starts)
        self._has_gradient = False

    def collect(self) -> None:
        """Add the gradients of the parameters, which then have none, to the float32 ones."""
        grads = [each.grad for each in self.parameters if each.grad is not None]
        assert len(grads) == len(self.parameters)
        if self._has_gradient:
            torch._foreach_add_(self._gradient_views, grads)
        else:
            torch._foreach_copy_(self._gradient_views, grads)
        self._has_gradient = True
        for each in self.parameters:
            each.grad = None

    def clip(self, largest: float) -> float:
        """Scale the gradients down to this norm; returns what it was. The next `collect` starts anew."""
        self._has_gradient = False
        norm = float(torch.linalg.vector_norm(self.gradient))
        if norm > largest:
            self.gradient.mul_(largest / norm)
        return norm

    def publish(self) -> None:
        """Round the float32 weights to those that are multiplied."""
        if self.work is not self.master:
            self.work.copy_(self.master)

    def _views(self, flat: Tensor, starts: list[int]) -> list[Tensor]:
        return [
            flat[start : start + each.numel()].view(each.shape)
            for start, each in zip(starts, self.parameters, strict=True)
        ]
