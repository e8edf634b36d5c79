"""The test images: loaded apart from the training images, and by the retrain alone."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import data
from data import source
from data.errors import DataError
from data.holdout import load_holdout

CPU = torch.device("cpu")
ROOT = Path(str(data.__file__)).resolve().parents[1]
Pixels = Callable[[Tensor], list[bytes]]


def check_apart(dataset: str, data_dir: Path, pixels_of: Pixels, training: int, held_out: int) -> None:
    images, holdout = source.load_training_images(dataset, data_dir), load_holdout(dataset, data_dir, CPU)
    assert len(images.labels) == training
    assert holdout.images.shape == (held_out, 3, 32, 32)
    assert holdout.images.dtype == torch.uint8
    assert holdout.labels.shape == (held_out,)
    assert holdout.labels.dtype == torch.int64
    assert set(holdout.labels.tolist()) == set(images.labels.tolist())
    assert set(pixels_of(holdout.images)).isdisjoint(pixels_of(images.images))


def test_digits_held_out_are_apart_from_those_for_training(pixels_of: Pixels, tmp_path: Path) -> None:
    check_apart("digits", tmp_path, pixels_of, 1437, 360)


@pytest.mark.parametrize("divided", [True, False])
def test_images_of_a_folder_held_out_are_apart_from_those_for_training(
    make_folder: Callable[..., Path], pixels_of: Pixels, tmp_path: Path, divided: bool
) -> None:
    if divided:
        make_folder(tmp_path / "pictures" / "train", 20, seed=0)
        make_folder(tmp_path / "pictures" / "test", 12, seed=1)
        check_apart(f"folder:{tmp_path / 'pictures'}", tmp_path, pixels_of, 40, 24)
    else:
        make_folder(tmp_path / "pictures", 24)
        check_apart(f"folder:{tmp_path / 'pictures'}", tmp_path, pixels_of, 40, 8)


def test_the_cifar10_test_batch_is_apart_from_the_training_batches(
    tiny_cifar10: Any, pixels_of: Pixels, tmp_path: Path
) -> None:
    tiny_cifar10.write(tmp_path)
    check_apart("cifar10", tmp_path, pixels_of, 100, 20)
    holdout = load_holdout("cifar10", tmp_path, CPU)
    assert torch.equal(holdout.images, tiny_cifar10.test_images)
    assert torch.equal(holdout.labels, tiny_cifar10.test_labels)


def test_damaged_or_absent_test_images_are_a_data_error(tiny_cifar10: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no CIFAR-10"):
        load_holdout("cifar10", tmp_path, CPU)
    tiny_cifar10.write(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"nothing")
    with pytest.raises(DataError, match="test_batch"):
        load_holdout("cifar10", tmp_path, CPU)


@pytest.mark.parametrize("name", ["imagenet", "folder:"])
def test_an_unknown_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="folder:DIR"):
        load_holdout(name, tmp_path, CPU)


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in ("data", "model", "search"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imports_holdout(tree: ast.AST, package: str = "data") -> bool:
    """Whether code in a package imports ``data.holdout``, in any of the ways to write that."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(name.name == "data.holdout" for name in node.names):
            return True
        if isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            if base == "data.holdout" or (base == "data" and any(name.name == "holdout" for name in node.names)):
                return True
        if isinstance(node, ast.Constant) and node.value == "data.holdout":
            return True  # import_module("data.holdout")
    return False


def reads_test_images(tree: ast.AST) -> bool:
    """Whether code calls ``CIFAR10`` or ``load_part`` for anything but plainly the training images."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if name == "CIFAR10":
            train = options.get("train", node.args[1] if len(node.args) > 1 else ast.Constant(True))
            if not (isinstance(train, ast.Constant) and train.value is True) or None in options:
                return True
        if name == "load_part":
            test = options.get("test")
            if not (isinstance(test, ast.Constant) and test.value is False):
                return True
    return False


@pytest.mark.parametrize(
    "code",
    [
        "import data.holdout",
        "import data.holdout as h",
        "from data import errors, holdout",
        "from data.holdout import load_holdout",
        "from . import holdout",
        "from .holdout import Holdout",
        "def late():\n    from data.holdout import load_holdout",
        "importlib.import_module('data.holdout')",
    ],
)
def test_the_scan_sees_every_import_of_the_test_images(code: str) -> None:
    assert imports_holdout(ast.parse(code))


@pytest.mark.parametrize("code", ["import data", "from data import split", "'holdout'", "from other import holdout"])
def test_the_scan_lets_other_imports_pass(code: str) -> None:
    assert not imports_holdout(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "CIFAR10(d, train=False)",
        "datasets.CIFAR10(d, False)",
        "CIFAR10(d, train=part)",
        "CIFAR10(d, **options)",
        "digits.load_part(test=True)",
        "load_part(True)",
        "folder.load_part(d, c, test=part)",
    ],
)
def test_the_scan_sees_every_reading_of_test_images(code: str) -> None:
    assert reads_test_images(ast.parse(code))


@pytest.mark.parametrize(
    "code", ["CIFAR10(d)", "CIFAR10(d, train=True)", "CIFAR10(d, download=True)", "digits.load_part(test=False)"]
)
def test_the_scan_lets_readings_of_training_images_pass(code: str) -> None:
    assert not reads_test_images(ast.parse(code))


def test_the_retrain_alone_imports_the_holdout() -> None:
    found = [path for path, tree in modules() if imports_holdout(tree, path.split("/")[0])]
    assert found == ["search/finale/retrain.py"]


def test_the_holdout_alone_reads_test_images() -> None:
    assert [path for path, tree in modules() if reads_test_images(tree)] == ["data/holdout.py"]
