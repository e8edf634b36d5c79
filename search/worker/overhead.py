"""What a worker's trials cost beside their training: its start-up, and each trial's overhead.

A trial's overhead is the time from asking for its lease until its end is stored, less its epochs' training and
validation: sampling, building, reporting, storage, checkpoints. It is stored with the trial's end, so what comes after
that (telling Optuna, closing the slot, removing the checkpoint) is not known yet; it is counted with the next trial of
the same worker. Only a worker's last trial keeps that to itself.
"""

import time

from search.host.process import age


class OverheadTimer:
    """One worker's stopwatch."""

    def __init__(self) -> None:
        self._idle = 0.0
        self._before = 0.0
        """Seconds that the trial before took after its end was stored."""
        self._began = self._stored = time.perf_counter()
        self._has_begun = False

    def nap(self, seconds: float) -> None:
        """Wait for something to do: nobody's overhead."""
        time.sleep(seconds)
        self._idle += seconds

    def take(self) -> None:
        """A trial is about to be taken."""
        self._began = time.perf_counter()

    def start_up(self) -> float | None:
        """Seconds from this process's creation until its first trial began, which is now; None for later trials."""
        if self._has_begun:
            return None
        self._has_begun = True
        seconds = age()
        return None if seconds is None else max(0.0, seconds - self._idle)

    def store(self, trained: float) -> float:
        """The overhead of the trial whose end is about to be stored, ``trained`` seconds of which were epochs."""
        self._stored = time.perf_counter()
        overhead, self._before = self._stored - self._began - trained + self._before, 0.0
        return max(0.0, overhead)

    def stored(self) -> None:
        """The trial is over."""
        self._before = time.perf_counter() - self._stored
