"""Locks between processes, held on files: one process of a machine does what the others would only repeat."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def one_at_a_time(lock: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Let one process at a time into the context; another one may have done the work before it enters.

    If no lock is available, all enter at once: a folder that no process here can write needs none, and a few
    network file systems have none (ENOLCK, EOPNOTSUPP). NFS has held such locks for all its clients since Linux
    2.6.12; on others they may bind only the processes of one machine.

    Args:
        lock: file, which exists only while it is held; its folder is made if it is absent.
        waits: called if another process holds the lock, before the wait.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(file_lock(lock, wait=False)):
                waits()
                stack.enter_context(file_lock(lock, wait=True))
        yield


@contextmanager
def file_lock(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock file, which exists only while it is held. The hold ends with the process, however that ends.

    Not `filelock`: it does not remove the file, polls, and cannot wait in a folder that is mounted read-only.

    Args:
        path: the file; its folder must exist.
        wait: until no other process holds it.

    Yields:
        whether it is held; always true with ``wait``.

    Raises:
        OSError: the file can be neither created nor read, or its file system has no locks.
    """
    while True:
        with _opened(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if not _is_file_at(path, file.fileno()):
                continue  # its last holder removed it before this process locked it
            try:
                yield True
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            return


def _opened(path: Path) -> IO[str]:
    try:
        return path.open("a")
    except OSError as error:
        # A process that sees a folder through a read-only mount can still wait for one that writes to it.
        try:
            return path.open()
        except OSError:
            raise error from None


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
