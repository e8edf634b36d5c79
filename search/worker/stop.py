"""Stopping a process at a moment when that is safe.

A signal may come in the middle of a database call, where an exception would do harm. There it is only noted;
inside `StopRequest.interrupting`, which is around training alone, it interrupts at once.

Python handles a signal only between two of its own steps, and one step of a large network on a CPU can take ten
seconds. So a thread gets it too: if the process is still in training after a while, the thread calls the last resort
and ends the process.
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
    """The process was asked to stop; the text says by whom."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.cause: str | None = None
        self.last_resort: Callable[[str], None] | None = None
        """Gets the cause, in a thread, when the process is about to be ended in the middle of a step."""
        self._interruptible = False
        self._retries: list[Retry] = []

    def install(self) -> None:
        """Take SIGTERM and SIGINT for a request to stop. In the main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader, writer), name="stop", daemon=True).start()

    def also_ends(self, retry: Retry) -> None:
        """Let a request to stop end this waiting for a database, too."""
        self._retries.append(retry)

    def request(self, cause: str) -> None:
        """Ask the process to stop."""
        self.cause = self.cause or cause
        for retry in self._retries:
            retry.leave()

    def check(self) -> None:
        """Raise `StoppedError` if this process was asked to stop."""
        if self.cause:
            raise StoppedError(self.cause)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal interrupt the body at once."""
        self._interruptible = True
        try:
            self.check()
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.request(f"preempted: the worker got {signal.Signals(number).name}")
        if self._interruptible:
            self._interruptible = False  # once: a second signal must not interrupt the handing back
            raise StoppedError(self.cause)

    def _listen(self, reader: socket.socket, _: socket.socket) -> None:
        number = reader.recv(1)[0]
        time.sleep(PATIENCE_SECONDS)
        if self._interruptible and self.last_resort is not None:
            self.last_resort(f"preempted: the worker got {signal.Signals(number).name}, in the middle of a long step")
            os._exit(ExitStatus.INTERRUPTED)
