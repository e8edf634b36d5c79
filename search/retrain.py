"""The finale: the winner trained once more, on all training images, and tested once.

This is the only module of a search that reads the test images.
"""

import datetime
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from data.holdout import load_holdout
from data.split import Split, with_validation
from model.config import FitConfig
from model.cost import count_cost
from model.device import describe_device
from model.evaluate import evaluate
from model.fit import NonFiniteLossError, fit
from model.network import build_network
from model.saved import save_model
from model.tuning import tuned
from search.errors import RunError
from search.events import Note, RetrainEpoch, RetrainStarted, Show
from search.ledger import SLOT
from search.settings import TrialConfig, trial_config
from search.space import settings_of
from search.study import StudyRecord, best_trial, trial_seed

SEED_OFFSET = 500_009
"""The winner is trained from other initial weights than its trial's, whose luck helped to choose it."""


@dataclass(frozen=True)
class Plan:
    """What the finale trains: decided before it starts, stored with its result."""

    trial: int
    config: TrialConfig


def plan(record: StudyRecord, winner: FrozenTrial, max_epochs: int | None, images: int) -> Plan:
    """The winner's configuration at the retrain's length, from a seed of its own."""
    settings = settings_of(record.config.space, winner.params)
    seed = trial_seed(record.config, winner.user_attrs[SLOT]) + SEED_OFFSET
    epochs = retrain_epochs(record, winner, max_epochs, images)
    return Plan(winner.number, trial_config(settings, epochs, seed, len(record.dataset.classes)))


def retrain_epochs(record: StudyRecord, winner: FrozenTrial, max_epochs: int | None, images: int) -> int:
    """Epochs of the retrain: as the study file says, held to its minutes at the winner's measured speed."""
    limits = [record.config.retrain.epochs]
    if max_epochs is not None:
        limits.append(max_epochs)
    if record.config.retrain.max_minutes is not None:
        seconds = 60 * record.config.retrain.max_minutes
        limits.append(int(seconds * winner.user_attrs["images_per_second"] / images))
    return max(1, min(limits))


def retrain(
    study: optuna.Study,
    record: StudyRecord,
    split: Split,
    data_dir: Path,
    out: Path,
    max_epochs: int | None,
    show: Show,
) -> dict[str, Any]:
    """Retrain the best configuration, test it once, save it in ``out/best`` and record it in the study.

    Does nothing where the study already holds the result of this very plan and the files are there.

    Returns:
        what ``summary.json`` holds under ``retrain``, with more beside it.

    Raises:
        RunError: no trial has completed, or the training diverged.
    """
    winner = best_trial(study)
    if winner is None:
        raise RunError("no trial ran to its end, so there is nothing to retrain; raise --trials")
    whole = with_validation(split)
    chosen = plan(record, winner, max_epochs, len(whole.fit_labels))
    before = study.user_attrs.get("retrain")
    if before and before["plan"] == _plain(chosen) and (out / "best" / "model.safetensors").exists():
        return dict(before)

    start = time.perf_counter()
    device = whole.fit_images.device
    fit_config: FitConfig = chosen.config.fit
    show(RetrainStarted(winner.number, fit_config.epochs, len(whole.fit_labels)))
    network = build_network(chosen.config.network, fit_config.seed, device)
    curve = []  # without validation: those images are trained on here
    expected = fit_config.epochs * len(whole.fit_labels) / winner.user_attrs["images_per_second"]
    try:
        with tuned(network, device, expected) as trained:
            for result in fit(trained, whole, fit_config):
                curve.append({key: value for key, value in asdict(result).items() if "validation" not in key})
                show(RetrainEpoch(result, fit_config.epochs))
    except NonFiniteLossError as error:
        raise RunError(f"the retrain diverged: {error}") from error
    train = evaluate(network, whole.fit_images, whole.fit_labels, fit_config.precision)

    reads = [*study.user_attrs.get("holdout_reads", []), _read_entry(winner.number, fit_config.seed)]
    study.set_user_attr("holdout_reads", reads)
    holdout = load_holdout(record.dataset.name, data_dir, device)
    test = evaluate(network, holdout.images, holdout.labels, fit_config.precision)
    if len(reads) > 1:
        show(Note(f"the test images have now been read {len(reads)} times in this study; each read is recorded"))

    cost = count_cost(chosen.config.network)
    metrics = {
        "trial": winner.number,
        "epochs": fit_config.epochs,
        "converged": None,
        "train_accuracy": train.accuracy,
        "test_accuracy": {"mean": test.accuracy, "std": None, "n": 1},
        "test_loss": test.loss,
        "test_images": len(holdout.labels),
        "parameters": cost.parameters,
        "flops": cost.flops,
        "device": describe_device(device),
        "seconds": round(time.perf_counter() - start, 1),
    }
    about = {"study": record.name, "dataset": asdict(record.dataset), "training": asdict(fit_config)}
    save_model(out / "best", network, record.dataset.classes, about, {**metrics, "curve": curve})
    done = {**metrics, "plan": _plain(chosen), "folder": str(out / "best")}
    study.set_user_attr("retrain", done)
    return done


def _plain(chosen: Plan) -> dict[str, Any]:
    """A plan as JSON gives it back (tuples are lists there)."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(chosen)))
    return plain


def _read_entry(trial: int, seed: int) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"when": now, "by": "search.retrain", "trial": trial, "seed": seed}
