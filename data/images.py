"""The plain record that every source of images returns."""

from dataclasses import dataclass

from torch import Tensor

IMAGE_SIZE = 32
"""Height and width, in pixels, to which every source is resized."""


@dataclass(frozen=True)
class LabelledImages:
    """Images with their labels, in the source's own fixed order, in the host's memory.

    Attributes:
        images: uint8, shape (n, 3, 32, 32), RGB.
        labels: int64, shape (n,), indices into ``classes``.
        classes: the name of each class.
        mirror: whether an image flipped left to right still shows its class (digits do not).
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mirror: bool
