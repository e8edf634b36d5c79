"""Files that are written whole or not at all: content, mode, what an error leaves, and what is flushed when."""

import os
from pathlib import Path

import pytest

from data.files import whole_file, write_whole


@pytest.mark.parametrize("content", [b"", b"\x00\xff", "", "two\nlines \N{MINUS SIGN}"])
def test_the_content_is_written_in_the_place_of_an_earlier_file(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "file.json"
    path.write_text("earlier, and longer than what follows")
    write_whole(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_its_mode_is_any_new_file_s(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    write_whole(tmp_path / "file", b"content")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_the_partial_file_has_the_process_s_number_and_the_ending(tmp_path: Path) -> None:
    with whole_file(tmp_path / "model.onnx") as partial:
        partial.write_bytes(b"content")
        assert partial == tmp_path / f".model.onnx.{os.getpid()}.partial.onnx"
        assert not (tmp_path / "model.onnx").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("written", [True, False])
def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path: Path, written: bool) -> None:
    path = tmp_path / "file"
    path.write_text("earlier")

    def fail() -> None:
        with whole_file(path) as partial:
            if written:
                partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_absent_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "absent" / "file", b"")


def test_content_is_on_the_disk_before_the_name_and_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flushed = tmp_path / "file", []
    plain = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, path.exists()))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_whole(path, b"content")
    assert flushed == [(f".file.{os.getpid()}.partial", False), (tmp_path.name, True)]


def test_a_disk_that_fails_to_flush_is_an_error_and_a_folder_that_cannot_be_flushed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: int) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="input/output"):
        write_whole(tmp_path / "file", b"content")
    assert not [*tmp_path.iterdir()]
    plain = os.open
    monkeypatch.undo()
    monkeypatch.setattr(os, "open", lambda path, flags: failing(0) if Path(path).is_dir() else plain(path, flags))
    write_whole(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
