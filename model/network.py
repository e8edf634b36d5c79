"""The block network: blocks of parallel convolutions, weighted by a vector computed from channel means."""

import torch
from torch import Tensor, nn

from model.activation import ActivationLayer
from model.config import NetworkConfig
from model.device import without_autocast
from model.kernels.dispatch import block_tail, convolve


class Block(nn.Module):
    """x' = a1 C1(x) + ... + aL CL(x), with a = softmax(FC(channel means of x)) and L independent branches Cl.

    The branches share their input, so their L convolutions are one convolution with L x width output channels
    and their L batch norms one over as many channels: the same function as a loop over branches
    (benchmarks/training/plain.py), in fewer and larger operations. Branch l owns channels
    [l * width, (l + 1) * width).

    Shapes: x (n, channels, h, w) and its channel means (n, channels) to x' (n, width, h, w), or
    (n, width, h // 2, w // 2) if pooled, and its channel means (n, width).
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
        out, means_out = block_tail(branches, self.norm, weights, pool_place, self.activation)
        if self.shortcut:
            out = x + out
            means_out = out.mean((2, 3))
        return out, means_out


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
    unchanged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BlockNetwork(config)
    return network.to(device).to(memory_format=torch.channels_last)


def count_parameters(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in network.parameters())
