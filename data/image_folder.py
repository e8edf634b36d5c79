"""Any image set in ImageFolder layout: ``DIR/CLASS/*.png``, or ``DIR/train/CLASS`` with ``DIR/test/CLASS``.

Images are decoded once (by one process of a machine; the others wait), resized to 3x32x32 and cached next to the user's
other caches; a changed folder (a file added, removed, resized or touched) is decoded again. Without a ``test`` folder a
fixed, stratified sixth of the images is set aside as test images.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.model_selection import train_test_split
from torch import Tensor

from data.errors import DataError
from data.files import whole_file
from data.images import IMAGE_SIZE, LabelledImages
from data.lock import one_at_a_time

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

TEST_SHARE = 1 / 6
DIVISION_SEED = 0
MIN_PER_CLASS = 12
"""Fewer images of a class cannot be divided into fit, validation and test images."""

MIN_PER_CLASS_TRAIN = 10
"""The same if the test images have a folder of their own."""

DECODE_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)
"""All that PIL's decoders raised for 97,000 damaged files in 21 formats; RuntimeError comes with AVIF and DDS."""


def load_part(
    root: Path, cache_dir: Path, test: bool, notify: Callable[[str], None] = lambda _: None
) -> LabelledImages:
    """The training images, or with ``test`` those set aside; only `data.holdout` asks for the latter.

    ``notify`` gets a line if another process is decoding them and this one waits for it.

    Raises:
        DataError: no such folder, no classes in it, too few images, or an image that cannot be decoded.
    """
    if not root.is_dir():
        raise DataError(f"folder:{root} is not a folder; it should hold one sub-folder of images per class")
    if (root / "train").is_dir() and (root / "test").is_dir():
        # Compared for either part: a study must not run into this after all its training.
        if _classes(root / "train") != _classes(root / "test"):
            raise DataError(f"folder:{root} has other classes in test/ than in train/")
        part, at_least = ("test", 1) if test else ("train", MIN_PER_CLASS_TRAIN)
        images, labels, classes = _decoded(root / part, cache_dir, at_least, notify)
        return LabelledImages(images, labels, classes, mirror=True)
    images, labels, classes = _decoded(root, cache_dir, MIN_PER_CLASS, notify)
    training, held_out = train_test_split(
        np.arange(len(labels)), test_size=TEST_SHARE, stratify=labels.numpy(), random_state=DIVISION_SEED
    )
    rows = torch.from_numpy(np.sort(held_out if test else training))
    return LabelledImages(images[rows], labels[rows], classes, mirror=True)


def _classes(root: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))


def _decoded(
    root: Path, cache_dir: Path, at_least: int, notify: Callable[[str], None]
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images (uint8, (n, 3, 32, 32)), labels (int64, (n,)) and class names, from the cache if it is fresh."""
    from torchvision.datasets import ImageFolder  # 1.6 s, needed here only

    try:
        listing = ImageFolder(root)
    except FileNotFoundError as error:
        raise DataError(f"folder:{root} has no images of some class: {error}") from error
    if len(listing.classes) < 2:
        raise DataError(f"folder:{root} has {len(listing.classes)} class; a search needs at least two")
    for name, index in listing.class_to_idx.items():
        if listing.targets.count(index) < at_least:
            raise DataError(f"folder:{root} has fewer than {at_least} images of class {name!r}")
    cached = cache_dir / f"folder-{_listing_hash(root, listing)}.safetensors"
    images = _cached(cached)
    if images is None:
        with one_at_a_time(cached.with_suffix(".lock"), lambda: notify(f"another process is decoding {root}; waiting")):
            images = _cached(cached)
            if images is None:
                images = torch.stack([decode_image(Path(path)).pixels for path, _ in listing.samples])
                _store(images, cached)
    return images, torch.tensor(listing.targets), tuple(listing.classes)


def _cached(cached: Path) -> Tensor | None:
    try:
        with safe_open(cached, framework="pt") as stored:
            images: Tensor = stored.get_tensor("images")
            return images
    except (OSError, SafetensorError):
        return None


def _store(images: Tensor, cached: Path) -> None:
    """Write the cache whole or not at all; a cache that cannot be written costs time, not the study."""
    with contextlib.suppress(OSError, SafetensorError):  # it may be on a read-only disk, or below a file
        cached.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(cached) as partial:
            save_file({"images": images}, partial)


def _listing_hash(root: Path, listing: "ImageFolder") -> str:
    def entry(path: str) -> tuple[str, int, int]:
        stat = Path(path).stat()
        return str(Path(path).relative_to(root)), stat.st_size, stat.st_mtime_ns

    text = json.dumps([str(root.resolve()), IMAGE_SIZE, [entry(path) for path, _ in listing.samples]])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image file.

    Attributes:
        pixels: uint8, shape (3, 32, 32), RGB.
        size: width and height, in pixels, that it has in the file.
    """

    pixels: Tensor
    size: tuple[int, int]


def decode_image(path: Path) -> DecodedImage:
    """Decode an image of any size and format that PIL knows, and resize it to 3x32x32.

    Raises:
        DataError: it does not exist, or cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            size = image.size
            small = _rgb(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    except DECODE_ERRORS as error:
        raise DataError(f"{path} is not an image that can be decoded: {error}") from error
    return DecodedImage(torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1), size)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would turn all but the darkest 1/256 white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P":  # via RGBA, or PIL warns of transparency
        image = image.convert("RGBA")
    return image.convert("RGB")
