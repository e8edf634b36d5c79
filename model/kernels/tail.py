"""A block's tail on the CPU: what stands behind its convolution, as two passes of compiled code.

PyTorch runs max-pool, batch norm, activation and weighted sum as some twenty operations that each read and write the
whole activation; a CPU then spends more time on them than on convolutions. ``tail.cpp`` does the same in two passes
forward and two backward. Without a compiler (`model.kernels.library`) the operations of `model.network.plain_tail`
serve, which are the same function and slower.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.config import Activation, PoolPlace
from model.kernels import library as compiled

SOURCE = Path(__file__).with_name("tail.cpp")

POOLS: dict[PoolPlace | None, int] = {None: 0, "conv": 1, "branch": 2}
ACTIVATIONS: dict[Activation, int] = {"relu": 0, "leaky_relu": 1, "gelu": 2, "silu": 3}
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def supports(x: Tensor, norm: nn.BatchNorm2d, pool_place: PoolPlace | None) -> bool:
    """Whether the compiled code can do a tail of this input."""
    return (
        not torch.compiler.is_compiling()  # first: tracing would take the sizes asked for below for constants
        and x.device.type == "cpu"
        and x.dtype in NAMES
        and pool_place in POOLS
        and (pool_place is None or (x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0))
        and len(x) > 1  # of one image of one pixel the norm refuses statistics, and says so
        and (norm.training or not torch.is_grad_enabled())
        and compiled.library(SOURCE) is not None
    )


def compiled_tail(
    x: Tensor, norm: nn.BatchNorm2d, weights: Tensor, pool_place: PoolPlace | None, activation: Activation
) -> tuple[Tensor, Tensor]:
    """`model.network.plain_tail` by compiled code: the same arguments, results and effects on the norm."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    out, means = _Tail.apply(
        x.contiguous(memory_format=torch.channels_last),
        norm.weight,
        norm.bias,
        weights.float().contiguous(),
        norm,
        POOLS[pool_place],
        ACTIVATIONS[activation],
    )
    return out, means


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weights: Tensor,
        norm: nn.BatchNorm2d,
        pool: int,
        activation: int,
    ) -> tuple[Tensor, Tensor]:
        n, channels, height, width = x.shape
        groups = weights.shape[1]
        shape = (ctypes.c_int64 * 5)(n, height, width, groups, channels // groups)
        if pool:
            height, width = height // 2, width // 2
        out = _empty(x, channels // groups, height, width, x.dtype)
        means = torch.empty(n, channels // groups)
        pooled = _empty(x, channels, height, width, x.dtype) if pool == POOLS["conv"] else None
        place = _empty(x, channels, height, width, torch.uint8) if pool else None
        mean, inverse = torch.empty(2, channels)
        assert norm.momentum is not None
        compiled.call(
            SOURCE, f"forward_{NAMES[x.dtype]}",
            shape, pool, activation, norm.training, torch.get_num_threads(), x, gamma, beta,
            weights, norm.eps, norm.momentum, norm.running_mean, norm.running_var, pooled, place, mean, inverse, out,
            means,
        )  # fmt: skip
        ctx.save_for_backward(x if pooled is None else None, gamma, beta, weights, pooled, place, mean, inverse)
        ctx.shape, ctx.pool, ctx.activation, ctx.input_shape = shape, pool, activation, x.shape
        return out, means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weights, pooled, place, mean, inverse = ctx.saved_tensors
        grad_out = grads[0].contiguous(memory_format=torch.channels_last)
        normed = x if pooled is None else pooled
        grad_x = torch.empty(ctx.input_shape, dtype=normed.dtype, memory_format=torch.channels_last)
        # The slopes behind the norm; without a pool they have the input's shape and lie where its gradient goes.
        slopes = torch.empty_like(place, dtype=normed.dtype) if ctx.pool else grad_x
        grad_gamma, grad_beta = torch.empty(2, len(gamma))
        grad_weights = torch.empty_like(weights)
        compiled.call(
            SOURCE, f"backward_{NAMES[normed.dtype]}",
            ctx.shape, ctx.pool, ctx.activation, torch.get_num_threads(), x, pooled, place,
            gamma, beta, weights, mean, inverse, grad_out, grads[1].contiguous(), slopes, grad_x, grad_gamma, grad_beta,
            grad_weights,
        )  # fmt: skip
        return grad_x, grad_gamma, grad_beta, grad_weights, None, None, None


def _empty(x: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(len(x), channels, height, width, dtype=dtype, memory_format=torch.channels_last)
