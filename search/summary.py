"""``summary.json`` and ``status``: a study's state in one stable shape, read from the storage alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.choice import aim, front_of
from search.confirm import confirmation
from search.forecast import forecast
from search.ledger import WORKER, Ledger, budget
from search.noise import Noise
from search.objective import Cost, cost_of, score
from search.overhead import trials_overhead, workers_start_up
from search.study import StudyRecord, best_trial
from search.warm_start import helped
from search.watch import worker_name
from search.workers import DONE, listed, logs

RETRAIN_KEYS = (
    "trial", "epochs", "converged", "stopped_by", "train_accuracy", "test_accuracy", "calibration_error", "parameters",
    "flops", "latency", "seconds", "chosen_by", "limits",
)  # fmt: skip
"""Of a study's attribute ``retrain``, what the summary tells."""

FALLBACK_WARNING = (
    "CIFAR-10 was not to be had when this study began, so its scores are those of scikit-learn's 8x8 digits; "
    "for CIFAR-10 give another --name with --dataset cifar10"
)


def summarise(study: optuna.Study, record: StudyRecord, ledger: Ledger, storage_shown: str) -> dict[str, Any]:
    """The contract's ``summary.json``; ``storage_shown`` holds no password."""
    count = budget(ledger)
    best = best_trial(study)
    done = study.user_attrs.get("retrain")
    trials = study.get_trials(deepcopy=False)
    workers = listed(ledger)
    confirmed = confirmation(ledger.database, study)
    wanted = aim(record.config.objective, study.user_attrs)
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
            "parameters": best.user_attrs["parameters"],
            "flops": best.user_attrs["flops"],
            **({"latency": best.user_attrs["latency"]} if "latency" in best.user_attrs else {}),
            "chosen_by": wanted.rule,
        },
        "front": wanted.cost and _front(trials, wanted.cost),
        "confirm": confirmed,
        "retrain": done and {key: done[key] for key in RETRAIN_KEYS if key in done},
        "retrain_progress": study.user_attrs.get("retrain_progress"),
        "holdout_reads": len(study.user_attrs.get("holdout_reads", [])),
        "seconds": round(study.user_attrs.get("seconds", 0.0), 1),
        "trial_seconds": round(sum(trial.user_attrs.get("seconds", 0.0) for trial in trials), 1),
        "overhead": trials_overhead(trials),
        "start_up": workers_start_up([row.start_up for row in workers if row.start_up is not None]),
        "known_good": helped(record.config, trials),
        "forecast": forecast(
            trials,
            count,
            sum(row.state == "working" for row in workers),
            wanted.cost is None,
            None if confirmed is None else _noise(confirmed),
        ),
        "space_hash": study.user_attrs["space_hash"],
        "environment": study.user_attrs["environment"],
        "warnings": [FALLBACK_WARNING] if record.dataset.fallback else [],
    }


def _noise(confirmed: Mapping[str, Any]) -> Noise | None:
    """Between seeds, as a confirmation knows it."""
    std = confirmed["noise"]
    return None if std is None else Noise(std, confirmed["noise_freedom"])


def _front(trials: Sequence[FrozenTrial], cost: Cost) -> list[dict[str, Any]]:
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
        for row in listed(ledger)
        if row.state != "left"
    ]


def worker_logs(ledger: Ledger) -> list[dict[str, Any]]:
    """What the workers printed last, but for those that left because all was done."""
    kept = logs(ledger)
    return [
        {
            "worker": worker_name(row),
            "state": row.state,
            "farewell": row.farewell,
            "place": kept[row.id].place,
            "lines": list(kept[row.id].lines),
        }
        for row in listed(ledger)
        if row.farewell != DONE and row.id in kept
    ]
