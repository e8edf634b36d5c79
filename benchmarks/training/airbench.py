"""airbench94's network, and a plain loop of its kind: a fast public training to compare ours with on a GPU.

After Keller Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498, and its airbench94.py
(uncompiled). Left out of the loop: test-time augmentation, the learning rate's fall, and Lookahead, an average of the
weights every fifth step; without it the loop is a little faster than the original.
"""

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from data.images import LabelledImages
from model.config import FitConfig

BATCH_SIZE = 1024
WIDTHS = (64, 256, 256)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MOMENTUM, LABEL_SMOOTHING, TRANSLATE = 0.85, 0.2, 2
STEP_SCALE = 1024 * (1 + 1 / (1 - MOMENTUM))
LR, DECAY, BIAS_SCALER = 11.5 / STEP_SCALE, 0.0153 * BATCH_SIZE / STEP_SCALE, 64.0
"""Its learning rate is that of the sum of a batch's losses, and its weight decay does not depend on it."""

START_FACTOR = 0.2
"""Share of the peak rate at which its schedule starts; the loop stays there, because speed does not depend on it."""

FIT = FitConfig(
    optimizer="sgd",
    epochs=100_000,
    batch_size=BATCH_SIZE,
    momentum=MOMENTUM,
    label_smoothing=LABEL_SMOOTHING,
    augment=0.25,  # flip and shifts by 2 pixels as airbench94 has them; ours adds cutout and jitter
)
"""Our nearest."""


def conv(channels: int, width: int) -> nn.Conv2d:
    """A 3x3 convolution without bias whose first filters are the identity."""
    module = nn.Conv2d(channels, width, 3, padding="same", bias=False)
    with torch.no_grad():
        nn.init.dirac_(module.weight[:channels])
    return module


def norm(width: int) -> nn.BatchNorm2d:
    """Batch norm that learns a bias but no scale; PyTorch counts momentum the other way round."""
    module = nn.BatchNorm2d(width, eps=1e-12, momentum=1 - 0.6)
    module.weight.requires_grad = False
    return module


class AirbenchNetwork(nn.Module):
    """airbench94's network for 32x32 images: 1,971,640 parameters, the frozen first filters among them.

    Takes uint8 images, as our networks do, and returns logits. ``body`` is the part that takes images which
    `normalise` has scaled already.

    Args:
        images: uint8, (n, 3, h, w), from whose patches the frozen first layer is made; None leaves it random.
        widths: of the three groups.
    """

    def __init__(self, images: Tensor | None = None, widths: tuple[int, int, int] = WIDTHS) -> None:
        super().__init__()
        whitening = nn.Conv2d(3, 24, 2)
        whitening.weight.requires_grad = False
        nn.init.zeros_(whitening.bias)  # type: ignore[arg-type]
        layers: list[nn.Module] = [whitening, nn.GELU()]
        for channels, width in zip((24, *widths), widths, strict=False):
            layers += [conv(channels, width), nn.MaxPool2d(2), norm(width), nn.GELU()]
            layers += [conv(width, width), norm(width), nn.GELU()]
        self.body = nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten(), nn.Linear(widths[-1], 10, bias=False))
        # Buffers, so on the device already: copying them there at every step would make the host wait.
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(3, 1, 1), persistent=False)
        if images is not None:
            whiten(whitening, self.normalise(images))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.body(self.normalise(images)) / 9
        return logits

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images scaled by the mean and standard deviation of CIFAR-10's channels, channels last."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def whiten(layer: nn.Conv2d, images: Tensor, eps: float = 5e-4) -> None:
    """Make a 2x2 convolution's filters the eigenvectors of the images' 2x2 patches, scaled to unit variance, and
    their negatives.
    """
    patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 3 * 2 * 2)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + eps).sqrt()).T.flip(0).view(-1, 3, 2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([filters, -filters]))


def count_flops() -> int:
    """Floating-point operations of one image's forward pass, counted as `model.cost.count_cost` does."""
    with torch.device("meta"):
        network = AirbenchNetwork().eval()
        image = torch.empty(1, 3, 32, 32)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.body(image)
    return int(counter.get_total_flops())


class AirbenchTrainer:
    """A plain loop as airbench94 does it: all in half precision, images on the device and augmented all at once.

    Args:
        network: moved to the device and to the dtype, but for its norms.
        source: all images; the remainder of the last batch is left out of each epoch.
        device: where to train.
        dtype: half precision, which few CPUs can do: there bfloat16 or float32.
        batch_size: images in a step.
    """

    def __init__(
        self,
        network: AirbenchNetwork,
        source: LabelledImages,
        device: torch.device,
        dtype: torch.dtype = torch.half,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        # For this process alone; it is what airbench94 does.
        torch.backends.cudnn.benchmark = True
        self.losses: list[float] = []
        self.body = network.body.to(device, dtype).to(memory_format=torch.channels_last).train()
        for module in self.body:
            if isinstance(module, nn.BatchNorm2d):
                module.float()
        biases = [m.bias for m in self.body if isinstance(m, nn.BatchNorm2d)]
        known = {id(bias) for bias in biases}
        others = [p for p in self.body.parameters() if p.requires_grad and id(p) not in known]
        groups = [
            {"params": biases, "lr": START_FACTOR * LR * BIAS_SCALER, "weight_decay": DECAY / (LR * BIAS_SCALER)},
            {"params": others, "lr": START_FACTOR * LR, "weight_decay": DECAY / LR},
        ]
        self._optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)
        self._loss = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING, reduction="none")
        self._labels, self._batch_size, self._epoch = source.labels.to(device), min(batch_size, len(source.labels)), 0
        images = network.to(device).normalise(source.images.to(device))
        images = flip_half(images.to(dtype))
        self._padded = F.pad(images, (TRANSLATE,) * 4, "reflect")

    def epoch(self) -> int:
        """One epoch; the number of its images."""
        count = 0
        loss = torch.zeros(())
        for images, labels in self._batches():
            loss = self._loss(self.body(images) / 9, labels).sum()
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            count += len(labels)
        # The one synchronisation.
        self.losses.append(loss.item() / self._batch_size)
        return count

    def warm_up(self) -> None:
        """The first epoch."""
        self.epoch()

    def measure(self, seconds: float) -> float:
        """Images a second over whole epochs, for that long or a little longer."""
        images, start = 0, time.perf_counter()
        while True:
            images += self.epoch()
            spent = time.perf_counter() - start
            if spent >= seconds:
                return images / spent

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = crop_each(self._padded)
        if self._epoch % 2:
            images = images.flip(-1)
        self._epoch += 1
        order = torch.randperm(len(images), device=images.device)
        for start in range(0, len(order) - self._batch_size + 1, self._batch_size):
            rows = order[start : start + self._batch_size]
            yield images[rows], self._labels[rows]


def flip_half(images: Tensor) -> Tensor:
    """Flip half of the images at random; every other epoch flips all of them once more."""
    chosen = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def crop_each(padded: Tensor) -> Tensor:
    """A random window of every image, as large as the image was before padding; shift by shift."""
    size, shifts = padded.shape[-1] - 2 * TRANSLATE, 2 * TRANSLATE + 1
    choice = torch.randint(shifts**2, (len(padded),), device=padded.device)
    cropped = torch.empty_like(padded[..., :size, :size])
    for number in range(shifts**2):
        chosen = choice == number
        down, right = divmod(number, shifts)
        cropped[chosen] = padded[chosen, :, down : down + size, right : right + size]
    return cropped
