"""``summary.json`` and ``status``: a study's state in one stable shape, read from the storage alone."""

from typing import Any

import optuna
from optuna.trial import TrialState

from search.ledger import budget
from search.study import StudyRecord, best_trial

FALLBACK_WARNING = (
    "CIFAR-10 was not to be had when this study began, so its scores are those of scikit-learn's 8x8 digits; "
    "for CIFAR-10 give another --name with --dataset cifar10"
)


def summarise(study: optuna.Study, record: StudyRecord, storage_shown: str) -> dict[str, Any]:
    """The contract's ``summary.json``; ``storage_shown`` holds no password."""
    count = budget(study, record.config.trials)
    best = best_trial(study)
    done = study.user_attrs.get("retrain")
    return {
        "study": record.name,
        "dataset": {
            "name": record.dataset.name,
            "fingerprint": record.dataset.fingerprint,
            "fit": record.dataset.fit,
            "validation": record.dataset.validation,
            "fallback": record.dataset.fallback,
        },
        "storage": storage_shown,
        "budget": {
            "requested": count.requested,
            "complete": count.complete,
            "pruned": count.pruned,
            "failed_attempts": count.failed_attempts,
            "running": count.running,
            "waiting": count.waiting,
        },
        "best": best
        and {
            "trial": best.number,
            "val_accuracy": best.value,
            "params": best.params,
            "parameters": best.user_attrs["parameters"],
            "flops": best.user_attrs["flops"],
        },
        "confirm": None,
        "retrain": done
        and {key: done[key] for key in ("trial", "epochs", "converged", "train_accuracy", "test_accuracy", "seconds")},
        "holdout_reads": len(study.user_attrs.get("holdout_reads", [])),
        "seconds": round(study.user_attrs.get("seconds", 0.0), 1),
        "trial_seconds": round(
            sum(trial.user_attrs.get("seconds", 0.0) for trial in study.get_trials(deepcopy=False)), 1
        ),
        "space_hash": study.user_attrs["space_hash"],
        "environment": study.user_attrs["environment"],
        "warnings": [FALLBACK_WARNING] if record.dataset.fallback else [],
    }


def running_trials(study: optuna.Study) -> list[dict[str, Any]]:
    """Trials in training: number, last epoch and accuracy there."""
    return [
        {
            "trial": trial.number,
            "epoch": trial.last_step,
            "accuracy": trial.intermediate_values.get(trial.last_step or 0),
        }
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    ]
