"""CIFAR-10 fetched from a site on this machine: whole, broken off, wrong, and mended."""

import gc
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data import cifar10, source
from data.errors import DataError

FOLDER = "cifar-10-batches-py"
FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]


def failure_of(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as error:
        action()
    text = str(error.value)
    assert text
    assert len(text.splitlines()) == 1, text
    return text


def test_a_download_fetches_verifies_and_loads_the_right_pixels(site: Any, tiny_cifar10: Any, tmp_path: Path) -> None:
    data_dir = tmp_path / "not" / "made" / "yet"
    cifar10.download(data_dir)
    assert "GET" in site.requests
    cifar10.verify(data_dir)
    loaded = cifar10.load_training_images(data_dir)
    assert torch.equal(loaded.images, tiny_cifar10.images)
    assert loaded.images.dtype == torch.uint8
    assert loaded.images.is_contiguous()
    assert torch.equal(loaded.labels, tiny_cifar10.labels)
    assert loaded.labels.dtype == torch.int64
    assert loaded.classes[:2] == ("airplane", "automobile")
    assert len(loaded.classes) == 10
    assert loaded.mirror is True


def test_a_second_download_asks_nobody(site: Any, tmp_path: Path) -> None:
    cifar10.download(tmp_path)
    site.requests.clear()
    cifar10.download(tmp_path)
    source.prepare("cifar10", tmp_path)
    source.prepare("cifar10", tmp_path, repair=True)
    assert site.requests == []


def test_a_download_leaves_the_default_socket_timeout_as_it_was(site: Any, tmp_path: Path) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(77.0)
    try:
        cifar10.download(tmp_path / "first")
        after_success = socket.getdefaulttimeout()
        site.answer = "wrong"
        failure_of(lambda: cifar10.download(tmp_path / "second"))
        after_failure = socket.getdefaulttimeout()
    finally:
        socket.setdefaulttimeout(before)
    assert (after_success, after_failure) == (77.0, 77.0)


def test_presence_and_health_are_told_apart(tiny_cifar10: Any, tmp_path: Path) -> None:
    assert not cifar10.is_present(tmp_path)
    assert cifar10.damaged_files(tmp_path) == FILES
    tiny_cifar10.write(tmp_path)
    assert cifar10.is_present(tmp_path)
    assert cifar10.damaged_files(tmp_path) == []
    (tmp_path / FOLDER / "data_batch_2").write_bytes(b"short")
    (tmp_path / FOLDER / "test_batch").unlink()
    assert cifar10.is_present(tmp_path)
    assert cifar10.damaged_files(tmp_path) == ["data_batch_2", "test_batch"]


@pytest.mark.usefixtures("tiny_cifar10")
def test_absent_files_are_reported_as_absent(tmp_path: Path) -> None:
    assert failure_of(lambda: cifar10.verify(tmp_path)) == f"no CIFAR-10 in {tmp_path}"
    assert failure_of(lambda: cifar10.load_training_images(tmp_path)) == f"no CIFAR-10 in {tmp_path}"


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_never_loaded(site: Any, tiny_cifar10: Any, tmp_path: Path, name: str) -> None:
    tiny_cifar10.write(tmp_path)
    content = bytearray(tiny_cifar10.files[name])
    content[len(content) // 2] ^= 1
    (tmp_path / FOLDER / name).write_bytes(content)
    for action in (
        lambda: cifar10.verify(tmp_path),
        lambda: cifar10.load_training_images(tmp_path),
        lambda: source.prepare("cifar10", tmp_path),
    ):
        text = failure_of(action)
        assert f"damaged: {name} missing" in text
        assert "python -m search data --dataset cifar10" in text
    assert site.requests == [], "nothing is mended without being asked for"


@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_mended_on_request(
    site: Any, tiny_cifar10: Any, tmp_path: Path, name: str, missing: bool
) -> None:
    damaged = tiny_cifar10.write(tmp_path) / FOLDER / name
    if missing:
        damaged.unlink()
    else:
        damaged.write_bytes(b"nothing")
    source.prepare("cifar10", tmp_path, repair=True)
    assert cifar10.damaged_files(tmp_path) == []
    assert damaged.read_bytes() == tiny_cifar10.files[name]


def test_a_kept_archive_mends_without_network(tiny_cifar10: Any, tmp_path: Path) -> None:
    tiny_cifar10.write(tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(tiny_cifar10.archive)
    (tmp_path / FOLDER / "data_batch_1").write_bytes(b"nothing")
    source.prepare("cifar10", tmp_path, repair=True)
    assert torch.equal(cifar10.load_training_images(tmp_path).images, tiny_cifar10.images)


def test_damage_that_cannot_be_mended_is_reported_as_damage(tiny_cifar10: Any, tmp_path: Path) -> None:
    tiny_cifar10.write(tmp_path)
    (tmp_path / FOLDER / "data_batch_1").write_bytes(b"nothing")
    text = failure_of(lambda: source.prepare("cifar10", tmp_path, repair=True))
    assert "damaged CIFAR-10" in text
    assert "no network" in text


@pytest.mark.parametrize("answer", ["half", "half-chunked", "wrong", "missing", "babble", "stalls"])
def test_a_failed_download_is_one_line_and_a_later_try_succeeds(
    site: Any, tiny_cifar10: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str
) -> None:
    monkeypatch.setattr(cifar10, "STALL_SECONDS", 0.5)
    site.answer = answer
    text = failure_of(lambda: cifar10.download(tmp_path))
    assert text.startswith(f"the download of CIFAR-10 to {tmp_path} failed: ")
    gc.collect()  # a connection left open would warn here
    assert not cifar10.is_present(tmp_path), "nothing of a failed download may pass for CIFAR-10"
    site.answer = "whole"
    cifar10.download(tmp_path)
    assert torch.equal(cifar10.load_training_images(tmp_path).images, tiny_cifar10.images)


@pytest.mark.usefixtures("tiny_cifar10")
def test_a_download_from_a_site_that_refuses_is_a_data_error(tmp_path: Path) -> None:
    assert "refused" in failure_of(lambda: cifar10.download(tmp_path))


def test_a_folder_that_cannot_be_written_is_a_data_error(site: Any, file_as_folder: Path) -> None:
    assert str(file_as_folder) in failure_of(lambda: cifar10.download(file_as_folder))
    assert str(file_as_folder) in failure_of(lambda: source.prepare("cifar10", file_as_folder))


def test_a_regular_file_in_place_of_the_folder_is_a_data_error(site: Any, file_as_folder: Path) -> None:
    assert str(file_as_folder.parent) in failure_of(lambda: source.prepare("cifar10", file_as_folder.parent))


def test_training_images_are_loaded_without_reading_the_test_images(
    tiny_cifar10: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_cifar10.write(tmp_path)
    read: list[str] = []
    load = pickle.load

    def noted(file: Any, **options: Any) -> Any:
        read.append(Path(file.name).name)
        return load(file, **options)

    monkeypatch.setattr(pickle, "load", noted)
    cifar10.load_training_images(tmp_path)
    assert "data_batch_1" in read
    assert "test_batch" not in read


def test_one_line_keeps_an_errors_words_and_names_a_silent_one() -> None:
    assert cifar10.one_line(OSError("first\n  second\tthird")) == "first second third"
    assert cifar10.one_line(EOFError()) == "EOFError"
