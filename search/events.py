"""What happens in a run, told to whoever shows it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model.result import EpochResult
from search.ledger import Budget

Outcome = Literal["complete", "pruned", "failed", "handed back"]


@dataclass(frozen=True)
class Best:
    """The best configuration so far."""

    trial: int
    accuracy: float
    parameters: int


@dataclass(frozen=True)
class SearchStarted:
    """The search begins or goes on."""

    budget: Budget
    best: Best | None


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
    result: EpochResult
    epochs: int


@dataclass(frozen=True)
class TrialFinished:
    """A trial ended, one way or another."""

    number: int
    outcome: Outcome
    accuracy: float | None
    epochs: int
    seconds: float
    cause: str | None
    budget: Budget
    best: Best | None


@dataclass(frozen=True)
class RetrainStarted:
    """The winner's last training begins."""

    trial: int
    epochs: int
    images: int


@dataclass(frozen=True)
class RetrainEpoch:
    """The winner trained one epoch."""

    result: EpochResult
    epochs: int


@dataclass(frozen=True)
class Note:
    """Something that a person should know."""

    text: str


Event = SearchStarted | TrialStarted | EpochFinished | TrialFinished | RetrainStarted | RetrainEpoch | Note
Show = Callable[[Event], None]
