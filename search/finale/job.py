"""What the trainings of a retrain share, and one of them with its checkpoint and its progress."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial
from torch import Tensor

from data.split import Split
from model.config import Precision
from model.network import BlockNetwork
from model.quality import Quality, as_predictor, assess
from model.result import EpochResult
from search.artifacts.mirror import Mirror
from search.attributes import IMAGES_PER_SECOND, RETRAIN_PARTS, RETRAIN_PROGRESS
from search.config.settings import TrialConfig, trial_config
from search.config.space import settings_of
from search.events import Note, RetrainEpoch, RetrainStarted, Show
from search.finale.convergence import SeedDeviation
from search.finale.train import Trained, train
from search.results import CurvePoint, LossPoint, RetrainParts, RetrainPlan, RetrainProgress, as_json, from_json
from search.study import StudyRecord


@dataclass(frozen=True)
class RetrainContext:
    """A search at its retrain.

    Attributes:
        study: the search.
        record: of it.
        split: on the device to train on.
        data_dir: folder of the test images.
        files: the study's outputs.
        show: gets events.
    """

    study: optuna.Study
    record: StudyRecord
    split: Split
    data_dir: Path
    files: Mirror
    show: Show


@dataclass(frozen=True)
class RetrainJob:
    """A retrain of one trial by one plan.

    Attributes:
        context: the search.
        winner: the trial.
        plan: what the result depends on.
        noise: between seeds.
    """

    context: RetrainContext
    winner: FrozenTrial
    plan: RetrainPlan
    noise: SeedDeviation

    @property
    def precision(self) -> Precision:
        """That of the winner's trial."""
        return settings_of(self.context.record.config.space, self.winner.params).precision

    def config(self, epochs: int, number: int) -> TrialConfig:
        """The winner's, with another length and its ``number``-th seed; 0 is that of the length trainings."""
        record = self.context.record
        settings = settings_of(record.config.space, self.winner.params)
        return trial_config(settings, epochs, self.plan.seed + number, len(record.dataset.classes))

    def store(self, parts: RetrainParts) -> None:
        """Note what is done, so that it is not done again."""
        self.context.study.set_user_attr(RETRAIN_PARTS, as_json(parts))


def checkpoint_folder(files: Mirror) -> Path:
    """Holds the checkpoints of a study's trainings."""
    return files.out / "checkpoints"


def checkpoint_path(files: Mirror, name: str) -> Path:
    """The checkpoint of a retrain's training."""
    return checkpoint_folder(files) / f"retrain-{name}.safetensors"


def assess_network(job: RetrainJob, network: BlockNetwork, flip: bool, images: Tensor, labels: Tensor) -> Quality:
    """What a network is worth on images; ``flip``: with test-time augmentation."""
    return assess(as_predictor(network, flip), images, labels, job.precision, len(job.context.record.dataset.classes))


def curve_of(trained: Trained) -> tuple[CurvePoint, ...]:
    """A point per epoch."""
    return from_json(tuple[CurvePoint, ...], trained.curve)


def losses_of(trained: Trained) -> tuple[LossPoint, ...]:
    """Of the steps, thinned."""
    return from_json(tuple[LossPoint, ...], trained.losses)


def train_with_progress(
    job: RetrainJob, config: TrialConfig, split: Split, name: str, text: str, to_come: float
) -> Trained:
    """Train, or go on after a kill, and show and store how far it is.

    Args:
        job: what all share.
        config: of this training.
        split: its images.
        name: of its checkpoint.
        text: what it is, for people.
        to_come: trainings of this length that will follow, at least.
    """
    context = job.context
    path = checkpoint_path(context.files, name)
    expected = config.fit.epochs * len(split.fit_labels) / job.winner.user_attrs[IMAGES_PER_SECOND]

    def warn(text: str) -> None:
        context.show(Note(f"warning: {text}"))

    return train(config, split, path, context.files, expected, _progress(job, config, split, text, to_come), warn)


def _progress(
    job: RetrainJob, config: TrialConfig, split: Split, text: str, to_come: float
) -> Callable[[EpochResult], None]:
    """What shows and stores every epoch; before the first one, that the training has begun."""
    context, epochs = job.context, config.fit.epochs
    started = RetrainStarted(job.winner.number, epochs, len(split.fit_labels), text)
    begun = False

    def show_epoch(result: EpochResult) -> None:
        nonlocal begun
        if not begun:
            context.show(started)
            begun = True
        left = result.seconds * (epochs - result.epoch + to_come * epochs)
        context.show(RetrainEpoch(started, result, left, validated=split is context.split))
        progress = RetrainProgress(text, result.epoch, epochs, config.fit.seed, round(left))
        context.study.set_user_attr(RETRAIN_PROGRESS, as_json(progress))

    return show_epoch
