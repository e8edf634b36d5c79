"""Copies of a study's files in its store, so that what a machine leaves behind can be taken up by another."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts.exceptions import ArtifactNotFound

from data.errors import first_line
from model.checkpoint import read_about
from search.artifacts.store import Store, store_of
from search.events import Note, Show

REST_SECONDS = 60.0
"""How long a store that could not be used is left alone with checkpoints: a try at one that takes connections and says
nothing may last 20 s, at one whose port is closed 0.05 s."""


class Mirror:
    """The files below a study's outputs, and their copies under the same names in its store, where it has one.

    A store that cannot be used is a warning, once; nothing here fails for want of it.

    Args:
        out: the study's outputs; all paths lie below.
        store: the study's place; None: there are no copies, and nothing here does anything.
        warn: gets the warning, in whatever thread.
    """

    def __init__(self, out: Path, store: Store | None, warn: Callable[[str], None]) -> None:
        self.out, self.store, self._warn = out, store, warn
        self._warned = False
        self._again = 0.0

    def put(self, *paths: Path) -> None:
        """Copy files to the store, in the place of earlier copies; a file that is not there is left out."""
        for path in paths:
            if self.store is not None and path.is_file() and not self._tried(partial(self._upload, path)):
                return

    def keep_up(self, path: Path) -> None:
        """`put` for what is copied again and again: not tried for a minute after the store could not be used."""
        if self._is_awake():
            self.put(path)

    def fetch(self, path: Path) -> bool:
        """Bring a file's copy here, in the place of what lies there; whether there was one."""
        with self._copy(path) as copy:
            if copy is not None:
                copy.replace(path)
            return copy is not None

    def remove(self, path: Path) -> None:
        """Remove a file's copy from the store."""
        if self.store is not None and self._is_awake():
            self._tried(partial(self.store.remove, self._name(path)))

    def newest(self, path: Path, identity: Mapping[str, Any], elsewhere: bool = True) -> dict[str, Any] | None:
        """Bring the newest checkpoint of a training to its place.

        Args:
            path: of the checkpoint.
            identity: that it was saved with, as `model.checkpoint.as_read_back` gives it.
            elsewhere: whether another machine can have been at this training.

        Returns:
            what it tells of the training; None where there is none of this very training.
        """
        here = _about(path, identity)
        if not elsewhere:
            return here
        with self._copy(path) as copy:
            there = _about(copy, identity) if copy is not None else None
            if copy is None or there is None or (here is not None and len(here["curve"]) >= len(there["curve"])):
                return here
            copy.replace(path)
            return there

    @contextmanager
    def _copy(self, path: Path) -> Iterator[Path | None]:
        """A file's copy beside its place, for as long as the context lasts; None where there is none to be had."""
        copy = path.with_name(f".{path.name}.{os.getpid()}.fetched")
        try:
            asked = self.store is not None and self._is_awake()
            yield copy if asked and self._tried(partial(self._download, path, copy)) else None
        finally:
            copy.unlink(missing_ok=True)

    def _upload(self, path: Path) -> None:
        assert self.store is not None
        with path.open("rb") as file:
            self.store.write(self._name(path), file)

    def _download(self, path: Path, to: Path) -> None:
        assert self.store is not None
        with self.store.open_reader(self._name(path)) as content:
            to.parent.mkdir(parents=True, exist_ok=True)
            with to.open("wb") as file:
                shutil.copyfileobj(content, file)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()

    def _is_awake(self) -> bool:
        return time.monotonic() >= self._again

    def _tried(self, work: Callable[[], None]) -> bool:
        """Whether it worked."""
        try:
            work()
        except ArtifactNotFound:
            return False
        except OSError as error:
            self._again = time.monotonic() + REST_SECONDS
            if not self._warned and self.store is not None:
                self._warned = True
                reason = error.strerror or first_line(error)
                self._warn(f"no copies in {self.store.text}: {reason}; they are missing should this machine die")
            return False
        return True


def mirror_of(study: optuna.Study, out: Path, show: Show) -> Mirror:
    """A study's outputs, and their copies where the study has a store.

    Raises:
        UserError: boto3 is not installed, or set up wrongly.
    """
    return Mirror(out, store_of(study), lambda text: show(Note(f"warning: {text}")))


def _about(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint tells, where it is one of this training."""
    about = read_about(path)
    usable = about is not None and about.get("identity") == identity and isinstance(about.get("curve"), list)
    return about if usable else None
