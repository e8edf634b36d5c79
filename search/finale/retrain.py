"""The end of the finale: the winner trained until longer no longer helps, then on all images, and tested once a seed.

This is the only module of a search that reads the test images.
"""

import datetime
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial
from scipy import stats
from torch import Tensor

from data.errors import RunError
from data.holdout import load_holdout
from data.split import Split, with_validation
from model.checkpoint import remove_checkpoint
from model.config import FitConfig, Precision
from model.cost import count_cost
from model.device import autocast_dtype, describe_device
from model.evaluate import evaluate
from model.fit import NonFiniteLossError
from model.network import BlockNetwork
from model.quality import Quality, as_predictor, assess, latency
from model.result import EpochResult
from model.saved import CONFIG, METRICS, WEIGHTS, save_model
from search.analysis.selection import selection_rule_of
from search.artifacts.mirror import Mirror
from search.attributes import HOLDOUT_READS, IMAGES_PER_SECOND, RETRAIN, RETRAIN_PARTS, RETRAIN_PROGRESS, SLOT
from search.config.objective import score
from search.config.settings import TrialConfig, trial_config
from search.config.space import settings_of
from search.events import Note, RetrainEpoch, RetrainStarted, Show
from search.finale.comparison import CONFIDENCE
from search.finale.convergence import (
    LengthLimits,
    SeedDeviation,
    Verdict,
    WatchedLength,
    first_length,
    judge_length,
    last_slope,
)
from search.finale.train import Trained, train
from search.samplers.slots import trial_seed
from search.study import StudyRecord, best_trial

SEED_OFFSET = 500_009
"""The winner is trained from other initial weights than its trial's, whose luck helped to choose it."""

LATENCY_BATCHES = (1, 256)


@dataclass(frozen=True)
class _Job:
    """What all parts of a retrain share."""

    study: optuna.Study
    record: StudyRecord
    winner: FrozenTrial
    split: Split
    files: Mirror
    limits: LengthLimits
    noise: SeedDeviation
    parts: dict[str, Any]
    show: Show

    @property
    def precision(self) -> Precision:
        """That the winner's trial had."""
        return settings_of(self.record.config.space, self.winner.params).precision

    def store(self) -> None:
        """Note what is done, so that nobody does it again."""
        self.study.set_user_attr(RETRAIN_PARTS, self.parts)


def retrain(
    study: optuna.Study,
    record: StudyRecord,
    confirmed: Mapping[str, Any] | None,
    split: Split,
    data_dir: Path,
    files: Mirror,
    max_epochs: int | None,
    show: Show,
) -> dict[str, Any]:
    """Retrain the winner to convergence, test it once a seed, save it in ``best`` and record it in the study.

    Every finished training is noted in the study and every epoch in a checkpoint, so a process that is killed goes on
    where it was. Does nothing where the study already holds the result of this very plan and the files are there.

    Args:
        study: the search.
        record: of it.
        confirmed: from `search.finale.confirm.confirmation`; None: the best trial is taken at its word.
        split: on the device to train on.
        data_dir: where the test images lie.
        files: the study's outputs.
        max_epochs: no training is longer.
        show: gets events.

    Returns:
        what the study's attribute ``retrain`` holds.

    Raises:
        RunError: no trial has completed, or the training diverged.
    """
    winner = _winner(study, confirmed)
    limits = _limits(record, split, max_epochs)
    plan = _plan(record, winner, limits, split)
    before = study.user_attrs.get(RETRAIN)
    wanted = selection_rule_of(study)
    chosen = {"chosen_by": wanted.rule, "limits": wanted.limits.most}
    if before and before["plan"] == plan and _is_saved(files):
        if {**before, **chosen} != before:  # the same winner under other limits
            study.set_user_attr(RETRAIN, {**before, **chosen})
        return {**before, **chosen}
    parts = study.user_attrs.get(RETRAIN_PARTS)
    if not parts or parts["plan"] != plan:
        speed = winner.user_attrs[IMAGES_PER_SECOND]
        first = first_length(limits, len(split.fit_labels) / speed)
        parts = {"plan": plan, "first": first, "watched": [], "runs": []}
    job = _Job(study, record, winner, split, files, limits, _noise(winner, confirmed, split), parts, show)
    try:
        verdict = _find_length(job)
        done = {**_finish(job, verdict, data_dir), **chosen}
    except NonFiniteLossError as error:
        raise RunError(f"the retrain diverged: {error}") from error
    study.set_user_attr(RETRAIN, done)
    study.set_user_attr(RETRAIN_PROGRESS, None)
    for path in _checkpoints(files).glob("retrain-*.safetensors"):
        remove_checkpoint(path)
    lengths = [f"watch-{row['epochs']}" for row in parts["watched"]]
    for name in (*lengths, *(f"final-{number + 1}" for number in range(limits.finals))):
        files.remove(_checkpoint(files, name))
    return done


def _saved(files: Mirror) -> list[Path]:
    """The files of the saved model."""
    return [files.out / "best" / name for name in (WEIGHTS, CONFIG, METRICS)]


def _is_saved(files: Mirror) -> bool:
    """Whether the saved model is here, fetched where another machine has left it in the store."""
    weights, *others = _saved(files)
    return weights.exists() or (all(map(files.download, others)) and files.download(weights))


def _winner(study: optuna.Study, confirmed: Mapping[str, Any] | None) -> FrozenTrial:
    number = confirmed["winner"] if confirmed else None
    winner = best_trial(study) if number is None else study.get_trials(deepcopy=False)[number]
    if winner is None:
        raise RunError("no trial ran to its end, so there is nothing to retrain; raise --trials")
    return winner


def _limits(record: StudyRecord, split: Split, max_epochs: int | None) -> LengthLimits:
    asked = record.config.retrain
    fit, validation = len(split.fit_labels), len(split.validation_labels)
    return LengthLimits(
        first=asked.epochs,
        longest=asked.longest if max_epochs is None else min(asked.longest, max_epochs),
        seconds=None if asked.max_minutes is None else 60 * asked.max_minutes,
        finals=asked.seeds,
        final_share=(fit + validation) / fit,
    )


def _plan(record: StudyRecord, winner: FrozenTrial, limits: LengthLimits, split: Split) -> dict[str, Any]:
    """What the result depends on, as JSON gives it back."""
    return {
        "trial": winner.number,
        "params": winner.params,
        "seed": _seed(record, winner, 0),
        "limits": asdict(limits),
        "images": split.fingerprint,
    }


def _noise(winner: FrozenTrial, confirmed: Mapping[str, Any] | None, split: Split) -> SeedDeviation:
    rows = {row["trial"]: row for row in confirmed["configurations"]} if confirmed else {}
    mean = rows[winner.number]["mean"] if winner.number in rows else None
    measured = confirmed["noise"] if confirmed and mean is not None else None
    return SeedDeviation(measured, mean if mean is not None else score(winner) or 0.0, len(split.validation_labels))


def _seed(record: StudyRecord, winner: FrozenTrial, number: int) -> int:
    return trial_seed(record.config, winner.user_attrs[SLOT]) + SEED_OFFSET + number


def _config(job: _Job, epochs: int, number: int) -> TrialConfig:
    settings = settings_of(job.record.config.space, job.winner.params)
    seed = _seed(job.record, job.winner, number)
    return trial_config(settings, epochs, seed, len(job.record.dataset.classes))


def _checkpoints(files: Mirror) -> Path:
    return files.out / "checkpoints"


def _checkpoint(files: Mirror, name: str) -> Path:
    return _checkpoints(files) / f"retrain-{name}.safetensors"


# How long


def _find_length(job: _Job) -> Verdict:
    """Train on the fit images, each time twice as long, until the rule of `search.finale.convergence` says enough."""
    rows: list[dict[str, Any]] = job.parts["watched"]
    if not rows:
        rows.append(_watch(job, job.parts["first"]))
        job.store()
    while True:
        watched = [WatchedLength(row["epochs"], row["validation_accuracy"], row["seconds"]) for row in rows]
        verdict = judge_length(watched, job.noise, job.limits)
        if len(rows) > 1:
            rows[-1]["gain"] = watched[-1].accuracy - watched[-2].accuracy
        if verdict.next is None:
            why = {
                "noise": "longer no longer helps by more than noise",
                "max epochs": "the longest that is allowed",
                "time": "what the study's minutes allow; longer would probably help",
            }
            assert verdict.stopped_by is not None
            job.show(Note(f"retrain: {verdict.found} epochs: {why[verdict.stopped_by]}"))
            return verdict
        rows.append(_watch(job, verdict.next))
        job.store()


def _watch(job: _Job, epochs: int) -> dict[str, Any]:
    split = job.split
    config = _config(job, epochs, 0)
    to_come = job.limits.finals * job.limits.final_share
    trained = _train(job, config, split, f"watch-{epochs}", "on the fit images", to_come)
    forms = {"validation_accuracy": (trained.network, False), "averaged": (trained.average, False)}
    if split.mirror:
        forms |= {"flip": (trained.network, True), "averaged_flip": (trained.average, True)}
    scores = {
        name: _assessed(job, network, flip, split.validation_images, split.validation_labels).accuracy
        for name, (network, flip) in forms.items()
    }
    return {
        "epochs": epochs,
        "seed": config.fit.seed,
        "gain": None,
        **scores,
        "slope": last_slope([row["validation_accuracy"] for row in trained.curve]),
        "seconds": round(trained.seconds, 1),
        "curve": trained.curve,
        "losses": trained.losses,
    }


def _choices(row: Mapping[str, Any]) -> dict[str, bool]:
    """Averaged weights and flip test-time augmentation, each where it pays on the validation images."""
    forms = {
        "validation_accuracy": (False, False),
        "flip": (True, False),
        "averaged": (False, True),
        "averaged_flip": (True, True),
    }
    best = max((name for name in forms if name in row), key=lambda name: row[name])  # of equals the plainest
    flip, averaging = forms[best]
    return {"flip": flip, "averaging": averaging}


# The final trainings


def _finish(job: _Job, verdict: Verdict, data_dir: Path) -> dict[str, Any]:
    """Train on all training images once a seed, test each once, and save the first."""
    watched = {row["epochs"]: row for row in job.parts["watched"]}
    # Where time ended the lengthening, nothing as long has been watched: what pays is judged by the longest.
    choices = _choices(watched.get(verdict.found, job.parts["watched"][-1]))
    whole = with_validation(job.split)
    runs: list[dict[str, Any]] = job.parts["runs"]
    finals = job.limits.finals
    for number in range(len(runs), finals):
        trained, config = _final(job, whole, verdict.found, number)
        network = trained.average if choices["averaging"] else trained.network
        fitted = evaluate(network, whole.fit_images, whole.fit_labels, job.precision)
        quality, read = _tested(job, network, config.fit, choices["flip"], data_dir)
        runs.append(
            {
                "seed": config.fit.seed,
                "train_accuracy": fitted.accuracy,
                "train_loss": fitted.loss,
                "seconds": round(trained.seconds, 1),
                # The validation images are trained on here: their accuracy would mean nothing.
                "curve": [{k: v for k, v in one.items() if "validation" not in k} for one in trained.curve],
                "losses": trained.losses,
                "test": {**asdict(quality), "read_at": read},
            }
        )
        job.store()
    trained, config = _final(job, whole, verdict.found, 0)  # from its checkpoint
    network = trained.average if choices["averaging"] else trained.network
    done = _result(job, verdict, choices, network, config)
    about = {
        "study": job.record.name,
        "dataset": asdict(job.record.dataset),
        "training": asdict(config.fit),
        "predict": {"flip": choices["flip"]},
    }
    metrics = {key: value for key, value in done.items() if key not in ("plan", "folder")}
    save_model(job.files.out / "best", network, job.record.dataset.classes, about, metrics)
    job.files.upload(*_saved(job.files))
    return done


def _final(job: _Job, whole: Split, epochs: int, number: int) -> tuple[Trained, TrialConfig]:
    config = _config(job, epochs, number + 1)
    finals = job.limits.finals
    text = "on all training images" + (f", {number + 1} of {finals}" if finals > 1 else "")
    # Its place in the order is a part of the name: the first one's checkpoint is kept to the end.
    return _train(job, config, whole, f"final-{number + 1}", text, finals - number - 1), config


def _tested(job: _Job, network: BlockNetwork, config: FitConfig, flip: bool, data_dir: Path) -> tuple[Quality, str]:
    """Read the test images, once, and note that in the study before they are read."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = {"when": now, "by": "search.finale.retrain", "trial": job.winner.number, "seed": config.seed}
    reads = [*job.study.user_attrs.get(HOLDOUT_READS, []), entry]
    job.study.set_user_attr(HOLDOUT_READS, reads)
    holdout = load_holdout(job.record.dataset.name, data_dir, job.split.fit_images.device)
    if sum(read["seed"] == config.seed for read in reads) > 1:
        job.show(Note(f"the test images have been read before for seed {config.seed}; each read is recorded"))
    return _assessed(job, network, flip, holdout.images, holdout.labels), now


def _assessed(job: _Job, network: BlockNetwork, flip: bool, images: Tensor, labels: Tensor) -> Quality:
    return assess(as_predictor(network, flip), images, labels, job.precision, len(job.record.dataset.classes))


def _result(
    job: _Job, verdict: Verdict, choices: Mapping[str, bool], network: BlockNetwork, config: TrialConfig
) -> dict[str, Any]:
    runs = job.parts["runs"]
    classes = job.record.dataset.classes
    confusion = np.sum([run["test"]["confusion"] for run in runs], axis=0)
    cost = count_cost(config.network)
    seconds = math.fsum(part["seconds"] for part in (*job.parts["watched"], *runs))
    predictor = as_predictor(network, choices["flip"])
    dtype = autocast_dtype(job.precision, job.split.fit_images.device)
    rights = confusion.diagonal() / np.maximum(confusion.sum(1), 1)
    return {
        "trial": job.winner.number,
        "epochs": verdict.found,
        "converged": verdict.converged,
        "stopped_by": verdict.stopped_by,
        "rule": {"noise": verdict.noise, "threshold": verdict.threshold},
        "watched": job.parts["watched"],
        "choices": dict(choices),
        "runs": runs,
        "train_accuracy": _mean([run["train_accuracy"] for run in runs]),
        "test_accuracy": interval([run["test"]["accuracy"] for run in runs], runs[0]["test"]["images"]),
        "per_class_accuracy": dict(zip(classes, rights.tolist(), strict=True)),
        "confusion": confusion.tolist(),
        "calibration_error": _mean([run["test"]["calibration_error"] for run in runs]),
        "test_images": runs[0]["test"]["images"],
        "parameters": cost.parameters,
        "flops": cost.flops,
        "latency": {str(batch): latency(predictor, batch, job.precision) for batch in LATENCY_BATCHES},
        "latency_precision": str(dtype or torch.float32).removeprefix("torch."),
        "device": describe_device(job.split.fit_images.device),
        "seconds": round(seconds, 1),
        "plan": job.parts["plan"],
        "folder": str(job.files.out / "best"),
    }


def interval(accuracies: list[float], images: int) -> dict[str, Any]:
    """Mean and standard deviation over seeds, with a 95 % interval.

    Of several seeds it is Student's, for the mean over all seeds that could have been; of one seed it is Wilson's, for
    the share of all such images that this very network would class rightly.
    """
    mean, n = _mean(accuracies), len(accuracies)
    if n == 1:
        bounds = stats.binomtest(round(mean * images), images).proportion_ci(CONFIDENCE, method="wilson")
        return {"mean": mean, "std": None, "n": 1, "low": bounds.low, "high": bounds.high, "interval": "images"}
    std = float(np.std(accuracies, ddof=1))
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n)
    return {"mean": mean, "std": std, "n": n, "low": mean - margin, "high": mean + margin, "interval": "seeds"}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


# One training, shown


def _train(job: _Job, config: TrialConfig, split: Split, name: str, text: str, to_come: float) -> Trained:
    """Train, or go on with it, and say how it goes.

    Args:
        job: what all share.
        config: of this training.
        split: its images.
        name: of its checkpoint.
        text: what it is, for people.
        to_come: trainings of this length that will follow, at least.
    """
    epochs, images = config.fit.epochs, len(split.fit_labels)
    path = _checkpoint(job.files, name)
    told = _teller(job, config, split, text, to_come)
    expected = epochs * images / job.winner.user_attrs[IMAGES_PER_SECOND]

    def warn(text: str) -> None:
        job.show(Note(f"warning: {text}"))

    return train(config, split, path, job.files, expected, told, warn)


def _teller(job: _Job, config: TrialConfig, split: Split, text: str, to_come: float) -> Callable[[EpochResult], None]:
    epochs = config.fit.epochs
    started = RetrainStarted(job.winner.number, epochs, len(split.fit_labels), text)

    shown = False

    def told(result: EpochResult) -> None:
        nonlocal shown
        if not shown:
            job.show(started)
            shown = True
        left = result.seconds * (epochs - result.epoch + to_come * epochs)
        job.show(RetrainEpoch(started, result, left, validated=split is job.split))
        progress = {"what": text, "epoch": result.epoch, "epochs": epochs, "seed": config.fit.seed}
        job.study.set_user_attr(RETRAIN_PROGRESS, {**progress, "eta_seconds": round(left)})

    return told
