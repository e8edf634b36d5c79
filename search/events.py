"""What happens in a run, as events for whatever shows them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model.result import EpochResult

Stage = Literal["search", "confirm"]
AttemptOutcome = Literal["complete", "pruned", "infeasible", "failed", "handed back"]


@dataclass(frozen=True)
class Budget:
    """The configurations asked for, and their states.

    Attributes:
        requested: the budget.
        complete, pruned: configurations that are done; infeasible ones are among the pruned.
        infeasible: configurations that do not fit into memory.
        failed_attempts: attempts that do not count.
        running: attempts under way.
        waiting: configurations not started, or to be tried again.
    """

    requested: int
    complete: int
    pruned: int
    infeasible: int
    failed_attempts: int
    running: int
    waiting: int

    @property
    def done(self) -> int:
        """Configurations that count against the budget."""
        return self.complete + self.pruned

    @property
    def remaining(self) -> int:
        """Configurations still to do."""
        return max(0, self.requested - self.done)


@dataclass(frozen=True)
class Best:
    """The best configuration so far; ``rule`` says why it is the best, if not for accuracy alone."""

    trial: int
    accuracy: float
    parameters: int
    rule: str = ""


@dataclass(frozen=True)
class WorkerAt:
    """A living worker, and the trial that it is training."""

    name: str
    device: str
    state: str
    trial: int | None


@dataclass(frozen=True)
class SearchProgress:
    """Progress of the whole search, or of its confirmation, over all workers."""

    budget: Budget
    best: Best | None
    workers: tuple[WorkerAt, ...] = ()
    stage: Stage = "search"


@dataclass(frozen=True)
class TrialStarted:
    """A trial's network is about to be trained."""

    number: int
    params: Mapping[str, Any]
    parameters: int
    epochs: int


@dataclass(frozen=True)
class EpochFinished:
    """A trial trained one epoch."""

    number: int
    epoch: int
    epochs: int
    accuracy: float
    images_per_second: float | None


@dataclass(frozen=True)
class TrialFinished:
    """An attempt at a trial ended, with any outcome."""

    number: int
    outcome: AttemptOutcome
    accuracy: float | None
    epochs: int
    seconds: float
    cause: str | None


@dataclass(frozen=True)
class RetrainStarted:
    """One of the winner's last trainings starts, or continues after a kill; ``what`` says which."""

    trial: int
    epochs: int
    images: int
    what: str


@dataclass(frozen=True)
class RetrainEpoch:
    """The winner trained one epoch.

    Attributes:
        started: this training's start.
        result: the epoch's result.
        left: seconds until the retrain is done, at least.
        validated: whether the validation images were kept out of the training.
    """

    started: RetrainStarted
    result: EpochResult
    left: float
    validated: bool


@dataclass(frozen=True)
class Note:
    """Something that the user should know."""

    text: str


Event = SearchProgress | TrialStarted | EpochFinished | TrialFinished | RetrainStarted | RetrainEpoch | Note
Show = Callable[[Event], None]
