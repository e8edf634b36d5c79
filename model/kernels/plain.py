"""A block's tail in PyTorch's own operations."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.activation import ACTIVATIONS
from model.config import Activation, PoolPlace


def plain_tail(
    x: Tensor, norm: nn.BatchNorm2d, weights: Tensor, pool_place: PoolPlace | None, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Everything that a block does after its convolution, in PyTorch's own operations.

    Args:
        x: the convolution's output, (n, L * width, h, w), branch by branch.
        norm: over its L * width channels; in training its running statistics are updated.
        weights: of the branches, (n, L).
        pool_place: of the 2x2 max-pool, if any.
        activation: after the norm.

    Returns:
        the block's output, (n, width, h, w) or half as high and wide, and its channel means (n, width).
    """
    if pool_place == "conv":
        x = F.max_pool2d(x, 2)
    x = ACTIVATIONS[activation](norm(x))
    if pool_place == "branch":
        x = F.max_pool2d(x, 2)
    out = weighted_sum(x, weights)
    if pool_place == "sum":
        out = F.max_pool2d(out, 2)
    return out, out.mean((2, 3))


def weighted_sum(branches: Tensor, weights: Tensor) -> Tensor:
    """Sum L groups of channels, each image by its own weights.

    Args:
        branches: (n, L * width, h, w), group by group.
        weights: (n, L).

    Returns:
        (n, width, h, w).
    """
    weights = weights.to(branches.dtype)
    return (sum_of_groups if branches.is_cuda else product_per_pixel)(branches, weights)


def product_per_pixel(branches: Tensor, weights: Tensor) -> Tensor:
    """`weighted_sum` as one small matrix product per pixel: the fastest way on a CPU if channels are last.

    Measured on 2 EPYC cores, whole training step in images/s: 803 with slices, 888 with einsum, 1,088 with this.
    """
    n, channels, height, width = branches.shape
    groups = weights.shape[1]
    pixels = branches.permute(0, 2, 3, 1).reshape(n, height * width, groups, channels // groups)
    total = torch.matmul(weights[:, None, None, :], pixels)
    return total.view(n, height, width, channels // groups).permute(0, 3, 1, 2)


def sum_of_groups(branches: Tensor, weights: Tensor) -> Tensor:
    """`weighted_sum` as a broadcast product and a sum: few, large kernels for a GPU (not measured on one yet).

    The result has the dtype of the branches and lies channels last, as the next convolution takes it. Without an
    explicit dtype autocast sums in float32 on CUDA, and a sum over (n, L, width, h, w) gives channels first: the next
    convolution would then cast and transpose its whole input.
    """
    n, channels, height, width = branches.shape
    groups = weights.shape[1]
    pixels = branches.permute(0, 2, 3, 1).reshape(n, height, width, groups, channels // groups)
    return (pixels * weights[:, None, None, :, None]).sum(3, dtype=branches.dtype).permute(0, 3, 1, 2)
