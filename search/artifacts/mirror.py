"""Copies of a study's files in its store, so that another machine can go on from what a lost one leaves behind."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import optuna
from optuna.artifacts.exceptions import ArtifactNotFound

from data.errors import first_line
from search.artifacts.store import Store, store_of
from search.events import Note, Show

PAUSE_SECONDS = 60.0
"""How long no checkpoint is copied to or from a store that failed: one try lasts up to 20 s if the store takes
connections and says nothing, 0.05 s if its port is closed."""


class Mirror:
    """The files below a study's outputs, and their copies under the same names in its store, if it has one.

    A store that fails is a warning, once; no method here raises because of it.

    Args:
        out: the study's outputs; all paths lie below.
        store: the study's own part of the store; None: there are no copies, and no method here does anything.
        warn: gets the warning, in whatever thread.
    """

    def __init__(self, out: Path, store: Store | None, warn: Callable[[str], None]) -> None:
        self.out, self.store, self._warn = out, store, warn
        self._warned = False
        self._paused_until = 0.0

    def upload(self, *paths: Path) -> None:
        """Copy files to the store, in the place of earlier copies; files that do not exist are left out."""
        for path in paths:
            if self.store is not None and path.is_file() and not self._succeeds(partial(self._write, path)):
                return

    def upload_if_reachable(self, path: Path) -> None:
        """`upload` for what is copied again and again: skipped for a minute after the store failed."""
        if not self._is_paused():
            self.upload(path)

    def download(self, path: Path) -> bool:
        """Replace a file by its copy in the store; whether there was one."""
        with self.downloaded(path) as copy:
            if copy is not None:
                copy.replace(path)
            return copy is not None

    @contextmanager
    def downloaded(self, path: Path) -> Iterator[Path | None]:
        """A file's copy from the store, next to the file, for as long as the context lasts; None if there is none."""
        copy = path.with_name(f".{path.name}.{os.getpid()}.fetched")
        try:
            reachable = self.store is not None and not self._is_paused()
            yield copy if reachable and self._succeeds(partial(self._read, path, copy)) else None
        finally:
            copy.unlink(missing_ok=True)

    def remove(self, path: Path) -> None:
        """Remove a file's copy from the store; the file itself stays."""
        if self.store is not None and not self._is_paused():
            self._succeeds(partial(self.store.remove, self._name(path)))

    def _write(self, path: Path) -> None:
        assert self.store is not None
        with path.open("rb") as file:
            self.store.write(self._name(path), file)

    def _read(self, path: Path, to: Path) -> None:
        assert self.store is not None
        with self.store.open_reader(self._name(path)) as content:
            to.parent.mkdir(parents=True, exist_ok=True)
            with to.open("wb") as file:
                shutil.copyfileobj(content, file)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()

    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until

    def _succeeds(self, call_store: Callable[[], None]) -> bool:
        """Call the store; whether that worked. The first failure is a warning."""
        try:
            call_store()
        except ArtifactNotFound:
            return False
        except OSError as error:
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            if not self._warned and self.store is not None:
                self._warned = True
                reason = error.strerror or first_line(error)
                self._warn(f"no copies in {self.store.text}: {reason}; they are missing should this machine die")
            return False
        return True


def mirror_of(study: optuna.Study, out: Path, show: Show) -> Mirror:
    """A study's outputs, and their copies if the study has a store.

    Raises:
        UserError: boto3 is not installed, or set up wrongly.
    """
    return Mirror(out, store_of(study), lambda text: show(Note(f"warning: {text}")))
