"""Which data set a name stands for, where its files lie, and what happens when they are not there."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from data import cifar10, digits, source
from data import paths as folders
from data.errors import DataError

Pixels = Callable[[Tensor], list[bytes]]
FOLDER = "cifar-10-batches-py"


def one_line_of(error: pytest.ExceptionInfo[DataError]) -> str:
    text = str(error.value)
    assert text
    assert len(text.splitlines()) == 1, text
    return text


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("no connection may be tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_sockets")
def test_digits_need_no_network_and_no_folder(file_as_folder: Path) -> None:
    source.prepare("digits", file_as_folder)
    images = source.load_training_images("digits", file_as_folder)
    assert images.images.shape == (1437, 3, 32, 32)
    assert images.images.dtype == torch.uint8
    assert images.labels.shape == (1437,)
    assert images.labels.dtype == torch.int64
    assert sorted(images.labels.unique().tolist()) == list(range(10))
    assert images.classes == tuple("0123456789")
    assert images.mirror is False


def test_digits_are_grey_and_use_the_whole_range() -> None:
    images = digits.load_part(test=False).images
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    assert (int(images.min()), int(images.max())) == (0, 255)


def test_digits_are_divided_into_disjoint_and_complete_parts(pixels_of: Pixels) -> None:
    training, held_out = digits.load_part(test=False), digits.load_part(test=True)
    assert (len(training.labels), len(held_out.labels)) == (1437, 360)
    assert torch.equal(training.labels.bincount() + held_out.labels.bincount(), counts_of_all_digits())
    every_image = pixels_of(training.images) + pixels_of(held_out.images)
    assert len(set(every_image)) == len(set(digits_as_published())) == 1797
    assert set(pixels_of(training.images)).isdisjoint(pixels_of(held_out.images))


def counts_of_all_digits() -> Tensor:
    return torch.from_numpy(load_digits().target).bincount()


def digits_as_published() -> list[bytes]:
    return [image.tobytes() for image in load_digits().images]


def test_digits_look_like_the_published_ones() -> None:
    # The mean of each 4x4 square of the enlarged image is close to the pixel of the published 8x8 image.
    published = torch.from_numpy(load_digits().images).float() * 255 / 16
    images = digits.load_part(test=False)
    small = torch.nn.functional.avg_pool2d(images.images[:, 0].float(), 4)
    for row in range(0, len(small), 150):
        distances = (published - small[row]).abs().mean((1, 2))
        nearest = int(distances.argmin())
        assert int(load_digits().target[nearest]) == int(images.labels[row])
        assert float(distances[nearest]) < 25


def test_digits_have_their_classes_in_like_shares_in_both_parts() -> None:
    shares = digits.load_part(test=True).labels.bincount() / counts_of_all_digits()
    assert float(shares.min()) > 0.19
    assert float(shares.max()) < 0.22


def test_digits_are_the_same_at_every_load() -> None:
    one, same = digits.load_part(test=False), digits.load_part(test=False)
    assert torch.equal(one.images, same.images)
    assert torch.equal(one.labels, same.labels)


@pytest.mark.usefixtures("no_sockets")
def test_auto_is_cifar10_where_its_files_are_whole(tiny_cifar10: Any, tmp_path: Path) -> None:
    assert source.resolve("auto", tiny_cifar10.write(tmp_path)) == "cifar10"


def test_auto_downloads_cifar10_where_it_can(site: Any, tmp_path: Path) -> None:
    assert source.resolve("auto", tmp_path / "new") == "cifar10"
    assert cifar10.damaged_files(tmp_path / "new") == []


@pytest.mark.usefixtures("tiny_cifar10")
def test_auto_is_digits_without_files_and_network_and_says_so_quickly(tmp_path: Path) -> None:
    started = time.monotonic()
    assert source.resolve("auto", tmp_path) == "digits"
    assert time.monotonic() - started < 3


@pytest.mark.usefixtures("black_hole")
def test_auto_gives_a_silent_site_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    probe = cifar10.can_fetch
    monkeypatch.setattr(cifar10, "can_fetch", lambda data_dir: probe(data_dir, timeout=0.3))
    started = time.monotonic()
    assert source.resolve("auto", tmp_path) == "digits"
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("answer", ["wrong", "half", "missing"])
def test_auto_is_digits_again_and_again_where_the_site_fails(site: Any, tmp_path: Path, answer: str) -> None:
    site.answer = answer
    assert source.resolve("auto", tmp_path) == "digits"
    assert source.resolve("auto", tmp_path) == "digits", "a failed download must not pass for damaged files"


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("missing", [True, False])
def test_auto_never_turns_damaged_files_into_digits(
    tiny_cifar10: Any, site: Any, tmp_path: Path, name: str, missing: bool
) -> None:
    damaged = tiny_cifar10.write(tmp_path) / FOLDER / name
    if missing:
        damaged.unlink()
    else:
        damaged.write_bytes(b"nothing")
    with pytest.raises(DataError, match=name) as error:
        source.resolve("auto", tmp_path)
    assert "damaged" in one_line_of(error)
    assert site.requests == []


@pytest.mark.parametrize("name", ["cifar10", "digits", "folder:some/where"])
def test_a_name_that_is_given_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    assert source.resolve(name, tmp_path) == name


@pytest.mark.parametrize("name", ["imagenet", "folder:", "folder", "", "CIFAR10", "digits ", "some/where"])
@pytest.mark.parametrize("function", [source.resolve, source.prepare, source.load_training_images])
def test_an_unknown_name_is_refused_with_the_choices(
    tmp_path: Path, name: str, function: Callable[[str, Path], object]
) -> None:
    with pytest.raises(DataError) as error:
        function(name, tmp_path)
    text = one_line_of(error)
    assert repr(name) in text
    assert all(choice in text for choice in ("auto", "cifar10", "digits", "folder:DIR"))


def test_the_data_folder_is_the_one_given_else_the_environments_else_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SEARCH_DATA_DIR", str(tmp_path / "environment"))
    assert folders.data_folder(tmp_path / "given") == tmp_path / "given"
    assert folders.data_folder(None) == tmp_path / "environment"
    monkeypatch.setenv("SEARCH_DATA_DIR", "")
    assert folders.data_folder(None) == tmp_path / "cache" / "block-search" / "data"
    monkeypatch.delenv("SEARCH_DATA_DIR")
    assert folders.data_folder(None) == tmp_path / "cache" / "block-search" / "data"


def test_the_cache_lies_in_the_home_folder_without_xdg_cache_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for unset in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        unset()
        assert folders.cache_folder() == tmp_path / "home" / ".cache" / "block-search"


def test_a_folder_name_may_start_at_home(tmp_path: Path) -> None:
    assert source.folder_of("folder:~/pictures") == tmp_path / "home" / "pictures"
    assert source.folder_of("folder:/some/folder:1") == Path("/some/folder:1")


@pytest.mark.usefixtures("tiny_cifar10")
def test_cifar10_without_files_and_network_names_the_three_ways_out(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        source.prepare("cifar10", tmp_path)
    text = one_line_of(error)
    assert str(tmp_path) in text
    assert "no network" in text
    assert "python -m search data --dataset cifar10" in text
    assert "--data-dir" in text
    assert "$SEARCH_DATA_DIR" in text
    assert "--dataset digits" in text


def test_a_failed_download_names_the_ways_out_too(site: Any, tmp_path: Path) -> None:
    site.answer = "half"
    with pytest.raises(DataError, match="--dataset digits") as error:
        source.prepare("cifar10", tmp_path)
    assert "download" in one_line_of(error)


@pytest.mark.usefixtures("black_hole")
def test_a_site_that_never_answers_is_out_of_reach_within_the_time_given(tmp_path: Path) -> None:
    started = time.monotonic()
    assert cifar10.can_fetch(tmp_path, timeout=0.5) is False
    assert time.monotonic() - started < 3


def test_a_name_that_is_looked_up_for_ever_is_out_of_reach_within_the_time_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def look_up(*args: Any, **kwargs: Any) -> None:
        time.sleep(4)  # no socket timeout bounds a resolver
        raise OSError("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    started = time.monotonic()
    assert cifar10.can_fetch(tmp_path, timeout=0.3) is False
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(("answer", "reachable"), [("whole", True), ("missing", False), ("babble", False)])
def test_a_site_is_in_reach_when_it_has_the_archive(site: Any, tmp_path: Path, answer: str, reachable: bool) -> None:
    site.answer = answer
    assert cifar10.can_fetch(tmp_path, timeout=5) is reachable
    assert site.requests == ["HEAD"]


def test_the_archive_on_disk_needs_no_site(tiny_cifar10: Any, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(tiny_cifar10.archive)
    assert cifar10.can_fetch(tmp_path)
    assert source.resolve("auto", tmp_path) == "cifar10"
    assert torch.equal(source.load_training_images("cifar10", tmp_path).images, tiny_cifar10.images)


def test_prepare_of_a_folder_tells_what_is_wrong_with_it(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    source.prepare(f"folder:{make_folder(tmp_path / 'good')}", tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        source.prepare(f"folder:{tmp_path / 'absent'}", tmp_path)


def test_load_training_images_loads_each_kind(
    tiny_cifar10: Any, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    data_dir = tiny_cifar10.write(tmp_path / "data")
    pictures = make_folder(tmp_path / "pictures", classes=("cat", "dog", "emu"))
    assert source.load_training_images("cifar10", data_dir).classes[0] == "airplane"
    assert source.load_training_images("digits", data_dir).classes[0] == "0"
    assert source.load_training_images(f"folder:{pictures}", data_dir).classes == ("cat", "dog", "emu")
