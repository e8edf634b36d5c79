"""What a worker's trials cost beside their training: its start-up, and each trial's overhead.

A trial's overhead is the time from asking for its lease until its end is stored, less its epochs' training and
validation: sampling, building, reporting, storage, checkpoints. It is stored with the trial's end, so what comes after
that (telling Optuna, closing the slot, removing the checkpoint) is not known yet; it is counted with the next trial of
the same worker. Only a worker's last trial keeps that to itself.
"""

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from optuna.trial import FrozenTrial

from search.process import age

OVERHEAD = "overhead_seconds"
"""User attribute of trials that ended COMPLETE, or PRUNED for their accuracy: others break off in mid-epoch."""


class Overhead:
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


def trials_overhead(trials: Sequence[FrozenTrial]) -> dict[str, Any] | None:
    """Overhead of all trials that know theirs: its share of their time, and the median; None where there are none."""
    known = [trial.user_attrs for trial in trials if OVERHEAD in trial.user_attrs]
    if not known:
        return None
    seconds = [float(attributes[OVERHEAD]) for attributes in known]
    whole = sum(_whole(attributes) for attributes in known)
    return {
        "share": round(sum(seconds) / whole, 5) if whole else 0.0,
        "median_seconds": round(median(seconds), 3),
        "trials": len(known),
    }


def _whole(attributes: Mapping[str, Any]) -> float:
    """Seconds of a trial, at least its overhead: its attribute ``seconds`` leaves lease and ending out."""
    return max(float(attributes["seconds"]), float(attributes[OVERHEAD]))


def workers_start_up(seconds: Sequence[float]) -> dict[str, Any] | None:
    """Start-up of workers that have begun a trial; None where there are none."""
    if not seconds:
        return None
    return {
        "median_seconds": round(median(seconds), 1),
        "longest_seconds": round(max(seconds), 1),
        "workers": len(seconds),
    }
