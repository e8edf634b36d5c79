"""Calls to a database that may be away for a while: try again with capped backoff, up to a limit.

Every method of Optuna's storage is one transaction, and so is every call of `search.ledger`: that is the unit that
is tried again. A call whose commit was not confirmed may be done twice; each caller says what that does.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa

from data.errors import RunError, first_line

T = TypeVar("T")

FIRST_PAUSE = 0.2
"""Seconds before the second try."""


class StorageLostError(RunError):
    """The database stayed away for longer than the study allows, or the process was asked to stop in the meantime."""


class Retry:
    """Tries calls again while the database is away. Shared by the threads of a process."""

    def __init__(self, shown: str) -> None:
        self.limit = 0.0
        """Seconds after which an outage is an error; 0: at once. Set when the study, which knows it, is read."""
        self.longest_pause = 5.0
        """Most seconds between tries: well under the grace that a silent worker has."""
        self.tell: Callable[[str], None] = lambda _: None
        """Gets one line when an outage begins and one when it ends."""
        self.connection_lock: AbstractContextManager[Any] = contextlib.nullcontext()
        """Held while a call uses the database; a lock lets threads share one connection."""
        self.retries = 0
        """Calls that failed and were tried again: each may have been done twice."""
        self._shown = shown
        self._lost_since: float | None = None
        """When the outage began that a call has given up on: no call waits for its end a second time."""
        self._leaving = False  # no Event: a signal handler sets it, perhaps in the middle of a wait for that Event
        self._calls = threading.local()

    def leave(self) -> None:
        """Stop waiting for the database: from now on the first failure is an error."""
        self._leaving = True

    def call(self, call: Callable[[], T]) -> T:
        """The call's result, tried until the database gives one.

        Raises:
            StorageLostError: not within the limit.
        """
        if getattr(self._calls, "inside", False):
            return call()  # the outermost call is the transaction
        self._calls.inside = True
        try:
            return self._call(call)
        finally:
            self._calls.inside = False

    def _call(self, call: Callable[[], T]) -> T:
        began, pause = self._lost_since, FIRST_PAUSE
        while True:
            try:
                with self.connection_lock:
                    result = call()
            except Exception as error:
                cause = _connection_trouble(error)
                if cause is None:
                    raise
                failed = time.monotonic()
                if began is None:
                    began = failed
                    if self.limit:
                        self.tell(f"storage {self._shown} does not answer ({first_line(cause)}); trying again")
                away = failed - began
                if away >= self.limit or self._leaving:
                    self._lost_since = began
                    raise StorageLostError(
                        f"storage {self._shown} has not answered for {away:.0f} s: {first_line(cause)}; "
                        "nothing stored is lost, and the same command goes on"
                    ) from error
                self.retries += 1
                # Jitter, so that many workers do not all come back at the same instant.
                self._wait(min(pause * random.uniform(0.5, 1.0), self.limit - away))
                pause = min(2 * pause, self.longest_pause)
            else:
                if began is not None and began != self._lost_since:
                    self.tell(f"storage {self._shown} answers again after {time.monotonic() - began:.0f} s")
                return result

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._leaving and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


def _connection_trouble(error: BaseException) -> BaseException | None:
    """What went wrong with the connection, if it can pass by itself; None for every other error."""
    if isinstance(error, optuna.exceptions.StorageInternalError):
        error = error.__cause__ or error
    if isinstance(error, sa.exc.PendingRollbackError) and error.__context__ is not None:
        error = error.__context__  # Optuna went on with a connection that had broken
    if isinstance(error, sa.exc.TimeoutError):
        return error
    if not isinstance(error, sa.exc.DBAPIError):
        return None
    text = str(error.orig)
    if "no such table" in text or "no such column" in text:
        return None
    passing = isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError) or error.connection_invalidated
    return (error.orig or error) if passing else None
