"""The entry point of compiled code: a block's convolution and its tail, by the first kernel that supports them.

If none does, PyTorch's own operations are used (`model.kernels.plain`): on a GPU, without a compiler, and when a
network is traced.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import Activation, PoolPlace
from model.kernels import stem, tail, winograd
from model.kernels.plain import plain_tail


@dataclass(frozen=True)
class ConvolutionKernel:
    """A way to compute a block's 3x3 convolution.

    Attributes:
        supports: whether it can, and should, compute this convolution of this input.
        run: the convolution, followed by a 2x2 max-pool if the last argument is true.
    """

    supports: Callable[[Tensor, nn.Conv2d], bool]
    run: Callable[[Tensor, nn.Conv2d, bool], Tensor]


@dataclass(frozen=True)
class TailKernel:
    """A way to compute a block's tail.

    Attributes:
        supports: whether it can compute the tail of this input.
        run: `model.kernels.plain.plain_tail`: the same arguments, results and effects on the norm.
    """

    supports: Callable[[Tensor, nn.BatchNorm2d, PoolPlace | None], bool]
    run: Callable[[Tensor, nn.BatchNorm2d, Tensor, PoolPlace | None, Activation], tuple[Tensor, Tensor]]


CONVOLUTIONS = (
    ConvolutionKernel(stem.supports, stem.stem),
    ConvolutionKernel(winograd.supports, winograd.winograd),
)
"""In the order in which they are asked."""

TAILS = (TailKernel(tail.supports, tail.compiled_tail),)
"""In the order in which they are asked."""

_plain_only: ContextVar[bool] = ContextVar("plain_only", default=False)


@contextmanager
def plain_operations() -> Iterator[None]:
    """Use PyTorch's own operations only, as on a machine without a compiler: for comparisons."""
    token = _plain_only.set(True)
    try:
        yield
    finally:
        _plain_only.reset(token)


def convolve(x: Tensor, conv: nn.Conv2d, pool_place: PoolPlace | None) -> tuple[Tensor, PoolPlace | None]:
    """A block's convolution, with its max-pool if that comes next and the kernel can do both at once.

    Args:
        x: (n, channels, h, w).
        conv: 3x3, of stride 1 and padding 1.
        pool_place: of the block's 2x2 max-pool, if any.

    Returns:
        the output, (n, outputs, h, w) or half as high and wide; and the place of the pool if it is
        still to be done, else None.
    """
    pooled = pool_place == "conv"
    if _may_be_compiled():
        for kernel in CONVOLUTIONS:
            if kernel.supports(x, conv):
                return kernel.run(x, conv, pooled), None if pooled else pool_place
    return conv(x), pool_place


def block_tail(
    branches: Tensor, norm: nn.BatchNorm2d, weights: Tensor, pool_place: PoolPlace | None, activation: Activation
) -> tuple[Tensor, Tensor]:
    """What a block does after its convolution; see `model.kernels.plain.plain_tail`."""
    if _may_be_compiled():
        for kernel in TAILS:
            if kernel.supports(branches, norm, pool_place):
                return kernel.run(branches, norm, weights, pool_place, activation)
    return plain_tail(branches, norm, weights, pool_place, activation)


def _may_be_compiled() -> bool:
    # Tracing comes first: it would take the sizes that `supports` asks for to be constants.
    return not torch.compiler.is_compiling() and not _plain_only.get()
