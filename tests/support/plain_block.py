"""The block network written as its definition reads: a loop over independent branches, for comparison."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import NetworkConfig
from model.network import Block, BlockNetwork, build_activation


class PlainBranch(nn.Module):
    """Conv3x3 -> [pool] -> BatchNorm -> activation -> [pool]."""

    def __init__(self, channels: int, width: int, pool_place: str | None, config: NetworkConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.activation = build_activation(config.activation)
        self.pool_place = pool_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.pool_place == "conv":
            x = F.max_pool2d(x, 2)
        x = self.activation(self.norm(x))
        return F.max_pool2d(x, 2) if self.pool_place == "branch" else x


class PlainBlock(nn.Module):
    def __init__(self, channels: int, width: int, pooled: bool, config: NetworkConfig) -> None:
        super().__init__()
        self.pool_place = config.pool_place if pooled else None
        self.branches = nn.ModuleList(
            PlainBranch(channels, width, self.pool_place, config) for _ in range(config.convs)
        )
        self.weigh = nn.Linear(channels, config.convs)
        self.shortcut = config.shortcut and not pooled and channels == width

    def forward(self, x: Tensor) -> Tensor:
        a = torch.softmax(self.weigh(x.mean((2, 3))), dim=1)
        out = torch.zeros(())
        for number, branch in enumerate(self.branches):
            out = out + a[:, number].view(-1, 1, 1, 1) * branch(x)
        if self.pool_place == "sum":
            out = F.max_pool2d(out, 2)
        return out + x if self.shortcut else out

    def take(self, block: Block) -> None:
        """Copy a fused block's weights and running statistics."""
        with torch.no_grad():
            self.weigh.load_state_dict(block.weigh.state_dict())
            for number, branch in enumerate(self.branches):
                assert isinstance(branch, PlainBranch)
                own = slice(number * block.width, (number + 1) * block.width)
                for name in ("weight", "bias"):
                    getattr(branch.conv, name).copy_(getattr(block.conv, name)[own])
                    getattr(branch.norm, name).copy_(getattr(block.norm, name)[own])
                for name in ("running_mean", "running_var"):
                    getattr(branch.norm, name).copy_(getattr(block.norm, name)[own])


class PlainNetwork(nn.Module):
    def __init__(self, network: BlockNetwork) -> None:
        super().__init__()
        config = network.config
        widths = (3, *config.widths)
        self.blocks = nn.ModuleList(
            PlainBlock(widths[i], widths[i + 1], config.pooled[i], config) for i in range(len(config.widths))
        )
        for plain, block in zip(self.blocks, network.blocks, strict=True):
            assert isinstance(plain, PlainBlock)
            assert isinstance(block, Block)
            plain.take(block)
        self.hidden, self.logits = network.hidden, network.logits

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() - 127.5) / 127.5
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.logits(self.hidden(x.mean((2, 3))))
        return logits
