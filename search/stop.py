"""Stopping a worker at a moment when that is safe.

A signal may come in the middle of a database call, where an exception out of nowhere would do harm. It only leaves a
note there; inside `interrupting`, which is around training alone, it interrupts at once.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from search.outage import Outage


class StoppedError(Exception):
    """Somebody wants this process to go; its text says who."""


class Stop:
    """Whether somebody wants this process to go."""

    def __init__(self) -> None:
        self.cause: str | None = None
        self._interruptible = False
        self._hurry: list[Callable[[], None]] = []

    def install(self) -> None:
        """Take SIGTERM and SIGINT for a request to go. In the main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)

    def hurry(self, outage: Outage) -> None:
        """When asked to go, do not wait for this database either."""
        self._hurry.append(outage.leave)

    def request(self, cause: str) -> None:
        """Ask the process to go."""
        self.cause = self.cause or cause
        for hurry in self._hurry:
            hurry()

    def check(self) -> None:
        """Raise `StoppedError` where somebody wants this process to go."""
        if self.cause:
            raise StoppedError(self.cause)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal interrupt what happens in here at once."""
        self._interruptible = True
        try:
            self.check()
            yield
        finally:
            self._interruptible = False

    def _signalled(self, number: int, _: FrameType | None) -> None:
        self.request(f"preempted: the worker got {signal.Signals(number).name}")
        if self._interruptible:
            raise StoppedError(self.cause)
