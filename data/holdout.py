"""The test images. Only the retrain may import this module; import-linter enforces that in CI."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import cifar10, digits
from data import image_folder as folder
from data.paths import cache_folder
from data.source import check_name, folder_of


@dataclass(frozen=True)
class Holdout:
    """Test images, on the device.

    Attributes:
        images: uint8, shape (n, 3, 32, 32), RGB.
        labels: int64, shape (n,).
    """

    images: Tensor
    labels: Tensor


def load_holdout(dataset: str, data_dir: Path, device: torch.device) -> Holdout:
    """The test images of a data set: to be read once, after all training.

    Raises:
        DataError: unknown, absent or damaged.
    """
    check_name(dataset)
    if dataset == "cifar10":
        from torchvision.datasets import CIFAR10  # slow to import, see `data.cifar10`

        cifar10.verify(data_dir)
        part = cifar10.as_labelled_images(CIFAR10(data_dir, train=False, download=False))
    elif dataset == "digits":
        part = digits.load_part(test=True)
    else:
        part = folder.load_part(folder_of(dataset), cache_folder(), test=True)
    return Holdout(part.images.to(device), part.labels.to(device))
