"""What a worker's loop needs from the code that trains a configuration. Importing this does not import torch."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

import optuna
from optuna.trial import TrialState
from sqlalchemy.engine import URL

from search.config.study_file import StudyConfig
from search.events import Show
from search.ledger.attempts import Attempt
from search.ledger.heartbeat import Heartbeat
from search.ledger.leases import Ledger
from search.worker.stop import StopRequest


class Failure(Enum):
    """What an exception of a training means for the worker."""

    OUT_OF_MEMORY = "out of memory"
    NON_FINITE_LOSS = "non-finite loss"
    BROKEN_DEVICE = "broken device"
    ERROR = "error"


@dataclass(frozen=True)
class TrialResult:
    """How an attempt ended.

    Attributes:
        state: COMPLETE or PRUNED.
        accuracy: after the last epoch.
        epochs: trained so far, by this attempt and by earlier ones.
        trained: seconds that this attempt's own epochs took, validation included.
        cost: the second objective's value of a COMPLETE trial; None if accuracy is the only one.
    """

    state: TrialState
    accuracy: float
    epochs: int
    trained: float
    cost: float | None = None


class TrialRunner(Protocol):
    """A worker's device with the images on it; `search.worker.torch_runner` has the real one.

    Attributes:
        worker_name: of the worker, for people.
    """

    worker_name: str

    def run(
        self, attempt: Attempt, config: StudyConfig, heartbeat: Heartbeat, stop: StopRequest, show: Show
    ) -> TrialResult:
        """Train an attempt.

        Raises:
            StoppedError: the process was asked to stop.
            LeaseLostError: the lease went to another worker.
            Exception: anything that a network raises; `classify_failure` says what it means.
        """

    def classify_failure(self, error: Exception) -> Failure:
        """What an exception of `run` means."""

    def remove_checkpoint(self, slot: int) -> None:
        """Remove the checkpoint of a slot that is done."""

    def free_memory(self) -> None:
        """Free what earlier trials left allocated."""


@dataclass(frozen=True)
class WorkerOptions:
    """What the command line asks for.

    Attributes:
        storage: of the study.
        name: of the study.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0,1``; of several the one with the fewest workers is taken.
        data_dir: that holds CIFAR-10.
        out: the study's outputs, for checkpoints.
        dataset: where the images of a ``folder:DIR`` study are on this machine; None: where the study says.
        max_trials: leave after this many configurations.
        number, launcher: of a worker that `run` started.
        log: where everything that this worker prints is, for people.
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


OpenRunner = Callable[[Ledger, optuna.Study, str, WorkerOptions, Show], TrialRunner]
"""Makes a worker's runner, from the worker's id among others."""
