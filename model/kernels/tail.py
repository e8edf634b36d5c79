"""A block's tail on the CPU, everything after its convolution, as two passes of compiled code.

PyTorch runs max-pool, batch norm, activation and weighted sum as some twenty operations that each read and write the
whole activation; a CPU then spends more time on them than on convolutions. ``tail.cpp`` does the same in two passes
forward and two backward. Without a compiler (`model.kernels.library`) `model.kernels.plain` computes the same function
more slowly.
"""

from collections.abc import Callable
from ctypes import c_float, c_int64
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.config import Activation, PoolPlace
from model.kernels.entry import TensorArgument, activations, empty_activations, entry, int64s, vector
from model.kernels.library import library

SOURCE = Path(__file__).with_name("tail.cpp")

POOL_CODES: dict[PoolPlace | None, int] = {None: 0, "conv": 1, "branch": 2}
ACTIVATION_CODES: dict[Activation, int] = {"relu": 0, "leaky_relu": 1, "gelu": 2, "silu": 3}
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def supports(x: Tensor, norm: nn.BatchNorm2d, pool_place: PoolPlace | None) -> bool:
    """Whether the compiled code can compute the tail of this input."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPE_NAMES
        and pool_place in POOL_CODES
        and (pool_place is None or (x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0))
        and len(x) > 1  # the norm refuses statistics of one image of one pixel, and says so
        and (norm.training or not torch.is_grad_enabled())
        and library(SOURCE) is not None
    )


def compiled_tail(
    x: Tensor, norm: nn.BatchNorm2d, weights: Tensor, pool_place: PoolPlace | None, activation: Activation
) -> tuple[Tensor, Tensor]:
    """`model.kernels.plain.plain_tail` by compiled code: the same arguments, results and effects on the norm."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    out, means = _Tail.apply(
        x.contiguous(memory_format=torch.channels_last),
        norm.weight,
        norm.bias,
        weights.float().contiguous(),
        norm,
        (POOL_CODES[pool_place], ACTIVATION_CODES[activation]),
    )
    return out, means


def _forward_entry(dtype: torch.dtype) -> Callable[..., Any]:
    return entry(
        SOURCE,
        f"forward_{DTYPE_NAMES[dtype]}",
        None,
        shape=int64s(5),
        pool=c_int64,
        activation=c_int64,
        training=c_int64,
        threads=c_int64,
        x=activations(dtype),
        gamma=vector(),
        beta=vector(),
        weights=TensorArgument(torch.float32, 2),
        epsilon=c_float,
        momentum=c_float,
        running_mean=vector(),
        running_variance=vector(),
        pooled=activations(dtype, optional=True),
        argmax=activations(torch.uint8, optional=True),
        mean=vector(),
        inverse=vector(),
        out=activations(dtype),
        means=TensorArgument(torch.float32, 2),
    )


def _backward_entry(dtype: torch.dtype) -> Callable[..., Any]:
    return entry(
        SOURCE,
        f"backward_{DTYPE_NAMES[dtype]}",
        None,
        shape=int64s(5),
        pool=c_int64,
        activation=c_int64,
        threads=c_int64,
        x=activations(dtype, optional=True),
        pooled=activations(dtype, optional=True),
        argmax=activations(torch.uint8, optional=True),
        gamma=vector(),
        beta=vector(),
        weights=TensorArgument(torch.float32, 2),
        mean=vector(),
        inverse=vector(),
        grad_out=activations(dtype),
        grad_means=TensorArgument(torch.float32, 2),
        slopes=activations(dtype),
        grad_x=activations(dtype),
        grad_gamma=vector(),
        grad_beta=vector(),
        grad_weights=TensorArgument(torch.float32, 2),
    )


_forward = {dtype: _forward_entry(dtype) for dtype in DTYPE_NAMES}
_backward = {dtype: _backward_entry(dtype) for dtype in DTYPE_NAMES}


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weights: Tensor,
        norm: nn.BatchNorm2d,
        codes: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        pool, activation = codes
        n, channels, height, width = x.shape
        groups = weights.shape[1]
        shape = int64s(5)(n, height, width, groups, channels // groups)
        if pool:
            height, width = height // 2, width // 2
        out = empty_activations(n, channels // groups, height, width, x.dtype)
        means = torch.empty(n, channels // groups)
        pooled = empty_activations(n, channels, height, width, x.dtype) if pool == POOL_CODES["conv"] else None
        argmax = empty_activations(n, channels, height, width, torch.uint8) if pool else None
        mean, inverse = torch.empty(2, channels)
        assert norm.momentum is not None
        _forward[x.dtype](
            shape=shape,
            pool=pool,
            activation=activation,
            training=norm.training,
            threads=torch.get_num_threads(),
            x=x,
            gamma=gamma,
            beta=beta,
            weights=weights,
            epsilon=norm.eps,
            momentum=norm.momentum,
            running_mean=norm.running_mean,
            running_variance=norm.running_var,
            pooled=pooled,
            argmax=argmax,
            mean=mean,
            inverse=inverse,
            out=out,
            means=means,
        )
        ctx.save_for_backward(x if pooled is None else None, gamma, beta, weights, pooled, argmax, mean, inverse)
        ctx.shape, ctx.pool, ctx.activation, ctx.input_shape = shape, pool, activation, x.shape
        return out, means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weights, pooled, argmax, mean, inverse = ctx.saved_tensors
        grad_out = grads[0].contiguous(memory_format=torch.channels_last)
        normed = x if pooled is None else pooled
        n, channels, height, width = ctx.input_shape
        grad_x = empty_activations(n, channels, height, width, normed.dtype)
        # The slopes after the norm; without a pool they have the input's shape and share memory with its gradient.
        slopes = torch.empty_like(argmax, dtype=normed.dtype) if ctx.pool else grad_x
        grad_gamma, grad_beta = torch.empty(2, len(gamma))
        grad_weights = torch.empty_like(weights)
        _backward[normed.dtype](
            shape=ctx.shape,
            pool=ctx.pool,
            activation=ctx.activation,
            threads=torch.get_num_threads(),
            x=x,
            pooled=pooled,
            argmax=argmax,
            gamma=gamma,
            beta=beta,
            weights=weights,
            mean=mean,
            inverse=inverse,
            grad_out=grad_out,
            grad_means=grads[1].contiguous(),
            slopes=slopes,
            grad_x=grad_x,
            grad_gamma=grad_gamma,
            grad_beta=grad_beta,
            grad_weights=grad_weights,
        )
        return grad_x, grad_gamma, grad_beta, grad_weights, None, None
