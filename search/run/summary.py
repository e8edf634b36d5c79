"""``summary.json`` and ``status``: a study's state in one stable shape, read from the storage alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.analysis.forecast import forecast
from search.analysis.noise import SeedNoise
from search.analysis.outcomes import trials_overhead, workers_start_up
from search.analysis.selection import front_of, selection_rule
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
from search.ledger.registry import BUDGET_DONE, list_workers, read_logs, worker_name
from search.study import FALLBACK_WARNING, StudyRecord, best_trial

RETRAIN_KEYS = (
    "trial", "epochs", "converged", "stopped_by", "train_accuracy", "test_accuracy", "calibration_error", "parameters",
    "flops", "latency", "seconds", "chosen_by", "limits",
)  # fmt: skip
"""Of a study's attribute ``retrain``, what the summary tells."""


def summarise(study: optuna.Study, record: StudyRecord, ledger: Ledger, storage_shown: str) -> dict[str, Any]:
    """The contract's ``summary.json``; ``storage_shown`` holds no password."""
    count = count_budget(ledger)
    best = best_trial(study)
    done = study.user_attrs.get(RETRAIN)
    trials = study.get_trials(deepcopy=False)
    workers = list_workers(ledger)
    confirmed = confirmation(ledger.database, study)
    wanted = selection_rule(record.config.objective, study.user_attrs)
    return {
        "study": record.name,
        "objective": record.config.objective,
        "limits": asdict(wanted.limits),
        "dataset": {
            "name": record.dataset.name,
            "fingerprint": record.dataset.fingerprint,
            "fit": record.dataset.fit,
            "validation": record.dataset.validation,
            "fallback": record.dataset.fallback,
        },
        "storage": storage_shown,
        "budget": {name: value for name, value in asdict(count).items() if name != "infeasible"},
        "infeasible": count.infeasible,
        "best": best
        and {
            "trial": best.number,
            "val_accuracy": score(best),
            "params": best.params,
            "parameters": best.user_attrs[PARAMETERS],
            "flops": best.user_attrs[FLOPS],
            **({"latency": best.user_attrs[LATENCY]} if LATENCY in best.user_attrs else {}),
            "chosen_by": wanted.rule,
        },
        "front": wanted.cost and _front(trials, wanted.cost),
        "confirm": confirmed,
        "retrain": done and {key: done[key] for key in RETRAIN_KEYS if key in done},
        "retrain_progress": study.user_attrs.get(RETRAIN_PROGRESS),
        "holdout_reads": len(study.user_attrs.get(HOLDOUT_READS, [])),
        "seconds": round(study.user_attrs.get(STUDY_SECONDS, 0.0), 1),
        "trial_seconds": round(sum(trial.user_attrs.get(SECONDS, 0.0) for trial in trials), 1),
        "overhead": trials_overhead(trials),
        "start_up": workers_start_up([row.start_up for row in workers if row.start_up is not None]),
        "known_good": start_value(record.config, trials),
        "forecast": forecast(
            trials,
            count,
            sum(row.state == "working" for row in workers),
            wanted.cost is None,
            None if confirmed is None else _noise(confirmed),
        ),
        "space_hash": study.user_attrs[SPACE_HASH],
        "environment": study.user_attrs[ENVIRONMENT],
        "warnings": [FALLBACK_WARNING] if record.dataset.fallback else [],
    }


def _noise(confirmed: Mapping[str, Any]) -> SeedNoise | None:
    """Between seeds, as a confirmation knows it."""
    std = confirmed["noise"]
    return None if std is None else SeedNoise(std, confirmed["noise_freedom"])


def _front(trials: Sequence[FrozenTrial], cost: CostName) -> list[dict[str, Any]]:
    """Trials on the front, cheapest first."""
    return [
        {"trial": trial.number, "val_accuracy": score(trial), cost: cost_of(trial, cost)}
        for trial in front_of(trials, cost)
    ]


def running_trials(study: optuna.Study) -> list[dict[str, Any]]:
    """Trials in training: number, last epoch, accuracy there, and whose they are."""
    return [
        {
            "trial": trial.number,
            "epoch": trial.last_step,
            "accuracy": trial.intermediate_values.get(trial.last_step or 0),
            "worker": trial.user_attrs.get(WORKER),
        }
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    ]


def workers_at(ledger: Ledger) -> list[dict[str, Any]]:
    """Workers that have not left by themselves, and what each is at."""
    return [
        {
            "worker": worker_name(row),
            "state": row.state,
            "device": row.device,
            "slot": row.slot,
            "progress": row.progress,
            "start_up_seconds": None if row.start_up is None else round(row.start_up, 1),
            "last_heartbeat_seconds": round(row.silent, 1),
        }
        for row in list_workers(ledger)
        if row.state != "left"
    ]


def worker_logs(ledger: Ledger) -> list[dict[str, Any]]:
    """What the workers printed last, but for those that left because all was done."""
    kept = read_logs(ledger)
    return [
        {
            "worker": worker_name(row),
            "state": row.state,
            "farewell": row.farewell,
            "place": kept[row.id].place,
            "lines": list(kept[row.id].lines),
        }
        for row in list_workers(ledger)
        if row.farewell != BUDGET_DONE and row.id in kept
    ]
