"""What a worker's loop over slots needs of whatever trains a configuration. Importing this does not import torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import optuna
from optuna.trial import TrialState
from sqlalchemy.engine import URL

from search.config.study_file import StudyConfig
from search.events import Show
from search.ledger.attempts import Attempt
from search.ledger.heartbeat import Heartbeat
from search.ledger.leases import Ledger
from search.worker.stop import StopRequest

Failure = Literal["out of memory", "non-finite loss", "broken device", "error"]


@dataclass(frozen=True)
class TrialResult:
    """How an attempt ended: COMPLETE or PRUNED, the last accuracy, and the epochs that this took.

    Attributes:
        trained: seconds that the epochs of this very attempt took, with their validation.
        cost: the second objective's value of a COMPLETE trial; None where accuracy is the only one.
    """

    state: TrialState
    accuracy: float
    epochs: int
    trained: float
    cost: float | None = None


class TrialRunner(Protocol):
    """A worker's device with the images on it; `search.worker.torch_runner` has the real one."""

    worker: str
    worker_name: str

    def run(
        self, attempt: Attempt, config: StudyConfig, heart: Heartbeat, stop: StopRequest, show: Show
    ) -> TrialResult:
        """Train an attempt.

        Raises:
            StoppedError: somebody wants this process to go.
            LeaseLostError: the lease went to another worker.
            Exception: whatever a network does; `trouble` says what it means.
        """

    def trouble(self, error: Exception) -> Failure:
        """What an exception of `run` means."""

    def forget(self, slot: int) -> None:
        """A slot is done: remove its checkpoint."""

    def free_memory(self) -> None:
        """Give back what earlier trials left behind."""


@dataclass(frozen=True)
class WorkerOptions:
    """What the command line asks for.

    Attributes:
        storage: of the study.
        name: of the study.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0,1``; of several the one with the fewest workers is taken.
        data_dir: that holds CIFAR-10.
        dataset: where the images of a ``folder:DIR`` study lie on this machine; None: where the study says.
        out: the study's outputs, for checkpoints.
        max_trials: leave after so many.
        number, launcher: of a worker that `run` started.
        log: where all that this worker prints is, for people.
    """

    storage: URL
    name: str
    device: str
    data_dir: Path
    out: Path
    dataset: str | None = None
    max_trials: int | None = None
    number: int | None = None
    launcher: str | None = None
    log: str | None = None


OpenRunner = Callable[[Ledger, optuna.Study, str, "WorkerOptions", Show], TrialRunner]
