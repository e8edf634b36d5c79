"""Shuffled, augmented batches made on the device itself: no loader processes, no copies from the host."""

from collections.abc import Iterator

import torch
from torch import Tensor

from data.augment import augment


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in an epoch; the remainder waits for another epoch's shuffle. At least one."""
    return max(1, images // batch_size)


def training_batches(
    images: Tensor, labels: Tensor, batch_size: int, strength: float, mirror: bool, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented batches.

    Args:
        images: uint8, shape (n, 3, h, w).
        labels: int64, shape (n,).
        batch_size: images in a batch; fewer where there are fewer images.
        strength: of the augmentation, in [0, 1].
        mirror: whether images may be flipped.
        generator: on the same device as the images.

    Yields:
        images (uint8, (batch, 3, h, w)) and labels (int64, (batch,)).
    """
    order = torch.randperm(len(labels), generator=generator, device=labels.device)
    for step in range(steps_per_epoch(len(labels), batch_size)):
        rows = order[step * batch_size : (step + 1) * batch_size]
        yield augment(images[rows], strength, generator, mirror), labels[rows]
