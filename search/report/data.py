"""Everything that a report says about a study, collected once, so that rendering reads nothing."""

import datetime
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import OptunaError
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from search.analysis.outcomes import number
from search.analysis.pruning_audit import PruningAudit, pruning_audit
from search.analysis.selection import SelectionRule, candidates, ranked, selection_rule
from search.attributes import HOLDOUT_READS, RETRAIN_PROGRESS, START
from search.config.objective import score
from search.events import Budget
from search.results import Confirmation, RetrainProgress, RetrainResult, optional_from_json
from search.study import StudyRecord
from search.summary import Summary

LEAST_FOR_IMPORTANCES = 10
"""COMPLETE trials below which importances would be noise."""


@dataclass(frozen=True)
class ReportData:
    """A study at one moment.

    Attributes:
        record: its definition and its images.
        aim: what it is for.
        trials: all of them; their notes of a worker's own errors (tracebacks) are not read.
        count: the budget.
        confirmation, retrain: None before they exist.
        progress: of a retrain under way.
        reads: every read of the test images.
        importances: share of each parameter, largest first; empty if there are too few trials.
        audit: of pruning.
        summary: of the study.
        storage: without a password.
        written: when all this was collected.
    """

    record: StudyRecord
    aim: SelectionRule
    trials: tuple[FrozenTrial, ...]
    count: Budget
    confirmation: Confirmation | None
    retrain: RetrainResult | None
    progress: RetrainProgress | None
    reads: tuple[Mapping[str, Any], ...]
    importances: Mapping[str, float]
    audit: PruningAudit | None
    summary: Summary
    storage: str
    written: datetime.datetime

    @property
    def complete(self) -> list[FrozenTrial]:
        """Trials with an accuracy, best first; of equals the earliest first."""
        return ranked(self.trials)

    @property
    def winner(self) -> FrozenTrial | None:
        """The trial that was retrained, else the one that the confirmation took, else the search's choice."""
        taken = self.retrain.trial if self.retrain else self.confirmation and self.confirmation.winner
        return next((trial for trial in self.trials if trial.number == taken), self.chosen)

    @property
    def chosen(self) -> FrozenTrial | None:
        """The trial that the search itself calls best: the most accurate, the knee, or the best within the limits."""
        return next(iter(candidates(self.trials, self.aim, 1)), None)

    @property
    def starts(self) -> list[FrozenTrial]:
        """Trials of the ``[[start]]`` configurations and of preset networks."""
        return [t for t in self.complete if START in t.user_attrs or t.params.get("preset", "none") != "none"]


def collect(
    study: optuna.Study,
    record: StudyRecord,
    count: Budget,
    confirmation: Confirmation | None,
    retrain: RetrainResult | None,
    summary: Summary,
    storage_shown: str,
) -> ReportData:
    """Read a study for its report.

    Args:
        study: which.
        record: what is stored of its definition and its images.
        count: its budget (`search.ledger.budget.count_budget`).
        confirmation: summed up by `search.finale.confirm`; None if there is none.
        retrain: None before it is done.
        summary: of the study.
        storage_shown: the storage's URL without a password.
    """
    attributes = study.user_attrs
    trials = tuple(study.get_trials(deepcopy=False))
    return ReportData(
        record=record,
        aim=selection_rule(record.config.objective, attributes),
        trials=trials,
        count=count,
        confirmation=confirmation,
        retrain=retrain,
        progress=None if retrain else optional_from_json(RetrainProgress, attributes.get(RETRAIN_PROGRESS)),
        reads=tuple(attributes.get(HOLDOUT_READS) or ()),
        importances=_importances(study, trials),
        audit=pruning_audit(trials, record.config.confirm.configurations),
        summary=summary,
        storage=storage_shown,
        written=datetime.datetime.now().astimezone(),
    )


def _importances(study: optuna.Study, trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Each parameter's share in what makes a trial one of the best tenth, or of the best five.

    Of two objectives, the best are those nearest to the front.
    """
    complete = [t for t in trials if t.state == TrialState.COMPLETE and number(score(t)) is not None]
    if len(complete) < LEAST_FOR_IMPORTANCES or len({score(trial) for trial in complete}) == 1:
        return {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, 5 / len(complete))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few trials, which the report says in its own words
        try:
            importances = get_param_importances(study, evaluator=evaluator, normalize=False)
        except (OptunaError, ValueError, ZeroDivisionError):
            return {}
    whole = sum(importances.values())
    if not math.isfinite(whole) or whole <= 0:
        return {}
    # The library orders equal ones randomly.
    return {name: value / whole for name, value in sorted(importances.items(), key=lambda item: (-item[1], item[0]))}
