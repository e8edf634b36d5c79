"""What became of a trial, and what it measured, read from its stored state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from search.attributes import CURVE, FAULT, OVERHEAD, SECONDS, Fault
from search.config.objective import score

Outcome = Literal["complete", "pruned", "infeasible", "failed attempt", "running", "waiting"]


def outcome(trial: FrozenTrial) -> Outcome:
    """What became of a trial, finer than Optuna's states: an infeasible configuration is PRUNED there."""
    match trial.state:
        case TrialState.COMPLETE:
            return "complete"
        case TrialState.PRUNED:
            fault = trial.user_attrs.get(FAULT)  # a loss that is not finite breaks a constraint too
            broken = fault is None and any(value > 0 for value in trial.constraints.values())
            return "infeasible" if broken or fault == Fault.INFEASIBLE else "pruned"
        case TrialState.FAIL:
            return "failed attempt"
        case TrialState.RUNNING:
            return "running"
        case _:
            return "waiting"


def number(value: object) -> float | None:
    """A finite number as a float; None for anything else, such as an absent attribute or an infinite loss."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def end_accuracy(trial: FrozenTrial) -> float | None:
    """Accuracy of a trial that ran to its end; None for any other, and if it is not finite."""
    return number(score(trial)) if trial.state == TrialState.COMPLETE else None


def seconds(trial: FrozenTrial) -> float:
    """Time that a trial held its device: its own measurement, else from its start to its end."""
    measured = number(trial.user_attrs.get(SECONDS))
    if measured is not None:
        return measured
    if trial.datetime_start is None or trial.datetime_complete is None:
        return 0.0
    return max(0.0, (trial.datetime_complete - trial.datetime_start).total_seconds())


def validation_curve(trial: FrozenTrial) -> dict[int, float]:
    """Validation accuracy by epoch; epochs without a finite one are left out."""
    return _finite({**_stored(trial, "validation_accuracy"), **trial.intermediate_values})


def curve(trial: FrozenTrial, key: str) -> dict[int, float]:
    """A number of every epoch's `model.result.EpochResult` by epoch; epochs without a finite one are left out."""
    return _finite(_stored(trial, key))


def _stored(trial: FrozenTrial, key: str) -> dict[int, object]:
    return {int(row["epoch"]): row.get(key) for row in trial.user_attrs.get(CURVE) or []}


def _finite(values: Mapping[int, object]) -> dict[int, float]:
    return {epoch: finite for epoch in sorted(values) if (finite := number(values[epoch])) is not None}


def epoch_seconds(trial: FrozenTrial) -> float | None:
    """Seconds that an epoch of a trial took, the median; None if that is not known."""
    known = [taken for taken in curve(trial, "seconds").values() if taken]
    return median(known) if known else None


@dataclass(frozen=True)
class TrialsOverhead:
    """Time of trials that was neither training nor validation.

    Attributes:
        share: of the trials' time.
        median_seconds: of a trial.
        trials: that measured theirs.
    """

    share: float
    median_seconds: float
    trials: int


def trials_overhead(trials: Sequence[FrozenTrial]) -> TrialsOverhead | None:
    """Overhead of all trials that measured theirs; None if there are none."""
    known = [trial.user_attrs for trial in trials if OVERHEAD in trial.user_attrs]
    if not known:
        return None
    seconds = [float(attributes[OVERHEAD]) for attributes in known]
    whole = sum(_whole(attributes) for attributes in known)
    return TrialsOverhead(round(sum(seconds) / whole, 5) if whole else 0.0, round(median(seconds), 3), len(known))


def _whole(attributes: Mapping[str, Any]) -> float:
    """Seconds of a trial, at least its overhead: the attribute `SECONDS` leaves out lease and ending."""
    return max(float(attributes[SECONDS]), float(attributes[OVERHEAD]))


@dataclass(frozen=True)
class WorkersStartUp:
    """Time from a worker's process to its first trial, without waiting for one.

    Attributes:
        median_seconds, longest_seconds: of a worker.
        workers: that have begun a trial.
    """

    median_seconds: float
    longest_seconds: float
    workers: int


def workers_start_up(seconds: Sequence[float]) -> WorkersStartUp | None:
    """Start-up of workers that have begun a trial, from the seconds of each; None if there are none."""
    if not seconds:
        return None
    return WorkersStartUp(round(median(seconds), 1), round(max(seconds), 1), len(seconds))
