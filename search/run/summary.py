"""Read a study's state from its storage alone, for ``summary.json``, ``status`` and the report."""

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.analysis.forecast import forecast
from search.analysis.noise import SeedNoise
from search.analysis.outcomes import trials_overhead, workers_start_up
from search.analysis.selection import RuleName, front_of, selection_rule
from search.analysis.starts import start_value
from search.attributes import (
    ENVIRONMENT,
    FLOPS,
    HOLDOUT_READS,
    LATENCY,
    PARAMETERS,
    RETRAIN,
    RETRAIN_PROGRESS,
    SECONDS,
    SPACE_HASH,
    STUDY_SECONDS,
    WORKER,
)
from search.config.objective import CostName, cost_of, score
from search.finale.confirm import confirmation
from search.ledger.budget import count_budget
from search.ledger.leases import Ledger
from search.ledger.registry import BUDGET_DONE, list_workers, read_logs
from search.results import Confirmation, RetrainProgress, RetrainResult, optional_from_json
from search.study import FALLBACK_WARNING, DatasetRecord, StudyRecord, best_trial
from search.summary import (
    BestTrial,
    DatasetSummary,
    Front,
    FrontPoint,
    RunningTrial,
    Status,
    Summary,
    WorkerOutput,
    WorkerStatus,
)


def summarise(study: optuna.Study, record: StudyRecord, ledger: Ledger, storage_shown: str) -> Summary:
    """A study's state; ``storage_shown`` is its storage's URL without a password."""
    count = count_budget(ledger)
    rule = selection_rule(record.config.objective, study.user_attrs)
    best = best_trial(study)
    trials = study.get_trials(deepcopy=False)
    workers = list_workers(ledger)
    confirm = confirmation(ledger.database, study)
    return Summary(
        study=record.name,
        objective=record.config.objective,
        limits=rule.limits,
        dataset=_dataset(record.dataset),
        storage=storage_shown,
        budget=count,
        best=None if best is None else _best(best, rule.rule),
        front=None if rule.cost is None else _front(trials, rule.cost),
        confirm=confirm,
        retrain=optional_from_json(RetrainResult, study.user_attrs.get(RETRAIN)),
        retrain_progress=optional_from_json(RetrainProgress, study.user_attrs.get(RETRAIN_PROGRESS)),
        holdout_reads=len(study.user_attrs.get(HOLDOUT_READS, [])),
        seconds=round(study.user_attrs.get(STUDY_SECONDS, 0.0), 1),
        trial_seconds=round(sum(trial.user_attrs.get(SECONDS, 0.0) for trial in trials), 1),
        overhead=trials_overhead(trials),
        start_up=workers_start_up([row.start_up for row in workers if row.start_up is not None]),
        known_good=start_value(record.config, trials),
        forecast=forecast(
            trials,
            count,
            workers=sum(row.state == "working" for row in workers),
            single=rule.cost is None,
            confirmed=None if confirm is None else _noise(confirm),
        ),
        space_hash=study.user_attrs[SPACE_HASH],
        environment=study.user_attrs[ENVIRONMENT],
        warnings=(FALLBACK_WARNING,) if record.dataset.fallback else (),
    )


def _dataset(dataset: DatasetRecord) -> DatasetSummary:
    return DatasetSummary(dataset.name, dataset.fingerprint, dataset.fit, dataset.validation, dataset.fallback)


def _best(trial: FrozenTrial, rule: RuleName) -> BestTrial:
    return BestTrial(
        trial=trial.number,
        val_accuracy=_accuracy(trial),
        params=trial.params,
        parameters=trial.user_attrs[PARAMETERS],
        flops=trial.user_attrs[FLOPS],
        latency=trial.user_attrs.get(LATENCY),
        chosen_by=rule,
    )


def _accuracy(trial: FrozenTrial) -> float:
    accuracy = score(trial)
    assert accuracy is not None  # the trial ran to its end
    return accuracy


def _front(trials: Sequence[FrozenTrial], cost: CostName) -> Front:
    points = [
        FrontPoint(trial.number, _accuracy(trial), value)
        for trial in front_of(trials, cost)
        if (value := cost_of(trial, cost)) is not None
    ]
    return Front(cost, tuple(points))


def _noise(confirm: Confirmation) -> SeedNoise | None:
    """The noise between seeds that a confirmation measured."""
    if confirm.noise is None or confirm.noise_freedom is None:
        return None
    return SeedNoise(confirm.noise, confirm.noise_freedom)


def read_status(study: optuna.Study, record: StudyRecord, ledger: Ledger, storage_shown: str, logs: bool) -> Status:
    """A study's state and its workers; ``logs`` adds what the workers printed last."""
    return Status(
        running_trials=running_trials(study),
        workers=workers_at(ledger),
        logs=worker_logs(ledger) if logs else None,
        summary=summarise(study, record, ledger, storage_shown),
    )


def running_trials(study: optuna.Study) -> tuple[RunningTrial, ...]:
    """Trials that are being trained."""
    return tuple(
        RunningTrial(
            trial=trial.number,
            epoch=trial.last_step,
            accuracy=trial.intermediate_values.get(trial.last_step or 0),
            worker=trial.user_attrs.get(WORKER),
        )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    )


def workers_at(ledger: Ledger) -> tuple[WorkerStatus, ...]:
    """Workers that have not left by themselves, and what each is doing."""
    return tuple(
        WorkerStatus(
            worker=row.name,
            state=row.state,
            device=row.device,
            slot=row.slot,
            progress=row.progress,
            start_up_seconds=None if row.start_up is None else round(row.start_up, 1),
            last_heartbeat_seconds=round(row.silent, 1),
        )
        for row in list_workers(ledger)
        if row.state != "left"
    )


def worker_logs(ledger: Ledger) -> tuple[WorkerOutput, ...]:
    """What the workers printed last, except for those that left because the budget was done."""
    logs = read_logs(ledger)
    return tuple(
        WorkerOutput(
            worker=row.name,
            state=row.state,
            farewell=row.exit_reason,
            place=logs[row.id].location,
            lines=logs[row.id].lines,
        )
        for row in list_workers(ledger)
        if row.exit_reason != BUDGET_DONE and row.id in logs
    )
