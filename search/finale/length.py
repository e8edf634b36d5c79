"""Length trainings: the winner trained on the fit images alone, each time twice as long, until longer does not help."""

from dataclasses import replace

from search.events import Note
from search.finale.convergence import TrainedLength, Verdict, judge_length, last_slope
from search.finale.job import RetrainJob, assess_network, curve_of, losses_of, train_with_progress
from search.results import InferenceChoices, LengthTraining, RetrainParts

REASONS = {
    "noise": "longer no longer helps by more than noise",
    "max epochs": "the longest that is allowed",
    "time": "what the study's minutes allow; longer would probably help",
}
"""Why a training is no longer, in words."""


def find_length(job: RetrainJob, parts: RetrainParts) -> tuple[RetrainParts, Verdict]:
    """Train until the rule of `search.finale.convergence` says enough.

    Returns:
        the parts with all length trainings, and the final verdict.
    """
    if not parts.watched:
        parts = _with_training(job, parts, parts.first)
    while True:
        watched = parts.watched
        lengths = [TrainedLength(row.epochs, row.validation_accuracy, row.seconds) for row in watched]
        verdict = judge_length(lengths, job.noise, job.plan.limits)
        if len(watched) > 1:
            gain = lengths[-1].accuracy - lengths[-2].accuracy
            parts = replace(parts, watched=(*watched[:-1], replace(watched[-1], gain=gain)))
        if verdict.next is None:
            assert verdict.stopped_by is not None
            job.context.show(Note(f"retrain: {verdict.epochs} epochs: {REASONS[verdict.stopped_by]}"))
            return parts, verdict
        parts = _with_training(job, parts, verdict.next)


def _with_training(job: RetrainJob, parts: RetrainParts, epochs: int) -> RetrainParts:
    """The parts with one more length training, stored."""
    longer = replace(parts, watched=(*parts.watched, _train(job, epochs)))
    job.store(longer)
    return longer


def _train(job: RetrainJob, epochs: int) -> LengthTraining:
    split, limits = job.context.split, job.plan.limits
    config = job.config(epochs, 0)
    to_come = limits.finals * limits.final_share
    trained = train_with_progress(job, config, split, f"watch-{epochs}", "on the fit images", to_come)
    forms = {"validation_accuracy": (trained.network, False), "averaged": (trained.average, False)}
    if split.mirror:
        forms |= {"flip": (trained.network, True), "averaged_flip": (trained.average, True)}
    accuracies = {
        name: assess_network(job, network, flip, split.validation_images, split.validation_labels).accuracy
        for name, (network, flip) in forms.items()
    }
    return LengthTraining(
        epochs=epochs,
        seed=config.fit.seed,
        gain=None,
        **accuracies,
        slope=last_slope([row["validation_accuracy"] for row in trained.curve]),
        seconds=round(trained.seconds, 1),
        curve=curve_of(trained),
        losses=losses_of(trained),
    )


def inference_choices(training: LengthTraining) -> InferenceChoices:
    """Averaged weights and flip test-time augmentation, each if it pays on the validation images."""
    accuracies = {
        InferenceChoices(flip=False, averaging=False): training.validation_accuracy,
        InferenceChoices(flip=True, averaging=False): training.flip,
        InferenceChoices(flip=False, averaging=True): training.averaged,
        InferenceChoices(flip=True, averaging=True): training.averaged_flip,
    }
    measured = {choices: accuracy for choices, accuracy in accuracies.items() if accuracy is not None}
    return max(measured, key=lambda choices: measured[choices])  # of equals the plainest
