"""The results of a search's finale, as types: the confirmation, the retrain, and the parts of a retrain that are done.

They are stored as JSON: in the study's attributes, in ``summary.json`` and in ``metrics.json``. `as_json` writes it and
`from_json` reads it. A field of a dataclass is a key of the same name. A field whose default is None is left out of the
JSON while it is None: a trial has no latency, or an earlier version did not store it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from search.analysis.selection import CostLimits, RuleName

Result = TypeVar("Result")

StoppedBy = Literal["noise", "max epochs", "time"]
"""What ends the lengthening of the trainings (`search.finale.convergence`)."""

LossPoint = tuple[int, float]
"""A step's number, from 0, and the mean loss from it to the next point, in nats."""


@dataclass(frozen=True)
class Difference:
    """A difference of two means with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ConfirmedConfiguration:
    """A configuration of the search that was trained again over fresh seeds.

    Attributes:
        trial, params: its number in the search; Optuna's parameters.
        parameters, flops: trainable values; operations of one image, forward.
        latency: seconds of a forward pass; None if the search did not measure it.
        search_accuracy: its accuracy in the search.
        accuracies: on the validation images, by seed.
        mean, std, n: of these; None for too few; how many there are.
        behind: how far its mean is below the best one; None for the best, and if the noise is not known.
    """

    trial: int
    params: Mapping[str, Any]
    parameters: int
    flops: int
    latency: float | None = None
    search_accuracy: float | None
    accuracies: Mapping[int, float]
    mean: float | None
    std: float | None
    n: int
    behind: Difference | None


@dataclass(frozen=True)
class Optimism:
    """By how much the search's best score flatters its configuration: ``difference`` is score less confirmed mean."""

    trial: int
    score: float
    confirmed: float
    difference: float


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """How the confirmation of a search stands.

    Attributes:
        study: its name.
        chosen_by, limits: how its configurations were chosen (`search.analysis.selection`).
        unconfirmed: trials among them without any training requested, as the limits have changed since.
        runs, done: trainings in all, and those that have ended.
        seeds: of every configuration.
        configurations: best mean first.
        noise, noise_of_difference: see `search.finale.comparison.Comparison`.
        noise_freedom: degrees of freedom of the noise.
        best_mean, winner: trials of the search; None if nothing has a score.
        tie, tied: whether there are several trials within one standard error of the best mean; these.
        optimism: of the search's choice; None while its configuration has no score.
    """

    study: str
    chosen_by: RuleName
    limits: CostLimits
    unconfirmed: tuple[int, ...]
    runs: int
    done: int
    seeds: tuple[int, ...]
    configurations: tuple[ConfirmedConfiguration, ...]
    noise: float | None
    noise_freedom: int | None
    noise_of_difference: float | None
    best_mean: int | None
    winner: int | None
    tie: bool
    tied: tuple[int, ...]
    optimism: Optimism | None


@dataclass(frozen=True)
class LengthLimits:
    """What bounds the trainings of a retrain.

    Attributes:
        first: epochs of the first training.
        longest: epochs that no training may exceed.
        seconds: for all trainings together; None: as long as they take.
        finals: final trainings, each of the length taken.
        final_share: seconds of a final training's epoch over those of a length training, which sees fewer images.
    """

    first: int
    longest: int
    seconds: float | None
    finals: int
    final_share: float


@dataclass(frozen=True)
class RetrainPlan:
    """What the result of a retrain depends on; ``seed``: of the first training; ``images``: the split's fingerprint."""

    trial: int
    params: Mapping[str, Any]
    seed: int
    limits: LengthLimits
    images: str


@dataclass(frozen=True)
class RetrainProgress:
    """Where a retrain is: which training, in words, its epoch, and the seconds that are left, at least."""

    what: str
    epoch: int
    epochs: int
    seed: int
    eta_seconds: int


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """An epoch of a training: see `model.result.EpochResult`. Final trainings have no validation images."""

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    images_per_second: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class Slope:
    """Slope of a curve's last fifth, in accuracy per epoch, with its 95 % interval."""

    per_epoch: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class LengthTraining:
    """A training on the fit images alone, which shows whether its length is enough.

    Attributes:
        gain: of accuracy over the training before it; None for the first, and until it is judged.
        validation_accuracy, averaged: at the end, with the last weights and with averaged ones.
        flip, averaged_flip: both with flip test-time augmentation; None if mirrored images mean something else.
        slope: of the end of its curve; None for fewer than three epochs.
        curve, losses: a point per epoch; the steps, thinned.
    """

    epochs: int
    seed: int
    gain: float | None
    validation_accuracy: float
    averaged: float
    flip: float | None = None
    averaged_flip: float | None = None
    slope: Slope | None
    seconds: float
    curve: tuple[CurvePoint, ...]
    losses: tuple[LossPoint, ...]


@dataclass(frozen=True)
class HoldoutQuality:
    """What a network is worth on the test images (`model.quality.Quality`), and when these were read, as ISO 8601."""

    accuracy: float
    loss: float
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    calibration_error: float
    images: int
    read_at: str


@dataclass(frozen=True)
class FinalTraining:
    """A training on all training images, and its one test.

    Attributes:
        train_accuracy, train_loss: of the network that is tested, without augmentation.
        curve, losses: a point per epoch, without validation; the steps, thinned.
    """

    seed: int
    train_accuracy: float
    train_loss: float
    seconds: float
    curve: tuple[CurvePoint, ...]
    losses: tuple[LossPoint, ...]
    test: HoldoutQuality


@dataclass(frozen=True)
class RetrainParts:
    """The length and final trainings of a retrain that are done; ``first``: epochs of the first one."""

    plan: RetrainPlan
    first: int
    watched: tuple[LengthTraining, ...] = ()
    runs: tuple[FinalTraining, ...] = ()


@dataclass(frozen=True)
class ConvergenceRule:
    """The deviation between seeds that a retrain expects, and the gain that is no more than noise."""

    noise: float
    threshold: float


@dataclass(frozen=True)
class InferenceChoices:
    """How the final network predicts: with flip test-time augmentation, with averaged weights."""

    flip: bool
    averaging: bool


@dataclass(frozen=True)
class AccuracyEstimate:
    """Mean and deviation of ``n`` accuracies, with a 95 % interval over ``seeds``, or for one seed over ``images``."""

    mean: float
    std: float | None
    n: int
    low: float | None = None
    high: float | None = None
    interval: Literal["seeds", "images"] | None = None


@dataclass(frozen=True, kw_only=True)
class RetrainResult:
    """The result of a retrain. A field with a default is missing in results of earlier versions.

    Attributes:
        trial: the winner.
        epochs: of the final trainings.
        converged: whether the last doubling of the length gained no more than noise; None if there was no doubling.
        stopped_by: what ended the lengthening.
        rule: that judged it.
        watched: length trainings, the shortest first.
        choices: made on the validation images.
        runs: final trainings.
        train_accuracy, test_accuracy, calibration_error: over the final trainings.
        per_class_accuracy: by class, all final trainings together.
        confusion: numbers of test images, a row for each true class, all final trainings together.
        test_images: their number.
        parameters, flops: trainable values; operations of one image, forward.
        latency, latency_precision: median seconds of a forward pass, by batch size; of these passes.
        device: in words.
        seconds: of all trainings.
        plan, folder: that it followed; of the saved model.
        chosen_by, limits: how the winner was chosen (`search.analysis.selection`).
    """

    trial: int
    epochs: int
    converged: bool | None
    stopped_by: StoppedBy | None = None
    rule: ConvergenceRule | None = None
    watched: tuple[LengthTraining, ...] = ()
    choices: InferenceChoices | None = None
    runs: tuple[FinalTraining, ...] = ()
    train_accuracy: float
    test_accuracy: AccuracyEstimate
    per_class_accuracy: Mapping[str, float] | None = None
    confusion: tuple[tuple[int, ...], ...] = ()
    calibration_error: float | None = None
    test_images: int | None = None
    parameters: int
    flops: int
    latency: Mapping[int, float] | None = None
    latency_precision: str | None = None
    device: str | None = None
    seconds: float
    plan: RetrainPlan | None = None
    folder: str | None = None
    chosen_by: RuleName | None = None
    limits: CostLimits | None = None


def as_json(value: object) -> Any:
    """A result as JSON holds it: objects, lists and plain values; see this module's docstring for absent keys."""
    if is_dataclass(value):
        parts = ((field, getattr(value, field.name)) for field in fields(value))
        return {field.name: as_json(part) for field, part in parts if part is not None or field.default is not None}
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return value


def from_json(kind: type[Result], content: object) -> Result:
    """A result of some type from what `as_json` made of it; unknown keys are ignored.

    Raises:
        pydantic.ValidationError: it is something else.
    """
    result: Result = _adapter(kind).validate_python(content)  # type: ignore[arg-type]  # a class is hashable
    return result


def optional_from_json(kind: type[Result], content: object) -> Result | None:
    """The same; None for None."""
    return None if content is None else from_json(kind, content)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
