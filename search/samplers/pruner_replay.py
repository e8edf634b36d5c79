"""What other pruners would have done to a study: time saved, and how many of the best trials stopped.

The study's configurations are replayed in their order, with the accuracies that they had after each epoch. How a
stopped trial would have gone on is not known. It is drawn, epoch by epoch, from a regression on those that went on
(`search.analysis.extrapolation`), many times, so every result has an interval. What a sampler would have proposed after
another pruner's decisions is not replayed: the configurations are those of the study.
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

MIN_WHOLE = 5
"""Trials that must have run to their end."""
OWN_PRUNER = "this study's"
NO_PRUNER = "none"


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
class PrunerReplay:
    """What one pruner would have done.

    Attributes:
        pruner: its name.
        saved: share of the training time without pruning.
        stopped: trials.
        best_stopped: of the best ``top``.
        lost: accuracy of the best trial, less that of the best trial that it would not have stopped.
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
        draws: of what is not known; 1 if no trial was stopped.
        pruners: what each would have done.
    """

    trials: int
    whole: int
    epochs: int
    top: int
    draws: int
    pruners: tuple[PrunerReplay, ...]


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
    traces = [trace for trial in trials if (trace := _trace_of(trial, epochs)) is not None]
    whole = [trace for trace in traces if len(trace.accuracy) == epochs]
    if len(whole) < MIN_WHOLE:
        raise UserError(f"{len(whole)} trials ran to their end; a replay needs {MIN_WHOLE}")
    rng = np.random.default_rng(seed)
    rounds = draws if len(whole) < len(traces) else 1
    top = max(1, config.confirm.configurations)
    pruners = pruners_to_replay(config)
    results: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in pruners}
    for _ in range(rounds):
        completed = [_completed(trace, whole, rng, epochs) for trace in traces]
        for name, make_pruner in pruners.items():
            results[name].append(_replayed(make_pruner(), completed, top))
    return Replay(
        len(traces),
        len(whole),
        epochs,
        top,
        rounds,
        tuple(
            PrunerReplay(name, *(_estimate(column) for column in zip(*rows, strict=True)))
            for name, rows in results.items()
        ),
    )


def pruners_to_replay(config: StudyConfig) -> Mapping[str, Callable[[], BasePruner]]:
    """Every pruner that is replayed, by name."""
    epochs = config.trial.epochs
    half = epochs // 2
    return {
        NO_PRUNER: NopPruner,
        OWN_PRUNER: lambda: build_pruner(config),
        f"percentile 90 after epoch {half}": lambda: PercentilePruner(90.0, 5, half),
        f"percentile 75 after epoch {half}": lambda: PercentilePruner(75.0, 5, half),
        "median": MedianPruner,
        "successive halving": SuccessiveHalvingPruner,
        "hyperband": lambda: HyperbandPruner(max_resource=epochs),
    }


def _trace_of(trial: FrozenTrial, epochs: int) -> Trace | None:
    """What is known of a trial; None if it was neither trained to its end nor stopped by the pruner."""
    accuracy = tuple(value for _, value in sorted(validation_curve(trial).items()))
    ended = end_accuracy(trial) is not None and len(accuracy) == epochs
    stopped = outcome(trial) == "pruned" and FAULT not in trial.user_attrs and 0 < len(accuracy) < epochs
    if not (ended or stopped):
        return None
    return Trace(accuracy, epoch_seconds(trial) or 1.0)


def _completed(trace: Trace, whole: Sequence[Trace], rng: np.random.Generator, epochs: int) -> Trace:
    """A training to its end, with drawn accuracies after the epoch at which it was stopped."""
    accuracy = list(trace.accuracy)
    while len(accuracy) < epochs:
        epoch = len(accuracy)
        pairs = [(other.accuracy[epoch - 1], other.accuracy[epoch]) for other in whole]
        accuracy.append(min(1.0, max(0.0, regression(pairs).at(accuracy[-1]).draw(rng))))
    return Trace(tuple(accuracy), trace.epoch)


def _replayed(pruner: BasePruner, traces: Sequence[Trace], top: int) -> tuple[float, float, float, float]:
    """Share of the time saved, trials stopped, of the best ``top`` stopped, accuracy lost."""
    study = optuna.create_study(study_name="replay", direction="maximize", pruner=pruner)
    seconds, finished = 0.0, []
    for index, trace in enumerate(traces):
        trial = study.ask()
        epochs = len(trace.accuracy)
        for epoch, accuracy in enumerate(trace.accuracy, 1):
            trial.report(accuracy, epoch)
            if epoch < epochs and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                seconds += epoch * trace.epoch
                break
        else:
            study.tell(trial, trace.accuracy[-1])
            seconds += epochs * trace.epoch
            finished.append(index)
    ranked = sorted(range(len(traces)), key=lambda index: (-traces[index].accuracy[-1], index))
    seconds_unpruned = sum(len(trace.accuracy) * trace.epoch for trace in traces)
    best_finished = max((traces[index].accuracy[-1] for index in finished), default=0.0)
    return (
        1 - seconds / seconds_unpruned,
        float(len(traces) - len(finished)),
        float(len(set(ranked[:top]) - set(finished))),
        traces[ranked[0]].accuracy[-1] - best_finished,
    )


def _estimate(values: Sequence[float]) -> Estimate:
    low, high = np.percentile(values, (2.5, 97.5))
    return Estimate(float(np.mean(values)), float(low), float(high))
