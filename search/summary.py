"""How a study stands at one moment, as types, and their JSON: ``summary.json`` and ``status --format json``.

Keys and nesting of the JSON are stable: scripts rely on them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from search.analysis.forecast import Forecast
from search.analysis.outcomes import TrialsOverhead, WorkersStartUp
from search.analysis.selection import CostLimits, RuleName
from search.analysis.starts import StartValue
from search.config.objective import CostName, Objective
from search.events import Budget
from search.results import Confirmation, RetrainProgress, RetrainResult, as_json

RETRAIN_KEYS = (
    "trial", "epochs", "converged", "stopped_by", "train_accuracy", "test_accuracy", "calibration_error", "parameters",
    "flops", "latency", "seconds", "chosen_by", "limits",
)  # fmt: skip
"""What the JSON holds of a retrain's result."""


@dataclass(frozen=True)
class DatasetSummary:
    """A study's images.

    Attributes:
        name, fingerprint: see `search.study.DatasetRecord`.
        fit, validation: numbers of images.
        fallback: digits taken because CIFAR-10 was not available.
    """

    name: str
    fingerprint: str
    fit: int
    validation: int
    fallback: bool


@dataclass(frozen=True, kw_only=True)
class BestTrial:
    """The trial that the search recommends.

    Attributes:
        trial: its number.
        val_accuracy: on the validation images.
        params: Optuna's parameters.
        parameters, flops: trainable values; operations of one image, forward.
        latency: seconds of a forward pass; None if the search does not measure it.
        chosen_by: the rule that makes it the best.
    """

    trial: int
    val_accuracy: float
    params: Mapping[str, Any]
    parameters: int
    flops: int
    latency: float | None = None
    chosen_by: RuleName


@dataclass(frozen=True)
class FrontPoint:
    """A trial on the front of accuracy and a cost."""

    trial: int
    val_accuracy: float
    cost: float


@dataclass(frozen=True)
class Front:
    """The front of accuracy and a cost, cheapest first."""

    cost: CostName
    points: tuple[FrontPoint, ...]


@dataclass(frozen=True)
class Summary:
    """How a study stands.

    Attributes:
        study: its name.
        objective, limits: what it searches for, and what its finale takes at most.
        dataset: its images.
        storage: URL without a password.
        budget: configurations requested, and what has become of them.
        best: the trial that the search recommends; None before one has run to its end.
        front: of a search with two objectives.
        confirm: None before it has begun.
        retrain: None before it is done.
        retrain_progress: of a retrain under way.
        holdout_reads: how often the test images were read.
        seconds: that commands have worked at the study.
        trial_seconds: that all trials took together.
        overhead, start_up, known_good: None while nothing is known.
        forecast: what the search has cost, and what it may still bring.
        space_hash: of the space and the trial length.
        environment: versions, commit and machine that created the study.
        warnings: sentences.
    """

    study: str
    objective: Objective
    limits: CostLimits
    dataset: DatasetSummary
    storage: str
    budget: Budget
    best: BestTrial | None
    front: Front | None
    confirm: Confirmation | None
    retrain: RetrainResult | None
    retrain_progress: RetrainProgress | None
    holdout_reads: int
    seconds: float
    trial_seconds: float
    overhead: TrialsOverhead | None
    start_up: WorkersStartUp | None
    known_good: StartValue | None
    forecast: Forecast
    space_hash: str
    environment: Mapping[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class RunningTrial:
    """A trial in training.

    Attributes:
        trial: its number.
        epoch: the last one that it reported; None before the first.
        accuracy: after that epoch.
        worker: who trains it; None if another program does.
    """

    trial: int
    epoch: int | None
    accuracy: float | None
    worker: str | None


@dataclass(frozen=True)
class WorkerStatus:
    """A worker that has not left by itself.

    Attributes:
        worker: its name, ``host:pid``.
        state: ``idle``, ``working``, ``silent`` or ``dead``.
        device: empty until it has one.
        slot: that it has leased.
        progress: of its trial: number, epoch, epochs, accuracy, images per second.
        start_up_seconds: until it began its first trial.
        last_heartbeat_seconds: since its last heartbeat.
    """

    worker: str
    state: str
    device: str
    slot: int | None
    progress: Mapping[str, Any] | None
    start_up_seconds: float | None
    last_heartbeat_seconds: float


@dataclass(frozen=True)
class WorkerOutput:
    """What a worker printed last.

    Attributes:
        worker: its name, ``host:pid``.
        state: as in `WorkerStatus`, or ``left``.
        farewell: why it left.
        place: where everything that it printed is; None if its launcher did not say.
        lines: the last ones.
    """

    worker: str
    state: str
    farewell: str | None
    place: str | None
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Status:
    """A study's summary, and who works at it; ``logs`` is None unless they were asked for."""

    summary: Summary
    running_trials: tuple[RunningTrial, ...]
    workers: tuple[WorkerStatus, ...]
    logs: tuple[WorkerOutput, ...] | None = None


def summary_as_json(summary: Summary) -> dict[str, Any]:
    """The content of ``summary.json``."""
    content: dict[str, Any] = {}
    for key, part in as_json(summary).items():
        content[key] = part
        if key == "budget":
            content["infeasible"] = part.pop("infeasible")
    content["limits"] = asdict(summary.limits)
    if summary.front:
        name = summary.front.cost
        content["front"] = [
            {"trial": point.trial, "val_accuracy": point.val_accuracy, name: point.cost}
            for point in summary.front.points
        ]
    if retrain := content["retrain"]:
        content["retrain"] = {key: retrain[key] for key in RETRAIN_KEYS if key in retrain}
    if gain := summary.forecast.gain:
        content["forecast"]["gain"]["unlikely"] = gain.unlikely
    return content


def status_as_json(status: Status) -> dict[str, Any]:
    """What ``status --format json`` prints."""
    content = {
        **summary_as_json(status.summary),
        "running_trials": as_json(status.running_trials),
        "workers": as_json(status.workers),
    }
    return content if status.logs is None else {**content, "logs": as_json(status.logs)}
