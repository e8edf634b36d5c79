"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file under a partial name, and rename it once it is on the disk.

    A reader sees the earlier file or the new one, also after a power failure; after an error, the earlier one stays.
    Several processes may write the same file; the last one's stays.

    Args:
        path: the file; its folder must exist.

    Yields:
        where to write the content: a file of another name, with the same ending, in the same folder.

    Raises:
        OSError: the file could not be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        with contextlib.suppress(OSError):  # the file is in its place, and some file systems cannot flush a folder
            _flush(path.parent)
    finally:
        with contextlib.suppress(OSError):  # it exists after an error only, such as a full disk
            partial.unlink()


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file's whole content, text in UTF-8, as `whole_file` does.

    Raises:
        OSError: the file could not be written; an earlier one is unchanged.
    """
    with whole_file(path) as partial:
        if isinstance(content, str):
            partial.write_text(content, encoding="utf-8")
        else:
            partial.write_bytes(content)


def _flush(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
