"""Defer Ctrl-C and SIGTERM until no database call is running."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from search.storage.retry import Retry, StorageLostError


@contextmanager
def interrupts_deferred(outage: Retry) -> Iterator[Callable[[float], None]]:
    """Delay Ctrl-C and SIGTERM until the next pause, or the end of the context.

    A `KeyboardInterrupt` in a transaction would leave it open. SQLite would then stay locked for the workers that
    must hand back their trials, for as long as the traceback is referenced.

    Args:
        outage: the database's `Retry`; an interrupt ends the wait for a lost database.

    Yields:
        a function that sleeps for a number of seconds and may raise `KeyboardInterrupt`.
    """
    interrupted = pausing = False

    def note(_: int, __: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        outage.leave()
        if pausing:
            raise KeyboardInterrupt

    def pause(seconds: float) -> None:
        nonlocal pausing
        pausing = True
        try:
            if interrupted:
                raise KeyboardInterrupt
            time.sleep(seconds)
        finally:
            pausing = False

    held = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # a shell ignores it for background jobs
                held[number] = signal.signal(number, note)
    try:
        yield pause
    except StorageLostError as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
    if interrupted:
        raise KeyboardInterrupt
