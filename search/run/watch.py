"""Watch a study through its storage: what changed since the last poll, on any machine."""

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.analysis.selection import candidates, selection_rule_of
from search.attributes import CAUSE, CONFIG, FAULT, PARAMETERS, SECONDS, Fault
from search.config.objective import score
from search.events import (
    AttemptOutcome,
    Best,
    Budget,
    EpochFinished,
    Event,
    SearchProgress,
    Stage,
    TrialFinished,
    TrialStarted,
    WorkerAt,
)
from search.ledger.budget import count_budget
from search.ledger.leases import Ledger
from search.ledger.registry import WorkerRow, list_workers


@dataclass(frozen=True)
class Changes:
    """A study's budget, its workers, and its events since the last poll, starting with `SearchProgress`."""

    budget: Budget
    workers: list[WorkerRow]
    events: list[Event]


class Watcher:
    """Turns a study's changes into events, except for trials that ended before the watcher started."""

    def __init__(self, ledger: Ledger, study: optuna.Study, stage: Stage = "search") -> None:
        self._ledger, self._study, self._stage = ledger, study, stage
        self._reported: dict[int, int] = {}
        """The last epoch reported as an event, by the number of a running trial."""
        trials = study.get_trials(deepcopy=False)
        self._settled = {trial.number for trial in trials if trial.state.is_finished()}

    def poll(self) -> Changes:
        """Read the study and its workers."""
        rows = list_workers(self._ledger)
        speeds = {row.progress["trial"]: row.progress["images_per_second"] for row in rows if row.progress}
        trials = self._study.get_trials(deepcopy=False)
        count = count_budget(self._ledger)
        best = best_so_far(self._study) if self._stage == "search" else None
        events: list[Event] = [SearchProgress(count, best, _busy_workers(rows), self._stage)]
        for trial in trials:
            if trial.number not in self._settled and trial.state != TrialState.WAITING:
                events += self._changes(trial, speeds.get(trial.number))
        return Changes(count, rows, events)

    def _changes(self, trial: FrozenTrial, speed: float | None) -> list[Event]:
        events: list[Event] = []
        attributes = trial.user_attrs
        epochs = attributes.get(CONFIG, {}).get("fit", {}).get("epochs", 0)
        if trial.number not in self._reported and PARAMETERS in attributes:
            self._reported[trial.number] = 0
            events.append(TrialStarted(trial.number, trial.params, attributes[PARAMETERS], epochs))
        for epoch, accuracy in sorted(trial.intermediate_values.items()):
            if epoch > self._reported.get(trial.number, 0):
                self._reported[trial.number] = epoch
                events.append(EpochFinished(trial.number, epoch, epochs, accuracy, speed))
        if trial.state.is_finished():
            self._settled.add(trial.number)
            self._reported.pop(trial.number, None)
            events.append(_finished(trial))
        return events


def _finished(trial: FrozenTrial) -> TrialFinished:
    attributes = trial.user_attrs
    outcome: AttemptOutcome = "complete"
    if trial.state == TrialState.PRUNED:
        outcome = "infeasible" if attributes.get(FAULT) == Fault.INFEASIBLE else "pruned"
    elif trial.state == TrialState.FAIL:
        outcome = "handed back" if attributes.get(FAULT) in (Fault.PREEMPTED, Fault.KILLED, Fault.LOST) else "failed"
    scored = outcome == "complete" or (outcome == "pruned" and attributes.get(FAULT) != Fault.NON_FINITE_LOSS)
    accuracy = trial.intermediate_values[trial.last_step] if scored and trial.last_step is not None else None
    cause = attributes.get(CAUSE)
    return TrialFinished(
        trial.number, outcome, accuracy, trial.last_step or 0, attributes.get(SECONDS) or _duration(trial), cause
    )


def _duration(trial: FrozenTrial) -> float:
    return trial.duration.total_seconds() if trial.duration else 0.0


def _busy_workers(rows: Sequence[WorkerRow]) -> tuple[WorkerAt, ...]:
    return tuple(
        WorkerAt(row.name, row.device, row.state, row.progress["trial"] if row.progress else None)
        for row in rows
        if row.lives
    )


def best_so_far(study: optuna.Study) -> Best | None:
    """The best COMPLETE trial, in the form that is shown."""
    rule = selection_rule_of(study)
    trial = next(iter(candidates(study.get_trials(deepcopy=False), rule, 1)), None)
    if trial is None or (accuracy := score(trial)) is None:
        return None
    rule_text = "" if rule.rule == "accuracy" else rule.text
    return Best(trial.number, accuracy, trial.user_attrs[PARAMETERS], rule_text)
