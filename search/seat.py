"""What a worker's loop over slots needs of whatever trains a configuration. Importing this does not import torch."""

from dataclasses import dataclass
from typing import Literal, Protocol

from optuna.trial import TrialState

from search.events import Show
from search.ledger import Attempt
from search.stop import Stop
from search.study_file import StudyConfig
from search.workers import Heart

Trouble = Literal["out of memory", "non-finite loss", "broken device", "error"]


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


class Seat(Protocol):
    """A worker's device with the images on it; `search.trainer` has the real one."""

    worker: str
    worker_name: str

    def run(self, attempt: Attempt, config: StudyConfig, heart: Heart, stop: Stop, show: Show) -> TrialResult:
        """Train an attempt.

        Raises:
            StoppedError: somebody wants this process to go.
            LeaseLostError: the lease went to another worker.
            Exception: whatever a network does; `trouble` says what it means.
        """

    def trouble(self, error: Exception) -> Trouble:
        """What an exception of `run` means."""

    def forget(self, slot: int) -> None:
        """A slot is done: remove its checkpoint."""

    def free_memory(self) -> None:
        """Give back what earlier trials left behind."""
