"""The block network trained plainly, as the public solution does it: what our speed and our results are compared with.

A loop over independent branches, float32, NCHW; images decoded and augmented one by one by torchvision in the
loader's processes, moved to the device at every step; AdamW; loss and accuracy read at every step.
"""

import operator
import time
from collections.abc import Iterator, Sized
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10

from data.images import LabelledImages
from model.config import Activation, NetworkConfig
from model.network import Block, BlockNetwork

BATCH_SIZE = 64
"""The public solution's."""

LEAD_STEPS, LEAD_SECONDS = 5, 0.5
"""Steps, and seconds at most, before the clock starts: they use up the four batches that the loader has ready after a
pause. Left out if steps are so long that four batches more or less do not matter.
"""


def plain_activation(name: Activation) -> nn.Module:
    """PyTorch's own module, not in place."""
    modules: dict[Activation, type[nn.Module]] = {
        "relu": nn.ReLU,
        "leaky_relu": nn.LeakyReLU,
        "gelu": nn.GELU,
        "silu": nn.SiLU,
    }
    return modules[name]()


class PlainBranch(nn.Module):
    """Conv3x3 -> [pool] -> BatchNorm -> activation -> [pool]."""

    def __init__(self, channels: int, width: int, pool_place: str | None, config: NetworkConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.activation = plain_activation(config.activation)
        self.pool_place = pool_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.pool_place == "conv":
            x = F.max_pool2d(x, 2)
        x = self.activation(self.norm(x))
        return F.max_pool2d(x, 2) if self.pool_place == "branch" else x


class PlainBlock(nn.Module):
    """x' = a1 C1(x) + ... + aL CL(x), written as it reads."""

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
        weighted = (a[:, number].view(-1, 1, 1, 1) * branch(x) for number, branch in enumerate(self.branches))
        out: Tensor = reduce(operator.add, weighted)
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
    """A block network over images that are scaled already, float in [-1, 1], as `plain_transform` makes them."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        widths = (3, *config.widths)
        self.blocks = nn.ModuleList(
            PlainBlock(widths[i], widths[i + 1], config.pooled[i], config) for i in range(len(config.widths))
        )
        layers: list[nn.Module] = []
        features = config.widths[-1]
        for hidden in config.head:
            layers += [nn.Linear(features, hidden), plain_activation(config.activation)]
            features = hidden
        self.hidden = nn.Sequential(*layers)
        self.logits = nn.Linear(features, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.logits(self.hidden(x.mean((2, 3))))
        return logits

    def take(self, network: BlockNetwork) -> None:
        """Copy a fused network's weights and running statistics."""
        for plain, block in zip(self.blocks, network.blocks, strict=True):
            assert isinstance(plain, PlainBlock)
            assert isinstance(block, Block)
            plain.take(block)
        self.hidden.load_state_dict(network.hidden.state_dict())
        self.logits.load_state_dict(network.logits.state_dict())


def plain_transform() -> Any:
    """Flip and crop of a PIL image, scaled to [-1, 1]."""
    return transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
    )


class ImagesInMemory(Dataset[tuple[Tensor, int]]):
    """Any images handled as torchvision's CIFAR10 handles its own: a PIL image at every access."""

    def __init__(self, source: LabelledImages, transform: Any) -> None:
        self._arrays = source.images.permute(0, 2, 3, 1).contiguous().numpy()
        self._labels, self._transform = source.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._arrays[row])), self._labels[row]


def cifar10_images(data_dir: Path) -> Dataset[tuple[Tensor, int]]:
    """CIFAR-10's training images as torchvision gives them."""
    images: Dataset[tuple[Tensor, int]] = CIFAR10(data_dir, train=True, transform=plain_transform())
    return images


class PlainTrainer:
    """A training that goes on epoch after epoch, for as long as its caller wants.

    Args:
        network: moved to the device.
        images: augmented and scaled.
        batch_size: images in a step.
        device: where to train.
        loaders: processes that decode and augment.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Dataset[tuple[Tensor, int]],
        batch_size: int,
        device: torch.device,
        loaders: int = 2,
    ) -> None:
        assert isinstance(images, Sized)
        assert len(images)  # else its epochs would go round for ever
        self.network = network.to(device).train()
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self._device = device
        self._loss = nn.CrossEntropyLoss()
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
        self._batches = _endless(DataLoader(images, batch_size, shuffle=True, num_workers=loaders))
        self._step_seconds = 0.0

    def step(self) -> int:
        """One step; the number of its images."""
        start = time.perf_counter()
        images, labels = next(self._batches)
        images, labels = images.to(self._device), labels.to(self._device)
        self._optimizer.zero_grad()
        logits = self.network(images)
        loss = self._loss(logits, labels)
        loss.backward()
        self._optimizer.step()
        self.losses.append(loss.item())
        self.accuracies.append((logits.argmax(1) == labels).float().mean().item())
        self._step_seconds = time.perf_counter() - start
        return len(labels)

    def warm_up(self) -> None:
        """The first step, which allocates and chooses kernels."""
        self.step()

    def measure(self, seconds: float) -> float:
        """Images a second over whole steps, for that long or a little longer; at least one step."""
        if self._step_seconds < LEAD_SECONDS:
            self._lead()
        images, start = 0, time.perf_counter()
        while True:
            images += self.step()  # ends with a value on the host, so the device has done it
            spent = time.perf_counter() - start
            if spent >= seconds:
                return images / spent

    def _lead(self) -> None:
        start = time.perf_counter()
        for _ in range(LEAD_STEPS):
            self.step()
            if time.perf_counter() - start > LEAD_SECONDS:
                return


def _endless(loader: "DataLoader[tuple[Tensor, int]]") -> Iterator[Any]:
    while True:
        yield from loader
