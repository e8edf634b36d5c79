"""Augmentation as pure functions of batches of tensors, on any device.

Every function takes images of shape (n, 3, h, w), uint8 or floating point in [0, 255], and returns the same
shape and dtype. Random numbers come only from an explicit generator, so the same generator state gives the same batch.

One ``strength`` s in [0, 1] sets everything (`AugmentConfig`); 0 changes nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AugmentConfig:
    """What one augmentation strength stands for.

    Attributes:
        flip: chance that an image is flipped left to right.
        pad: crops are taken from the image reflect-padded by this many pixels.
        cutout: side, in pixels, of the grey square laid over each image.
        jitter: brightness, contrast and saturation are each scaled by 1 +- jitter.
    """

    flip: float
    pad: int
    cutout: int
    jitter: float


def augment_config(strength: float, mirror: bool = True) -> AugmentConfig:
    """What a strength stands for.

    ======== ====== === ====== ======
    strength flip   pad cutout jitter
    ======== ====== === ====== ======
    0        0      0   0      0
    0.25     0.5    2   4      0.1
    0.5      0.5    4   8      0.2
    1        0.5    8   16     0.4
    ======== ====== === ====== ======

    Args:
        strength: in [0, 1].
        mirror: False for images that must not be flipped, such as digits.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"augmentation strength must lie in [0, 1], got {strength}")
    return AugmentConfig(
        flip=0.5 * min(1.0, 4 * strength) if mirror else 0.0,
        pad=round(8 * strength),
        cutout=round(16 * strength),
        jitter=0.4 * strength,
    )


def augment(images: Tensor, strength: float, generator: torch.Generator, mirror: bool = True) -> Tensor:
    """Flip, crop, cut out and jitter a batch; each image by its own draw."""
    chosen = augment_config(strength, mirror)
    if chosen.flip:
        images = flip(images, _uniform((len(images),), generator) < chosen.flip)
    if chosen.pad:
        shifts = _integers(-chosen.pad, chosen.pad + 1, (2, len(images)), generator)
        images = crop(images, shifts[0], shifts[1])
    if chosen.cutout:
        height, width = images.shape[-2:]
        rows = _integers(0, height, (len(images),), generator)
        columns = _integers(0, width, (len(images),), generator)
        images = cutout(images, rows, columns, chosen.cutout)
    if chosen.jitter:
        factors = 1 + chosen.jitter * (2 * _uniform((3, len(images)), generator) - 1)
        images = colour_jitter(images, factors[0], factors[1], factors[2])
    return images


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Flip the chosen images (bool, shape (n,)) left to right."""
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def crop(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Crop each image from itself, reflect-padded and shifted.

    Equals padding by p with reflection and taking the h x w window whose corner is at (p + down, p + right),
    for shifts (int64, shape (n,)) in [-p, p] and p < h, w.
    """
    height, width = images.shape[-2:]
    rows = _reflect(torch.arange(height, device=images.device) + down[:, None], height)
    columns = _reflect(torch.arange(width, device=images.device) + right[:, None], width)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    # Indexing with the channels last moves three bytes at a time: whole pixels.
    pixels = images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
    return pixels.permute(0, 3, 1, 2)


def cutout(images: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    """Lay a grey square of ``side`` pixels, its middle at (row, column), over each image; it may extend past the edge.

    Source: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) - row[:, None] + side // 2
    columns = torch.arange(width, device=images.device) - column[:, None] + side // 2
    inside_rows, inside_columns = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    hidden = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return images.masked_fill(hidden, 128)


def colour_jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Scale each image's brightness, contrast about its mean, and saturation about its grey (factors of shape (n,))."""
    factors = (factor[:, None, None, None] for factor in (brightness, contrast, saturation))
    by_brightness, by_contrast, by_saturation = factors
    grey = images.mean(1, keepdim=True, dtype=torch.float32)
    mean = grey.mean((2, 3), keepdim=True)
    # One affine map of each image: about grey, then about the mean, then scaled.
    value = images * (by_saturation * by_contrast * by_brightness)
    value = value + grey * ((1 - by_saturation) * by_contrast * by_brightness)
    value = value + mean * ((1 - by_contrast) * by_brightness)
    value = value.clamp(0, 255)
    return value.to(images.dtype) if images.is_floating_point() else value.round().to(images.dtype)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Fold indices from just outside [0, size) back in, without repeating the edge pixel."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def _integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Whole numbers in [low, high)."""
    return torch.randint(low, high, shape, generator=generator, device=generator.device)
