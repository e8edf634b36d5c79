"""The end of the finale: train the winner until longer does not help, then on all images, and test it once per seed.

This is the only module of a search that reads the test images.
"""

import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial
from scipy import stats

from data.errors import RunError
from data.holdout import load_holdout
from data.split import Split, with_validation
from model.checkpoint import remove_checkpoint
from model.config import FitConfig
from model.cost import count_cost
from model.device import autocast_dtype, describe_device
from model.evaluate import evaluate
from model.fit import NonFiniteLossError
from model.network import BlockNetwork
from model.quality import as_predictor, latency
from model.saved import CONFIG, METRICS, WEIGHTS, save_model
from search.analysis.selection import selection_rule_of
from search.artifacts.mirror import Mirror
from search.attributes import HOLDOUT_READS, IMAGES_PER_SECOND, RETRAIN, RETRAIN_PARTS, RETRAIN_PROGRESS, SLOT
from search.config.objective import score
from search.config.settings import TrialConfig
from search.events import Note
from search.finale.comparison import CONFIDENCE
from search.finale.convergence import SeedDeviation, Verdict, first_length
from search.finale.job import (
    RetrainContext,
    RetrainJob,
    assess_network,
    checkpoint_folder,
    checkpoint_path,
    curve_of,
    losses_of,
    train_with_progress,
)
from search.finale.length import find_length, inference_choices
from search.finale.train import Trained
from search.results import (
    AccuracyEstimate,
    Confirmation,
    ConvergenceRule,
    FinalTraining,
    HoldoutQuality,
    InferenceChoices,
    LengthLimits,
    RetrainParts,
    RetrainPlan,
    RetrainResult,
    as_json,
    optional_from_json,
)
from search.samplers.slots import trial_seed
from search.study import StudyRecord, best_trial

SEED_OFFSET = 500_009
"""The winner is trained from other initial weights than its trial's, whose luck helped to choose it."""

LATENCY_BATCHES = (1, 256)


def retrain(context: RetrainContext, confirmed: Confirmation | None, max_epochs: int | None) -> RetrainResult:
    """Retrain the winner to convergence, test it once per seed, save it in ``best`` and record it in the study.

    Every finished training is noted in the study and every epoch in a checkpoint, so a killed process continues
    where it was. Does nothing if the study already holds the result of this very plan and the files exist.

    Args:
        context: the search.
        confirmed: its confirmation; None: the best trial's score is trusted.
        max_epochs: no training is longer.

    Raises:
        RunError: no trial has completed, or the training diverged.
    """
    study, split, files = context.study, context.split, context.files
    winner = _winner(study, confirmed)
    plan = _plan(context.record, winner, split, max_epochs)
    before = optional_from_json(RetrainResult, study.user_attrs.get(RETRAIN))
    rule = selection_rule_of(study)
    if before and before.plan == plan and _is_saved(files):
        result = replace(before, chosen_by=rule.rule, limits=rule.limits)
        if result != before:  # the same winner under other limits
            study.set_user_attr(RETRAIN, as_json(result))
        return result
    parts = optional_from_json(RetrainParts, study.user_attrs.get(RETRAIN_PARTS))
    if parts is None or parts.plan != plan:
        seconds_per_epoch = len(split.fit_labels) / winner.user_attrs[IMAGES_PER_SECOND]
        parts = RetrainParts(plan, first_length(plan.limits, seconds_per_epoch))
    job = RetrainJob(context, winner, plan, _noise(winner, confirmed, split))
    try:
        parts, verdict = find_length(job, parts)
        result = _finish(job, parts, verdict)
    except NonFiniteLossError as error:
        raise RunError(f"the retrain diverged: {error}") from error
    result = replace(result, chosen_by=rule.rule, limits=rule.limits)
    study.set_user_attr(RETRAIN, as_json(result))
    study.set_user_attr(RETRAIN_PROGRESS, None)
    _remove_checkpoints(files, result)
    return result


def _winner(study: optuna.Study, confirmed: Confirmation | None) -> FrozenTrial:
    number = confirmed.winner if confirmed else None
    winner = best_trial(study) if number is None else study.get_trials(deepcopy=False)[number]
    if winner is None:
        raise RunError("no trial ran to its end, so there is nothing to retrain; raise --trials")
    return winner


def _plan(record: StudyRecord, winner: FrozenTrial, split: Split, max_epochs: int | None) -> RetrainPlan:
    config = record.config.retrain
    fit, validation = len(split.fit_labels), len(split.validation_labels)
    limits = LengthLimits(
        first=config.epochs,
        longest=config.longest if max_epochs is None else min(config.longest, max_epochs),
        seconds=None if config.max_minutes is None else 60 * config.max_minutes,
        finals=config.seeds,
        final_share=(fit + validation) / fit,
    )
    seed = trial_seed(record.config, winner.user_attrs[SLOT]) + SEED_OFFSET
    return RetrainPlan(winner.number, winner.params, seed, limits, split.fingerprint)


def _noise(winner: FrozenTrial, confirmed: Confirmation | None, split: Split) -> SeedDeviation:
    configurations = confirmed.configurations if confirmed else ()
    mean = next((row.mean for row in configurations if row.trial == winner.number), None)
    measured = confirmed.noise if confirmed and mean is not None else None
    return SeedDeviation(measured, mean if mean is not None else score(winner) or 0.0, len(split.validation_labels))


def _saved(files: Mirror) -> list[Path]:
    """The files of the saved model."""
    return [files.out / "best" / name for name in (WEIGHTS, CONFIG, METRICS)]


def _is_saved(files: Mirror) -> bool:
    """Whether the saved model is here, fetched if another machine has left it in the store."""
    weights, *others = _saved(files)
    return weights.exists() or (all(map(files.download, others)) and files.download(weights))


def _remove_checkpoints(files: Mirror, result: RetrainResult) -> None:
    """Remove a retrain's checkpoints, here and in the store."""
    for path in checkpoint_folder(files).glob("retrain-*.safetensors"):
        remove_checkpoint(path)
    lengths = [f"watch-{training.epochs}" for training in result.watched]
    for name in (*lengths, *(f"final-{number + 1}" for number in range(len(result.runs)))):
        files.remove(checkpoint_path(files, name))


# The final trainings


def _finish(job: RetrainJob, parts: RetrainParts, verdict: Verdict) -> RetrainResult:
    """Train on all training images once per seed, test each once, and save the first."""
    context = job.context
    by_length = {training.epochs: training for training in parts.watched}
    # If time ended the lengthening, no length training is as long: the longest judges what pays.
    choices = inference_choices(by_length.get(verdict.epochs, parts.watched[-1]))
    whole = with_validation(context.split)
    for number in range(len(parts.runs), job.plan.limits.finals):
        training = _final_training(job, whole, verdict.epochs, number, choices)
        parts = replace(parts, runs=(*parts.runs, training))
        job.store(parts)
    trained, config = _trained(job, whole, verdict.epochs, 0)  # from its checkpoint
    network = trained.average if choices.averaging else trained.network
    result = _result(job, parts, verdict, choices, network, config)
    about = {
        "study": context.record.name,
        "dataset": asdict(context.record.dataset),
        "training": asdict(config.fit),
        "predict": {"flip": choices.flip},
    }
    metrics = as_json(replace(result, plan=None, folder=None))
    save_model(context.files.out / "best", network, context.record.dataset.classes, about, metrics)
    context.files.upload(*_saved(context.files))
    return result


def _final_training(
    job: RetrainJob, whole: Split, epochs: int, number: int, choices: InferenceChoices
) -> FinalTraining:
    """Train with the ``number``-th seed, from 0, and read the test images once."""
    trained, config = _trained(job, whole, epochs, number)
    network = trained.average if choices.averaging else trained.network
    fitted = evaluate(network, whole.fit_images, whole.fit_labels, job.precision)
    test = _tested(job, network, config.fit, choices.flip)
    return FinalTraining(
        seed=config.fit.seed,
        train_accuracy=fitted.accuracy,
        train_loss=fitted.loss,
        seconds=round(trained.seconds, 1),
        # The validation images are trained on here: their accuracy would mean nothing.
        curve=tuple(replace(point, validation_loss=None, validation_accuracy=None) for point in curve_of(trained)),
        losses=losses_of(trained),
        test=test,
    )


def _trained(job: RetrainJob, whole: Split, epochs: int, number: int) -> tuple[Trained, TrialConfig]:
    config = job.config(epochs, number + 1)
    finals = job.plan.limits.finals
    text = "on all training images" + (f", {number + 1} of {finals}" if finals > 1 else "")
    # The number is a part of the name: the first training's checkpoint is needed to the end.
    return train_with_progress(job, config, whole, f"final-{number + 1}", text, finals - number - 1), config


def _tested(job: RetrainJob, network: BlockNetwork, config: FitConfig, flip: bool) -> HoldoutQuality:
    """Read the test images, once, and note that in the study before they are read."""
    context = job.context
    read_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    read = {"when": read_at, "by": "search.retrain", "trial": job.winner.number, "seed": config.seed}
    reads = [*context.study.user_attrs.get(HOLDOUT_READS, []), read]
    context.study.set_user_attr(HOLDOUT_READS, reads)
    holdout = load_holdout(context.record.dataset.name, context.data_dir, context.split.fit_images.device)
    if sum(read["seed"] == config.seed for read in reads) > 1:
        context.show(Note(f"the test images have been read before for seed {config.seed}; each read is recorded"))
    quality = assess_network(job, network, flip, holdout.images, holdout.labels)
    return HoldoutQuality(**asdict(quality), read_at=read_at)


def _result(
    job: RetrainJob,
    parts: RetrainParts,
    verdict: Verdict,
    choices: InferenceChoices,
    network: BlockNetwork,
    config: TrialConfig,
) -> RetrainResult:
    runs, classes, device = parts.runs, job.context.record.dataset.classes, job.context.split.fit_images.device
    confusion = np.sum([run.test.confusion for run in runs], axis=0)
    recalls = confusion.diagonal() / np.maximum(confusion.sum(1), 1)
    cost = count_cost(config.network)
    predictor = as_predictor(network, choices.flip)
    dtype = autocast_dtype(job.precision, device)
    seconds = [*(length.seconds for length in parts.watched), *(run.seconds for run in runs)]
    return RetrainResult(
        trial=job.winner.number,
        epochs=verdict.epochs,
        converged=verdict.converged,
        stopped_by=verdict.stopped_by,
        rule=ConvergenceRule(verdict.noise, verdict.threshold),
        watched=parts.watched,
        choices=choices,
        runs=runs,
        train_accuracy=_mean([run.train_accuracy for run in runs]),
        test_accuracy=accuracy_estimate([run.test.accuracy for run in runs], runs[0].test.images),
        per_class_accuracy=dict(zip(classes, recalls.tolist(), strict=True)),
        confusion=tuple(map(tuple, confusion.tolist())),
        calibration_error=_mean([run.test.calibration_error for run in runs]),
        test_images=runs[0].test.images,
        parameters=cost.parameters,
        flops=cost.flops,
        latency={batch: latency(predictor, batch, job.precision) for batch in LATENCY_BATCHES},
        latency_precision=str(dtype or torch.float32).removeprefix("torch."),
        device=describe_device(device),
        seconds=round(math.fsum(seconds), 1),
        plan=job.plan,
        folder=str(job.context.files.out / "best"),
    )


def accuracy_estimate(accuracies: Sequence[float], images: int) -> AccuracyEstimate:
    """Mean and standard deviation over seeds, with a 95 % interval.

    Of several seeds it is Student's, for the mean over all seeds that could have been; of one seed it is Wilson's, for
    the share of all such images that this very network would classify correctly.
    """
    mean, n = _mean(accuracies), len(accuracies)
    if n == 1:
        bounds = stats.binomtest(round(mean * images), images).proportion_ci(CONFIDENCE, method="wilson")
        return AccuracyEstimate(mean, None, 1, bounds.low, bounds.high, "images")
    std = float(np.std(accuracies, ddof=1))
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n)
    return AccuracyEstimate(mean, std, n, mean - margin, mean + margin, "seeds")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
