"""What a saved model sees in image files."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from data.errors import DataError
from data.folder import Picture, read_picture
from data.images import IMAGE_SIZE
from model.quality import logits_of
from model.saved import SavedModel, load_model
from search.errors import UserError
from search.view import percent

SIZES_SHOWN = 3


@dataclass(frozen=True)
class Prediction:
    """What a model sees in one image.

    Attributes:
        image: the file.
        probabilities: the most probable classes with their probabilities, in falling order.
        resized_from: width and height in the file; None where they are the network's.
    """

    image: Path
    probabilities: tuple[tuple[str, float], ...]
    resized_from: tuple[int, int] | None


def open_model(folder: Path, device: torch.device) -> SavedModel:
    """A saved model that takes images of the size to which this project brings all.

    Raises:
        ConfigError: there is none, or it is damaged.
        UserError: it takes images of another size.
    """
    saved = load_model(folder, device)
    if (size := saved.network.config.image_size) != IMAGE_SIZE:
        raise UserError(f"the model in {folder} takes images of {size}x{size} pixels, not {IMAGE_SIZE}x{IMAGE_SIZE}")
    return saved


def pictures_in(folder: Path) -> list[Path]:
    """The images in a folder and those below it, by the endings of their names, in the order of their paths.

    Raises:
        UserError: it is not there, or holds none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS  # 1.6 s, which only whole folders wait for

    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
    if not found:
        raise UserError(f"no images in {folder}: no file there ends in {', '.join(IMG_EXTENSIONS)}")
    return found


def predict(
    saved: SavedModel,
    paths: Sequence[Path],
    device: torch.device,
    top: int,
    unreadable: Callable[[DataError], None],
) -> list[Prediction]:
    """What a model sees in images of any size and format.

    Computed in float32, so that two devices give the same probabilities as nearly as can be.

    Args:
        saved: on the device.
        paths: the images.
        device: to compute on.
        top: classes of each image, the most probable ones; all where there are fewer.
        unreadable: gets the error of each image that cannot be read, which is then left out; it may raise it.
    """
    pictures: list[tuple[Path, Picture]] = []
    for path in paths:
        try:
            pictures.append((path, _read(path)))
        except DataError as error:
            unreadable(error)
    if not pictures:
        return []
    images = torch.stack([picture.pixels for _, picture in pictures]).to(device)
    probabilities = logits_of(saved.network, images, "float32", saved.flip).softmax(1)
    values, classes = (tensor.tolist() for tensor in probabilities.topk(min(top, len(saved.classes))))
    return [
        Prediction(
            path,
            tuple((saved.classes[number], value) for number, value in zip(*best, strict=True)),
            picture.size if picture.size != (IMAGE_SIZE, IMAGE_SIZE) else None,
        )
        for (path, picture), best in zip(pictures, zip(classes, values, strict=True), strict=True)
    ]


def _read(path: Path) -> Picture:
    if path.is_dir():
        raise DataError(f"{path} is a folder; for the images in it: --dir {path}")
    if not path.exists():
        raise DataError(f"no file {path}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as of odd metadata: the picture is read, or there is an error
        return read_picture(path)


def as_json(predictions: Sequence[Prediction], top: int) -> list[dict[str, Any]]:
    """What scripts read; ``probabilities`` where more than one class of each image was asked for."""
    return [
        {
            "image": str(one.image),
            "class": one.probabilities[0][0],
            "probability": one.probabilities[0][1],
            **({"probabilities": dict(one.probabilities)} if top > 1 else {}),
            "resized_from": one.resized_from and _pixels(one.resized_from),
        }
        for one in predictions
    ]


def as_table(predictions: Sequence[Prediction]) -> Table:
    """What a person reads: a line for each image, or several where several classes were asked for."""
    table = Table("image", "class", "probability", box=None, pad_edge=False)
    table.columns[0].overflow = table.columns[1].overflow = "fold"
    table.columns[2].justify = "right"
    for one in predictions:
        name = _printable(str(one.image))
        for label, probability in one.probabilities:
            table.add_row(Text(name), Text(_printable(label)), percent(probability))
            name = ""
    return table


def resizing(predictions: Sequence[Prediction]) -> str | None:
    """One line that says from which sizes images were brought to the network's; None where none was."""
    sizes = Counter(one.resized_from for one in predictions if one.resized_from)
    if not sizes:
        return None
    shown = [
        _pixels(size) if count == len(predictions) else f"{_pixels(size)} ({count} of {len(predictions)})"
        for size, count in sizes.most_common(SIZES_SHOWN)
    ]
    if further := len(sizes) - len(shown):
        shown.append(f"{further} other size{'' if further == 1 else 's'}")
    return f"resized from {', '.join(shown)} to {IMAGE_SIZE}x{IMAGE_SIZE}"


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _printable(text: str) -> str:
    """Text as it can be shown on any terminal: a file's name may hold line breaks and commands to the terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
