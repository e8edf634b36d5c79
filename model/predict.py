"""What a saved model sees in image files."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.errors import DataError, UserError
from data.image_folder import DecodedImage, decode_image
from data.images import IMAGE_SIZE
from model.quality import logits_of
from model.saved import SavedModel, load_model


@dataclass(frozen=True)
class Prediction:
    """What a model sees in one image.

    Attributes:
        image: the file.
        probabilities: the most probable classes with their probabilities, in descending order.
        resized_from: width and height in the file; None if they are the network's.
    """

    image: Path
    probabilities: tuple[tuple[str, float], ...]
    resized_from: tuple[int, int] | None


def open_model(folder: Path, device: torch.device) -> SavedModel:
    """A saved model that takes images of the size to which this project resizes all.

    Raises:
        ConfigError: there is none, or it is damaged.
        UserError: it takes images of another size.
    """
    saved = load_model(folder, device)
    if (size := saved.network.config.image_size) != IMAGE_SIZE:
        raise UserError(f"the model in {folder} takes images of {size}x{size} pixels, not {IMAGE_SIZE}x{IMAGE_SIZE}")
    return saved


def images_in(folder: Path) -> list[Path]:
    """The images in a folder and those below it, recognised by their endings, in the order of their paths.

    Raises:
        UserError: it does not exist, or holds none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS  # 1.6 s, needed for whole folders only

    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
    if not images:
        raise UserError(f"no images in {folder}: no file there ends in {', '.join(IMG_EXTENSIONS)}")
    return images


def predict(
    saved: SavedModel,
    paths: Sequence[Path],
    device: torch.device,
    top: int,
    unreadable: Callable[[DataError], None],
) -> list[Prediction]:
    """What a model sees in images of any size and format.

    Computed in float32, so that two devices give the same probabilities as nearly as possible.

    Args:
        saved: on the device.
        paths: the images.
        device: to compute on.
        top: classes of each image, the most probable ones; all if there are fewer.
        unreadable: gets the error of each image that cannot be read, which is then left out; it may raise it.
    """
    pictures: list[tuple[Path, DecodedImage]] = []
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


def _read(path: Path) -> DecodedImage:
    if path.is_dir():
        raise DataError(f"{path} is a folder; for the images in it: --dir {path}")
    if not path.exists():
        raise DataError(f"no file {path}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as of odd metadata: the picture is read, or there is an error
        return decode_image(path)
