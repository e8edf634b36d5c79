"""What a worker's trials cost besides their training: its start-up, and each trial's overhead.

A trial's overhead is the time from before its lease is taken until its end is stored, less its epochs' training and
validation: sampling, building, reporting, storage, checkpoints. It is stored with the trial's end, so the work after
that (telling Optuna, closing the slot, removing the checkpoint) is not known yet; it counts with the same worker's
next trial. Only after a worker's last trial it is not counted.
"""

import time

from search.host.process import age


class OverheadTimer:
    """Measures one worker."""

    def __init__(self) -> None:
        self._idle = 0.0
        self._carried = 0.0
        """Seconds that the last trial took after its end was stored."""
        self._started = self._stored = time.perf_counter()
        self._has_started_up = False

    def wait_idle(self, seconds: float) -> None:
        """Wait for something to do: no trial's overhead."""
        time.sleep(seconds)
        self._idle += seconds

    def start_trial(self) -> None:
        """A lease is about to be taken."""
        self._started = time.perf_counter()

    def start_up(self) -> float | None:
        """Seconds from this process's creation until its first trial began, which is now; None for later trials."""
        if self._has_started_up:
            return None
        self._has_started_up = True
        seconds = age()
        return None if seconds is None else max(0.0, seconds - self._idle)

    def overhead(self, trained: float) -> float:
        """Seconds of overhead of the trial whose end is about to be stored; its epochs took ``trained`` seconds."""
        self._stored = time.perf_counter()
        seconds, self._carried = self._stored - self._started - trained + self._carried, 0.0
        return max(0.0, seconds)

    def end_trial(self) -> None:
        """The trial's end is stored, and all work after that is done."""
        self._carried = time.perf_counter() - self._stored
