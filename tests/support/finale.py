"""What a finale gives, made up: as `search.finale.confirm` and `search.finale.retrain` give it."""

from typing import Any

from optuna.trial import FrozenTrial

from search.results import Confirmation, RetrainResult, from_json


def confirmation(trials: list[FrozenTrial], **changes: Any) -> Confirmation:
    """Of these trials, the second of which is taken: cheaper than the first and within its noise."""
    seeds = [700001, 700002, 700003]
    rows = [
        {
            "trial": trial.number,
            "params": trial.params,
            "parameters": trial.user_attrs.get("parameters", 0),
            "flops": trial.user_attrs.get("flops", 0),
            "search_accuracy": trial.value,
            "accuracies": {str(seed): 0.69 - 0.002 * rank + 0.001 * i for i, seed in enumerate(seeds)},
            "mean": 0.691 - 0.002 * rank,
            "std": 0.001,
            "n": 3,
            "behind": {"mean": 0.002 * rank, "low": -0.002, "high": 0.008} if rank else None,
        }
        for rank, trial in enumerate(trials)
    ]
    best, taken = trials[0].number, trials[1].number
    content = {
        "study": "tried.confirm",
        "chosen_by": "accuracy",
        "limits": {},
        "unconfirmed": [],
        "runs": 3 * len(rows),
        "done": 3 * len(rows),
        "seeds": seeds,
        "configurations": rows,
        "noise": 0.0041,
        "noise_freedom": 6,
        "noise_of_difference": 0.0033,
        "best_mean": best,
        "winner": taken,
        "tie": True,
        "tied": [best, taken],
        "optimism": {"trial": best, "score": 0.702, "confirmed": 0.6912, "difference": 0.0108},
        **changes,
    }
    return from_json(Confirmation, content)


def _curve(epochs: int, validation: bool) -> list[dict[str, float]]:
    rows = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "train_loss": 2 / epoch, "train_accuracy": 1 - 0.5 / epoch, "lr": 0.1, "seconds": 3.0}
        row["images_per_second"] = 1000.0
        rows.append(row | ({"validation_accuracy": 0.9 - 0.4 / epoch, "validation_loss": 0.5} if validation else {}))
    return rows


def retrain(trial: int, classes: tuple[str, ...], **changes: Any) -> RetrainResult:
    """Of this trial: 4 and 8 epochs watched, then two final trainings of 8."""
    losses = [[step, 2 - step / 100] for step in range(1, 101)]
    count = len(classes)
    content = {
        "trial": trial,
        "epochs": 8,
        "converged": True,
        "stopped_by": "noise",
        "rule": {"noise": 0.0029, "threshold": 0.0041},
        "watched": [
            {
                "epochs": epochs, "seed": 5, "validation_accuracy": 0.8, "flip": 0.81, "averaged": 0.802,
                "averaged_flip": 0.812, "gain": gain, "slope": {"per_epoch": 0.0004, "low": -0.0001, "high": 0.0009},
                "seconds": 30.0, "curve": _curve(epochs, validation=True), "losses": losses,
            }
            for epochs, gain in ((4, None), (8, 0.0021))
        ],
        "choices": {"flip": True, "averaging": False},
        "runs": [
            {
                "seed": seed, "train_accuracy": 0.996, "train_loss": 0.02, "seconds": 60.0,
                "curve": _curve(8, validation=False), "losses": losses,
                "test": {
                    "accuracy": 0.915, "loss": 0.3, "per_class": [0.915] * count, "confusion": [[1] * count] * count,
                    "calibration_error": 0.02, "images": 100 * count, "read_at": "2026-11-22T12:00:00+00:00",
                },
            }
            for seed in (500010, 500011)
        ],
        "train_accuracy": 0.996,
        "test_accuracy": {"mean": 0.9146, "std": 0.001, "n": 2, "low": 0.9121, "high": 0.9171},
        "per_class_accuracy": {name: 0.9 + i / 1000 for i, name in enumerate(classes)},
        "confusion": [[90 if i == j else 7 if (j - i) % count == 1 else 1 for j in range(count)] for i in range(count)],
        "calibration_error": 0.0213,
        "parameters": 1_234_567,
        "flops": 98_765_432,
        "latency": {"1": 0.0043, "256": 0.2},
        "latency_precision": "bfloat16",
        "device": "cpu, 2 cores",
        "seconds": 2000.0,
        "folder": "studies/tried/best",
        **changes,
    }  # fmt: skip
    return from_json(RetrainResult, content)
