"""The block network: blocks of parallel convolutions, weighted by a vector computed from channel means."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import Activation, NetworkConfig, PoolPlace
from model.device import without_autocast
from model.kernels.stem import stem
from model.kernels.stem import supports as takes_stem
from model.kernels.tail import compiled_tail
from model.kernels.tail import supports as takes_tail
from model.kernels.winograd import supports as takes_winograd
from model.kernels.winograd import winograd

LEAKY_SLOPE = 0.01

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": partial(F.relu, inplace=True),
    "leaky_relu": partial(F.leaky_relu, negative_slope=LEAKY_SLOPE, inplace=True),
    "gelu": F.gelu,
    "silu": F.silu,
}


class ActivationLayer(nn.Module):
    """An activation as a layer."""

    def __init__(self, name: Activation) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)


class Block(nn.Module):
    """x' = a1 C1(x) + ... + aL CL(x), with a = softmax(FC(channel means of x)) and L independent branches Cl.

    The branches share their input, so their L convolutions are one convolution with L x width output channels
    and their L batch norms one over as many channels: the same function as a loop over branches
    (benchmarks/training/plain.py), in fewer and larger operations. Branch l owns channels
    [l * width, (l + 1) * width).

    Shapes: x (n, channels, h, w) and its channel means (n, channels) to x' (n, width, h, w), or
    (n, width, h // 2, w // 2) where pooled, and its channel means (n, width).
    """

    def __init__(self, channels: int, width: int, pooled: bool, config: NetworkConfig) -> None:
        super().__init__()
        self.convs, self.width = config.convs, width
        self.conv = nn.Conv2d(channels, config.convs * width, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm2d(config.convs * width)
        self.activation = config.activation
        self.weigh = nn.Linear(channels, config.convs)
        self.pool_place = config.pool_place if pooled else None
        self.shortcut = config.shortcut and not pooled and channels == width

    def forward(self, x: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(x.device.type):
            # So small that a CPU takes longer in bfloat16: 1.5 of a step's 45 ms (48/96/192/192, batch 128).
            weights = self.weigh(means.to(self.weigh.weight.dtype)).softmax(1)
        branches, pool_place = convolve(x, self.conv, self.pool_place)
        tail = compiled_tail if takes_tail(branches, self.norm, pool_place) else plain_tail
        out, means_out = tail(branches, self.norm, weights, pool_place, self.activation)
        if self.shortcut:
            out = x + out
            means_out = out.mean((2, 3))
        return out, means_out


def convolve(x: Tensor, conv: nn.Conv2d, pool_place: PoolPlace | None) -> tuple[Tensor, PoolPlace | None]:
    """A block's convolution by whatever does it fastest.

    Returns:
        its output, and where the block's pool still stands; None where it has none, or it is done already.
    """
    pooled = pool_place == "conv"
    left = None if pooled else pool_place
    if takes_stem(x, conv):
        return stem(x, conv, pooled), left
    if takes_winograd(x, conv):
        return winograd(x, conv, pooled), left
    return conv(x), pool_place


def plain_tail(
    x: Tensor, norm: nn.BatchNorm2d, weights: Tensor, pool_place: PoolPlace | None, activation: Activation
) -> tuple[Tensor, Tensor]:
    """All that a block does behind its convolution, in PyTorch's own operations.

    Args:
        x: what the convolution gave, (n, L * width, h, w), branch by branch.
        norm: over its L * width channels; in training its running statistics are brought up to date.
        weights: of the branches, (n, L).
        pool_place: of the 2x2 max-pool, if any.
        activation: behind the norm.

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
    """`weighted_sum` as one small matrix product a pixel: what a CPU does best with channels that lie last.

    Measured on 2 EPYC cores, whole training step in images/s: 803 with slices, 888 with einsum, 1,088 so.
    """
    n, channels, height, width = branches.shape
    groups = weights.shape[1]
    pixels = branches.permute(0, 2, 3, 1).reshape(n, height * width, groups, channels // groups)
    total = torch.matmul(weights[:, None, None, :], pixels)
    return total.view(n, height, width, channels // groups).permute(0, 3, 1, 2)


def sum_of_groups(branches: Tensor, weights: Tensor) -> Tensor:
    """`weighted_sum` as a broadcast product and a sum: few, large kernels for a GPU (not measured on one yet)."""
    n, _, height, width = branches.shape
    groups = branches.view(n, weights.shape[1], -1, height, width)
    return (groups * weights[:, :, None, None, None]).sum(1)


class BlockNetwork(nn.Module):
    """Blocks, then an output block: channel means, hidden layers, logits.

    Takes images as they are stored (uint8, or float in [0, 255]; (n, 3, size, size)) and scales them itself to
    [-1, 1], as the public solution does (mean and standard deviation 0.5), so that no caller can get that wrong.
    Returns logits (n, classes).
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        widths = (3, *config.widths)
        self.blocks = nn.ModuleList(
            Block(channels, width, pooled, config)
            for channels, width, pooled in zip(widths, config.widths, config.pooled, strict=False)
        )
        layers: list[nn.Module] = []
        features = config.widths[-1]
        for hidden in config.head:
            layers += [nn.Linear(features, hidden), ActivationLayer(config.activation)]
            features = hidden
        self.logits = nn.Linear(features, config.classes)
        self.hidden = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.logits.weight.dtype).sub(127.5).div(127.5)
        x = x.contiguous(memory_format=torch.channels_last)
        means = x.mean((2, 3))
        for block in self.blocks:
            x, means = block(x, means)
        with without_autocast(x.device.type):
            logits: Tensor = self.logits(self.hidden(means.to(self.logits.weight.dtype)))
        return logits


def build_network(config: NetworkConfig, seed: int = 0, device: torch.device | str = "cpu") -> BlockNetwork:
    """A freshly initialised network on a device; the seed alone decides its weights.

    The weights are drawn on the CPU, so that they are the same on every device, and the global generator is
    left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BlockNetwork(config)
    return network.to(device).to(memory_format=torch.channels_last)


def count_parameters(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in network.parameters())
