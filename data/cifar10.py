"""CIFAR-10 through torchvision: found on disk or downloaded, and checked against torchvision's MD5 sums.

torchvision itself is imported where it is needed: that takes 1.6 s, more than anything else at a command's start.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import contextlib
import http.client
import shutil
import socket
import threading
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data.errors import DataError
from data.images import LabelledImages

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

FOLDER = "cifar-10-batches-py"
"""torchvision's folder of the files, below ``data_dir``."""

PROBE_SECONDS = 12.0
"""How long a connection may take before the download site counts as out of reach."""

STALL_SECONDS = 30.0
"""How long a running download may stall before it is given up."""


def folder(data_dir: Path) -> Path:
    """The folder below ``data_dir`` that torchvision uses."""
    return data_dir / FOLDER


def is_present(data_dir: Path) -> bool:
    """Whether any CIFAR-10 file is in ``data_dir``, intact or not."""
    return folder(data_dir).is_dir() and any((folder(data_dir) / name).exists() for name, _ in _files())


def damaged_files(data_dir: Path) -> list[str]:
    """Names of the files that are missing or do not match torchvision's MD5 sum."""
    from torchvision.datasets.utils import check_integrity

    return [name for name, md5 in _files() if not check_integrity(folder(data_dir) / name, md5)]


def _files() -> list[tuple[str, str]]:
    from torchvision.datasets import CIFAR10

    meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
    return [(name, md5) for name, md5 in (*CIFAR10.train_list, *CIFAR10.test_list, meta)]


def verify(data_dir: Path) -> None:
    """Raise `DataError` unless every file is there and intact."""
    if not is_present(data_dir):
        raise DataError(f"no CIFAR-10 in {data_dir}")
    if damaged := damaged_files(data_dir):
        raise DataError(
            f"CIFAR-10 in {folder(data_dir)} is damaged: {', '.join(damaged)} missing or not as published; "
            "mend it with: python -m search data --dataset cifar10"
        )


def load_training_images(data_dir: Path) -> LabelledImages:
    """The 50,000 training images; never looks at the test batch's content.

    Raises:
        DataError: files are absent or damaged.
    """
    from torchvision.datasets import CIFAR10

    verify(data_dir)
    return as_labelled_images(CIFAR10(data_dir, train=True, download=False))


def as_labelled_images(source: "CIFAR10") -> LabelledImages:
    """torchvision's arrays (uint8, NHWC) as tensors (uint8, NCHW)."""
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
    return LabelledImages(images, torch.tensor(source.targets), tuple(source.classes), mirror=True)


def download(data_dir: Path) -> None:
    """Fetch what is missing or damaged, with torchvision's progress bar, and verify it.

    One process at a time (`data.source.prepare` sees to that). One that is killed leaves nothing that passes for
    CIFAR-10: files are unpacked elsewhere, and the whole folder is moved to its place at once.

    Raises:
        DataError: the folder cannot be written, or the download fails or stalls.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_and_extract_archive

    aside = data_dir / ".unpacking"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if not damaged_files(data_dir):
            return
        _remove(aside)  # from a process that was killed
        previous = socket.getdefaulttimeout()
        socket.setdefaulttimeout(STALL_SECONDS)
        try:
            # Not CIFAR10(download=True): it accepts files as intact without checking batches.meta.
            download_and_extract_archive(CIFAR10.url, data_dir, aside, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
        finally:
            socket.setdefaulttimeout(previous)
        if folder(data_dir).exists():  # with damaged files, or something else
            for file in folder(aside).iterdir():
                file.replace(folder(data_dir) / file.name)
        else:
            folder(aside).replace(folder(data_dir))
        _remove(aside)
    except (OSError, http.client.HTTPException, RuntimeError, EOFError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it keeps its connection open
        raise DataError(f"the download of CIFAR-10 to {data_dir} failed: {one_line(error)}") from error
    verify(data_dir)


def _remove(folder_tree: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder_tree)


def can_fetch(data_dir: Path, timeout: float = PROBE_SECONDS) -> bool:
    """Whether `download` can work: the published archive is in ``data_dir``, or its site answers in time.

    The request runs in a thread of its own: a name lookup on a dead network can outlast any
    socket timeout, and the caller must not wait for that.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    if check_integrity(data_dir / CIFAR10.filename, CIFAR10.tgz_md5):
        return True
    answers: list[bool] = []

    def probe() -> None:
        request = urllib.request.Request(CIFAR10.url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=timeout):
                answers.append(True)
        except (OSError, http.client.HTTPException):
            answers.append(False)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    return answers == [True]


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
