"""What starts workers, whatever it starts them with, and what becomes of one that ends.

A launcher only sees that there are workers. What they do, and that the budget is exact whatever happens to them, is
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
"""How long a worker that was asked to go may take to hand its trial back."""

CRASHES_IN_A_ROW = 5
"""So many ends of one worker without a word, and no configuration finished by anybody meanwhile: it stays away."""

COMPLAINT = "search: "


class Launcher(Protocol):
    """Keeps a team of workers complete until the budget is done."""

    def maintain(self, rows: Sequence[WorkerRow], done: int, remaining: int) -> None:
        """Start who is missing and see to who has ended.

        Args:
            rows: all workers of the study, as they are now.
            done, remaining: configurations.

        Raises:
            UserError, RunError: no worker is left anywhere, and none of this team will come back.
        """

    def stop(self) -> None:
        """Ask this team's workers to hand their trials back and go, and wait until they have."""


@dataclass(frozen=True)
class StudyLocation:
    """What workers are started for.

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
"""Launches workers for whatever study comes, as the command line asked for them; the function gets lines to show."""


@dataclass
class _Crashes:
    count: int = 0
    done: int = 0
    again: float = 0.0


@dataclass
class RestartPolicy:
    """Which workers of a team, by their numbers, may be started: one that crashes comes back ever later, if at all."""

    ledger: Ledger
    tell: Callable[[str], None]
    _crashes: dict[int, _Crashes] = field(default_factory=dict)
    _gone: dict[int, UserError | RunError] = field(default_factory=dict)
    """Workers that stay away, and why."""

    def ended(self, number: int, who: str, status: int, complaint: str, log: str, done: int) -> None:
        """A worker's process has ended.

        Args:
            number: of the worker.
            who: it was, for people.
            status: its exit status; negative: the signal that ended it.
            complaint: what it ended with.
            log: where all that it printed is.
            done: configurations.

        Raises:
            RunError: a bug has met several trials in a row.
        """
        if status == ExitStatus.OK:
            return
        if status in (ExitStatus.WRONG_INPUT, ExitStatus.INTERRUPTED):
            self._gone[number] = UserError(complaint) if status == ExitStatus.WRONG_INPUT else RunError(complaint)
            self.tell(f"{who} has left: {complaint}")
            return
        if errors_in_a_row(self.ledger) >= ERRORS_IN_A_ROW:
            raise RunError(complaint)
        crashes = self._crashes.setdefault(number, _Crashes())
        if done > crashes.done:
            crashes.count, crashes.done = 0, done
        crashes.count += 1
        crashes.again = time.monotonic() + min(30.0, 0.5 * 2 ** (crashes.count - 1) - 0.5)
        how = f"by signal {-status}" if status < 0 else f"with status {status} ({complaint})"
        self.tell(f"{who} was ended {how}; its trial waits for another, and a new worker starts")
        if crashes.count >= CRASHES_IN_A_ROW:
            self._gone[number] = RunError(
                f"worker {number} ended {how} {crashes.count} times in a row; what it printed: {log}"
            )

    def may_start(self, number: int) -> bool:
        """Whether a worker that is not there may be started now."""
        crashes = self._crashes.get(number)
        return number not in self._gone and (crashes is None or time.monotonic() >= crashes.again)

    def refuse_none(self, size: int, rows: Sequence[WorkerRow]) -> None:
        """Raise what the first one ended with where all of the team's ``size`` workers stay away and nobody lives."""
        if size and len(self._gone) >= size and not any(row.lives for row in rows):
            raise next(iter(self._gone.values()))


def last_line(text: str) -> str:
    """The complaint that a worker ended with, else the last line that it printed."""
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")
    return last.removeprefix(COMPLAINT)
