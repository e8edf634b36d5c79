"""Muon: every branch's filters, as a matrix, take steps along the nearest orthogonal matrix of their momentum.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon, and airbench94_muon of https://github.com/KellerJordan/cifar10-airbench.
PyTorch's `torch.optim.Muon` takes two-dimensional parameters only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.6
NEWTON_SCHULZ_STEPS = 3
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients that bring every singular value near 1 in a few steps, but none exactly to 1."""


class Muon(torch.optim.SGD):
    """Muon for filters and Nesterov SGD for the rest, in one optimizer.

    A batch norm after a branch's convolution removes any scale of its filters, so they are held at the norm of
    an orthogonal matrix: the learning rate is then the angle, in radians, by which a step turns them at most, and they
    need no weight decay.

    Args:
        filters: weights (L * width, channels, 3, 3) of convolutions, each with its L; each of the L branches of
            ``width`` is a matrix of its own.
        rest: parameter groups as `torch.optim.SGD` takes them.
        lr: peak, of the filters.
        momentum: of the rest.
        dtype: to orthogonalise in; bfloat16 is enough if the device is fast at it.
    """

    def __init__(
        self,
        filters: Mapping[Tensor, int],
        rest: Sequence[dict[str, Any]],
        lr: float,
        momentum: float,
        dtype: torch.dtype,
    ) -> None:
        groups = [
            {"params": [weight], "lr": lr, "peak_lr": lr, "momentum": 0.0, "nesterov": False, "branches": branches}
            for weight, branches in filters.items()
        ]
        super().__init__([*groups, *rest], lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Replace the filters' gradients by directions, then step as SGD does."""
        for group in self.param_groups:
            if "branches" in group:
                for weight in group["params"]:
                    self._turn(weight, group["branches"])
        loss: float | None = super().step(closure)
        return loss

    def _turn(self, weight: Tensor, branches: int) -> None:
        assert weight.grad is not None
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"].mul_(MOMENTUM).add_(weight.grad)
        matrices = _as_matrices(weight.grad.add(momentum, alpha=MOMENTUM), branches)
        weight.grad = _as_filters(orthogonalised(matrices, self._dtype), weight)
        held = _as_matrices(weight, branches)
        scales = min(held.shape[1:]) ** 0.5 / held.flatten(1).norm(dim=1)
        weight.mul_(scales.repeat_interleave(held.shape[1])[:, None, None, None])


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximately the orthogonal matrix nearest to each one, U V' of its singular value decomposition U S V'.

    Args:
        matrices: (n, rows, columns), of any scale.
        dtype: to compute in.

    Returns:
        as many, in their own dtype, with singular values of about 0.7 to 1.2, except those far below the largest,
        which stay small.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: Tensor = x.mT if tall else x
    return result.to(matrices.dtype)


def _as_matrices(filters: Tensor, branches: int) -> Tensor:
    """(L * width, channels, 3, 3) as (L, width, 9 * channels): a view if channels are last."""
    matrices: Tensor = filters.permute(0, 2, 3, 1).reshape(branches, len(filters) // branches, -1)
    return matrices


def _as_filters(matrices: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_as_matrices`; channels are last."""
    outputs, channels, height, width = like.shape
    filters: Tensor = matrices.reshape(outputs, height, width, channels).permute(0, 3, 1, 2)
    return filters
