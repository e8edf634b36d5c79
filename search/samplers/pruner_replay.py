"""What other pruners would have made of a study: time saved, and how many of the best they would have stopped.

The study's configurations come again in their order, with the accuracies that they had after each epoch. How a trial
that was stopped would have gone on is not known; it is drawn, epoch by epoch, from a regression on those that went on
(`search.analysis.extrapolation`), many times over, so what is told of the best has an interval. What a sampler would
have proposed after another pruner's decisions is not replayed: these are the configurations that there were.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
)
from optuna.trial import FrozenTrial, TrialState

from data.errors import UserError
from search.analysis.extrapolation import regression
from search.analysis.outcomes import end_accuracy, epoch_seconds, outcome, validation_curve
from search.attributes import FAULT
from search.config.objective import second_objective
from search.config.study_file import StudyConfig
from search.samplers.pruner import build_pruner

LEAST = 5
"""Trials that must have run to their end."""
OWN = "this study's"
NONE = "none"


@dataclass(frozen=True)
class Trace:
    """What is known of one configuration's training.

    Attributes:
        accuracy: after each epoch, as far as it went.
        epoch: seconds of one.
    """

    accuracy: tuple[float, ...]
    epoch: float


@dataclass(frozen=True)
class Estimate:
    """A mean with the middle 95 % of the draws."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Replayed:
    """What one pruner would have done.

    Attributes:
        pruner: which.
        saved: share of the training time without pruning.
        stopped: trials.
        best_stopped: of the best ``top``.
        lost: accuracy of the best trial, less that of the best one which it would have left.
    """

    pruner: str
    saved: Estimate
    stopped: Estimate
    best_stopped: Estimate
    lost: Estimate


@dataclass(frozen=True)
class Replay:
    """A study replayed.

    Attributes:
        trials: configurations. whole: of these, trained to their end.
        epochs: of a whole training.
        top: configurations that count as the best.
        draws: of what is not known; 1 where all is.
        pruners: what each would have done.
    """

    trials: int
    whole: int
    epochs: int
    top: int
    draws: int
    pruners: tuple[Replayed, ...]


def replay(trials: Sequence[FrozenTrial], config: StudyConfig, draws: int, seed: int = 0) -> Replay:
    """Replay a study under every pruner.

    Args:
        trials: of the study, in their order.
        config: of the study.
        draws: how often to draw what is not known.
        seed: of the draws.

    Raises:
        UserError: the study has two objectives, or too few of its trials ran to their end.
    """
    if second_objective(config.objective) is not None:
        raise UserError(f"a search for {config.objective} stops nothing early, so there is no pruner to replay")
    epochs = config.trial.epochs
    traces = [trace for trial in trials if (trace := _trace(trial, epochs)) is not None]
    whole = [trace for trace in traces if len(trace.accuracy) == epochs]
    if len(whole) < LEAST:
        raise UserError(f"{len(whole)} trials ran to their end; a replay needs {LEAST}")
    rng = np.random.default_rng(seed)
    rounds = draws if len(whole) < len(traces) else 1
    top = max(1, config.confirm.configurations)
    results: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in alternatives(config)}
    for _ in range(rounds):
        full = [_completed(trace, whole, rng, epochs) for trace in traces]
        for name, make in alternatives(config).items():
            results[name].append(_under(make(), full, top))
    return Replay(
        len(traces),
        len(whole),
        epochs,
        top,
        rounds,
        tuple(
            Replayed(name, *(_estimate(column) for column in zip(*rows, strict=True))) for name, rows in results.items()
        ),
    )


def alternatives(config: StudyConfig) -> Mapping[str, Callable[[], BasePruner]]:
    """Every pruner that is tried, by name."""
    epochs = config.trial.epochs
    half = epochs // 2
    return {
        NONE: NopPruner,
        OWN: lambda: build_pruner(config),
        f"percentile 90 after epoch {half}": lambda: PercentilePruner(90.0, 5, half),
        f"percentile 75 after epoch {half}": lambda: PercentilePruner(75.0, 5, half),
        "median": MedianPruner,
        "successive halving": SuccessiveHalvingPruner,
        "hyperband": lambda: HyperbandPruner(max_resource=epochs),
    }


def _trace(trial: FrozenTrial, epochs: int) -> Trace | None:
    """What is known of a trial; None where it was neither trained to its end nor stopped by the pruner."""
    accuracy = tuple(value for _, value in sorted(validation_curve(trial).items()))
    ended = end_accuracy(trial) is not None and len(accuracy) == epochs
    stopped = outcome(trial) == "pruned" and FAULT not in trial.user_attrs and 0 < len(accuracy) < epochs
    if not (ended or stopped):
        return None
    return Trace(accuracy, epoch_seconds(trial) or 1.0)


def _completed(trace: Trace, whole: Sequence[Trace], rng: np.random.Generator, epochs: int) -> Trace:
    """A training as it may have gone on."""
    accuracy = list(trace.accuracy)
    while len(accuracy) < epochs:
        epoch = len(accuracy)
        pairs = [(other.accuracy[epoch - 1], other.accuracy[epoch]) for other in whole]
        accuracy.append(min(1.0, max(0.0, regression(pairs).at(accuracy[-1]).draw(rng))))
    return Trace(tuple(accuracy), trace.epoch)


def _under(pruner: BasePruner, traces: Sequence[Trace], top: int) -> tuple[float, float, float, float]:
    """Share of the time saved, trials stopped, of the best ``top`` stopped, accuracy lost."""
    study = optuna.create_study(study_name="replay", direction="maximize", pruner=pruner)
    spent, left = 0.0, []
    for place, trace in enumerate(traces):
        trial = study.ask()
        epochs = len(trace.accuracy)
        for epoch, accuracy in enumerate(trace.accuracy, 1):
            trial.report(accuracy, epoch)
            if epoch < epochs and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                spent += epoch * trace.epoch
                break
        else:
            study.tell(trial, trace.accuracy[-1])
            spent += epochs * trace.epoch
            left.append(place)
    ranked = sorted(range(len(traces)), key=lambda place: (-traces[place].accuracy[-1], place))
    without = sum(len(trace.accuracy) * trace.epoch for trace in traces)
    kept = max((traces[place].accuracy[-1] for place in left), default=0.0)
    return (
        1 - spent / without,
        float(len(traces) - len(left)),
        float(len(set(ranked[:top]) - set(left))),
        traces[ranked[0]].accuracy[-1] - kept,
    )


def _estimate(values: Sequence[float]) -> Estimate:
    low, high = np.percentile(values, (2.5, 97.5))
    return Estimate(float(np.mean(values)), float(low), float(high))
