"""Shuffled, augmented batches made on the device itself: no loader processes, no copies from the host."""

import torch
from torch import Tensor

from data.augment import augment


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in an epoch; the remaining images wait for another epoch's shuffle. At least one."""
    return max(1, images // batch_size)


class Batches:
    """Batches of one data set, epoch by epoch.

    Only the device knows which batch is next, so `take` asks the host for nothing: a CUDA graph can hold it, and each
    replay gives the next batch.

    Args:
        images: uint8, shape (n, 3, h, w).
        labels: int64, shape (n,).
        batch_size: images in a batch; fewer if there are fewer images.
        strength: of the augmentation, in [0, 1].
        mirror: whether images may be flipped.
        generator: of order and augmentation; on the same device as the images.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, strength: float, mirror: bool, generator: torch.Generator
    ) -> None:
        self.images, self.labels = images, labels
        self.batch_size = min(batch_size, len(labels))
        self.steps = steps_per_epoch(len(labels), self.batch_size)
        self._strength, self._mirror, self._generator = strength, mirror, generator
        self._order = torch.empty(len(labels), dtype=torch.int64, device=labels.device)
        self._rows = torch.arange(self.batch_size, device=labels.device)
        self._next = self._rows.clone()

    def shuffle(self) -> None:
        """Begin an epoch of ``steps`` batches."""
        torch.randperm(len(self._order), generator=self._generator, device=self._order.device, out=self._order)
        self._next.copy_(self._rows)

    def take(self) -> tuple[Tensor, Tensor]:
        """The next batch: images (uint8, (batch, 3, h, w)) and labels (int64, (batch,)), no image twice an epoch."""
        rows = self._order[self._next]
        self._next += self.batch_size
        return augment(self.images[rows], self._strength, self._generator, self._mirror), self.labels[rows]
