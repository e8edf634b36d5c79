"""Stopping a process at a moment when that is safe.

A signal may come in the middle of a database call, where an exception out of nowhere would do harm. It only leaves a
note there; inside `interrupting`, which is around training alone, it interrupts at once.

Python sees a signal only between two of its own steps, and one step of a large network on a CPU can take ten seconds.
So a thread hears of it too, and where the process has not gone after a while it does what is most needful and ends it.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from search.host.exit_status import ExitStatus
from search.storage.retry import Retry

PATIENCE_SECONDS = 5.0
"""How long the training may take to notice that it should stop."""


class StoppedError(Exception):
    """Somebody wants this process to go; its text says who."""


class StopRequest:
    """Whether somebody wants this process to go."""

    def __init__(self) -> None:
        self.cause: str | None = None
        self.last_resort: Callable[[str], None] | None = None
        """Gets the cause, in a thread, when the process is about to be ended in the middle of a step."""
        self._interruptible = False
        self._hurry: list[Callable[[], None]] = []

    def install(self) -> None:
        """Take SIGTERM and SIGINT for a request to go. In the main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        hears, heard = socket.socketpair()
        heard.setblocking(False)
        signal.set_wakeup_fd(heard.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(hears, heard), name="stop", daemon=True).start()

    def hurry(self, outage: Retry) -> None:
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
            self._interruptible = False  # once: a second signal must not hit the handing back
            raise StoppedError(self.cause)

    def _listen(self, hears: socket.socket, _: socket.socket) -> None:
        number = hears.recv(1)[0]
        time.sleep(PATIENCE_SECONDS)
        if self._interruptible and self.last_resort is not None:
            self.last_resort(f"preempted: the worker got {signal.Signals(number).name}, in the middle of a long step")
            os._exit(ExitStatus.INTERRUPTED)
