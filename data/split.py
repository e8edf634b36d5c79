"""The fixed division of the training images into fit and validation images, on the device."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from data.images import LabelledImages
from data.source import load_training_images

VALIDATION_SHARE = 0.1
"""5,000 of CIFAR-10's 50,000 training images."""


@dataclass(frozen=True)
class Split:
    """Fit and validation images of one data set, on one device.

    Attributes:
        fit_images, validation_images: uint8, shape (n, 3, 32, 32), RGB.
        fit_labels, validation_labels: int64, shape (n,).
        classes: the name of each class.
        mirror: whether augmentation may flip images left to right.
        fingerprint: SHA-256 over images, labels, classes and division; equal on every machine.
    """

    fit_images: Tensor
    fit_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    classes: tuple[str, ...]
    mirror: bool
    fingerprint: str


def load_split(dataset: str, data_dir: Path, seed: int, device: torch.device) -> Split:
    """Load a data set's training images and divide them, stratified by class.

    Args:
        dataset: ``cifar10``, ``digits`` or ``folder:DIR``.
        data_dir: the folder that holds torchvision's files.
        seed: of the division; the same seed gives the same division everywhere.
        device: where the tensors will be.

    Raises:
        DataError: the images are absent or damaged.
    """
    return divide(load_training_images(dataset, data_dir), seed, device)


def divide(source: LabelledImages, seed: int, device: torch.device) -> Split:
    """Divide training images 9:1 into fit and validation images, stratified and seeded."""
    fit, validation = train_test_split(
        np.arange(len(source.labels)),
        test_size=VALIDATION_SHARE,
        stratify=source.labels.numpy(),
        random_state=seed,
    )
    fit_rows, validation_rows = (torch.from_numpy(np.sort(rows)) for rows in (fit, validation))
    return Split(
        fit_images=source.images[fit_rows].to(device),
        fit_labels=source.labels[fit_rows].to(device),
        validation_images=source.images[validation_rows].to(device),
        validation_labels=source.labels[validation_rows].to(device),
        classes=source.classes,
        mirror=source.mirror,
        fingerprint=_fingerprint(source, validation_rows),
    )


def first_images(split: Split, count: int) -> Split:
    """The same split with only the first ``count`` fit images of a fixed, class-balanced order."""
    if count >= len(split.fit_labels):
        return split
    rows = _balanced_order(split.fit_labels.cpu())[:count].to(split.fit_labels.device)
    return replace(split, fit_images=split.fit_images[rows], fit_labels=split.fit_labels[rows])


def with_validation(split: Split) -> Split:
    """The split for a final training: fit on fit and validation images together.

    The validation images stay what they were, so a curve over them is then one of training, not an estimate.
    """
    return replace(
        split,
        fit_images=torch.cat([split.fit_images, split.validation_images]),
        fit_labels=torch.cat([split.fit_labels, split.validation_labels]),
    )


def _balanced_order(labels: Tensor) -> Tensor:
    """Rows ordered so that every prefix holds the classes in equal number (to within one)."""
    rank_in_class = torch.empty_like(labels)
    for label in range(int(labels.max()) + 1):
        rows = (labels == label).nonzero().flatten()
        rank_in_class[rows] = torch.arange(len(rows))
    return torch.argsort(rank_in_class, stable=True)


def _fingerprint(source: LabelledImages, validation_rows: Tensor) -> str:
    digest = hashlib.sha256(repr((tuple(source.images.shape), source.classes)).encode())
    for tensor in (source.images, source.labels, validation_rows):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


DIVISION_SEED = 0
"""Of the division into fit and validation images: one division for all studies, so that they can be compared."""
