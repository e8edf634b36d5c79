"""Ctrl-C and SIGTERM deferred until no database call is under way."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from search.storage.retry import Retry, StorageLostError


@contextmanager
def interrupts_deferred(outage: Retry) -> Iterator[Callable[[float], None]]:
    """Let Ctrl-C and SIGTERM wait for the next pause, or for the end of the context.

    In the middle of a transaction a `KeyboardInterrupt` would leave that open, and SQLite locked for the workers that
    are to hand their trials back, for as long as somebody holds the traceback.

    Args:
        outage: of the database that is talked to: who is asked to go does not wait for one that is away.

    Yields:
        a function that sleeps for so many seconds, in which `KeyboardInterrupt` may be raised.
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
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell has it for what it starts in the background
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
