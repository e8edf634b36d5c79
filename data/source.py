"""Which data set a study uses, and its training images."""

from collections.abc import Callable
from pathlib import Path

from data import cifar10, digits
from data import image_folder as folder
from data.errors import DataError
from data.images import LabelledImages
from data.lock import one_at_a_time
from data.paths import cache_folder

CHOICES = "auto, cifar10, digits or folder:DIR"

WAYS_OUT = (
    "download it on a machine with network (python -m search data --dataset cifar10) and copy the folder here, "
    "point --data-dir or $SEARCH_DATA_DIR at a folder that holds cifar-10-batches-py/, "
    "or take --dataset digits, which needs no network"
)


def folder_of(dataset: str) -> Path:
    """The folder that a ``folder:DIR`` data set names."""
    return Path(dataset.removeprefix("folder:")).expanduser()


def check_name(dataset: str) -> None:
    """Raise `DataError` for a name that is none of the choices."""
    if dataset in ("auto", "cifar10", "digits"):
        return
    if not dataset.startswith("folder:") or dataset == "folder:":
        raise DataError(f"unknown data set {dataset!r}; choose {CHOICES}")


def _silent(_: str) -> None:
    """Ignore the line."""


def resolve(dataset: str, data_dir: Path, notify: Callable[[str], None] = _silent) -> str:
    """Turn ``auto`` into a data set that is available: CIFAR-10 on disk or downloaded, else digits.

    Damaged CIFAR-10 files are an error, never a silent change to digits.
    """
    check_name(dataset)
    if dataset != "auto":
        return dataset
    if cifar10.is_present(data_dir):
        prepare("cifar10", data_dir, notify=notify)
        return "cifar10"
    try:
        if cifar10.can_fetch(data_dir):
            prepare("cifar10", data_dir, notify=notify)
            return "cifar10"
    except DataError:
        return "digits"
    return "digits"


def prepare(dataset: str, data_dir: Path, repair: bool = False, notify: Callable[[str], None] = _silent) -> None:
    """Make sure that a data set can be loaded, downloading what is absent and, with ``repair``, what is damaged.

    One process of a machine downloads; others wait for it and find its files. Nothing is locked or written if all
    is there.

    Args:
        dataset: any but ``auto``.
        data_dir: the folder that holds torchvision's files.
        repair: fetch damaged files again; without it they are an error.
        notify: gets a line if this process waits for another one.

    Raises:
        DataError: it is not available; the text says what can be done.
    """
    check_name(dataset)
    if dataset == "cifar10":
        if cifar10.damaged_files(data_dir):
            # In the folder: a process that downloads can write there, but perhaps not next to it.
            lock, waits = data_dir / ".cifar-10.lock", f"another process is fetching CIFAR-10 to {data_dir}; waiting"
            with one_at_a_time(lock, lambda: notify(waits)):
                _fetch_cifar10(data_dir, repair)
    elif dataset.startswith("folder:"):
        folder.load_part(folder_of(dataset), cache_folder(), test=False, notify=notify)


def _fetch_cifar10(data_dir: Path, repair: bool) -> None:
    """Download what is absent or to be repaired; an earlier process may have done it."""
    absent = not cifar10.is_present(data_dir)
    if absent or (repair and cifar10.damaged_files(data_dir)):
        if not cifar10.can_fetch(data_dir):
            state = "no CIFAR-10" if absent else "damaged CIFAR-10"
            raise DataError(f"{state} in {data_dir} and no network to download it: {WAYS_OUT}")
        try:
            cifar10.download(data_dir)
        except DataError as error:
            raise DataError(f"{error}: {WAYS_OUT}") from error
    cifar10.verify(data_dir)


def load_training_images(dataset: str, data_dir: Path) -> LabelledImages:
    """The training images of ``cifar10``, ``digits`` or ``folder:DIR``, in a fixed order.

    Raises:
        DataError: unknown, absent or damaged.
    """
    check_name(dataset)
    if dataset == "cifar10":
        return cifar10.load_training_images(data_dir)
    if dataset == "digits":
        return digits.load_part(test=False)
    return folder.load_part(folder_of(dataset), cache_folder(), test=False)
