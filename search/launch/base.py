"""What every launcher of workers has in common: what it is asked for, and which workers it starts again.

A launcher only sees that there are workers. What they do, and that the budget is exact no matter what happens, is
the ledger's business (`search.ledger`). `search.launch.local` starts processes of this machine,
`search.launch.ray_cluster` tasks of a Ray cluster.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sqlalchemy.engine import URL

from data.errors import RunError, UserError
from search.host.exit_status import ExitStatus
from search.ledger.attempts import ERRORS_IN_A_ROW, errors_in_a_row
from search.ledger.leases import Ledger
from search.ledger.registry import WorkerRow

LEAVE_SECONDS = 15.0
"""How long a worker that was asked to stop may take to hand its trial back."""

CRASHES_IN_A_ROW = 5
"""After this many crashes of one worker, while no configuration was finished by anybody, it is not started again."""


class Launcher(Protocol):
    """Keeps this many workers running until the budget is done."""

    def maintain(self, rows: Sequence[WorkerRow], done: int, remaining: int) -> None:
        """Start the workers that are missing and handle those that have ended.

        Args:
            rows: all workers of the study, as they are now.
            done, remaining: configurations.

        Raises:
            UserError, RunError: no worker is left anywhere, and this launcher will start none again.
        """

    def stop(self) -> None:
        """Ask this launcher's workers to hand their trials back and stop; wait until they have."""


@dataclass(frozen=True)
class StudyLocation:
    """Where the study that workers are started for is.

    Attributes:
        storage: of the study.
        name: of the study.
        data_dir: that holds the images on this machine.
        out: the study's outputs.
    """

    storage: URL
    name: str
    data_dir: Path
    out: Path


LauncherFactory = Callable[[Ledger, StudyLocation, Callable[[str], None]], Launcher]
"""Makes the launcher that the command line asked for, for any study; the function gets lines to show."""


@dataclass
class _Crashes:
    count: int = 0
    done: int = 0
    retry_at: float = 0.0


@dataclass
class RestartPolicy:
    """Which workers of a launcher, by their numbers, may start: one that crashes waits ever longer, or stays away."""

    ledger: Ledger
    tell: Callable[[str], None]
    _crashes: dict[int, _Crashes] = field(default_factory=dict)
    _retired: dict[int, UserError | RunError] = field(default_factory=dict)
    """Workers that are not started again, and why."""

    def record_end(self, number: int, worker: str, status: int, message: str, log: str, done: int) -> None:
        """Take note that a worker's process has ended.

        Args:
            number: of the worker.
            worker: its name, for people.
            status: its exit status; negative: the signal that ended it.
            message: the last line that it printed.
            log: where everything it printed is.
            done: configurations.

        Raises:
            RunError: a bug has met several trials in a row.
        """
        if status == ExitStatus.OK:
            return
        if status in (ExitStatus.WRONG_INPUT, ExitStatus.INTERRUPTED):
            self._retired[number] = UserError(message) if status == ExitStatus.WRONG_INPUT else RunError(message)
            self.tell(f"{worker} has left: {message}")
            return
        if errors_in_a_row(self.ledger) >= ERRORS_IN_A_ROW:
            raise RunError(message)
        crashes = self._crashes.setdefault(number, _Crashes())
        if done > crashes.done:
            crashes.count, crashes.done = 0, done
        crashes.count += 1
        crashes.retry_at = time.monotonic() + min(30.0, 0.5 * 2 ** (crashes.count - 1) - 0.5)
        how = f"by signal {-status}" if status < 0 else f"with status {status} ({message})"
        self.tell(f"{worker} was ended {how}; its trial waits for another, and a new worker starts")
        if crashes.count >= CRASHES_IN_A_ROW:
            self._retired[number] = RunError(
                f"worker {number} ended {how} {crashes.count} times in a row; what it printed: {log}"
            )

    def may_start(self, number: int) -> bool:
        """Whether a worker that does not run may be started now."""
        crashes = self._crashes.get(number)
        return number not in self._retired and (crashes is None or time.monotonic() >= crashes.retry_at)

    def raise_if_hopeless(self, size: int, rows: Sequence[WorkerRow]) -> None:
        """Raise what the first worker ended with if all ``size`` workers are retired and no other one lives."""
        if size and len(self._retired) >= size and not any(row.lives for row in rows):
            raise next(iter(self._retired.values()))


def last_line(text: str) -> str:
    """The last line that a worker printed, for people."""
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")
    return without_prefix(last)


def without_prefix(line: str) -> str:
    """A line as it is shown, without the name that the command line puts before its error messages."""
    return line.removeprefix("search: ")
