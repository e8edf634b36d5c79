"""Where a training that has begun will end: a regression on those that ran to their end.

The accuracy at the end is regressed on the accuracy so far: Bayesian linear regression (Bishop, Pattern Recognition and
Machine Learning, 2006, 3.3; with unknown noise the prediction is Student's t). A regression on earlier trials is
simpler and better than a parametric form for each curve (Baker et al., Accelerating neural architecture search using
performance prediction, arXiv:1705.10823).

Trials that were stopped have no end to learn from. That does not bias the regression: whether a trial was stopped
depends on the accuracies so far, which the regression conditions on.

A pruner that used this (stop a trial whose chance to end among the best is small; Domhan et al., IJCAI 2015) stopped
far more trials than percentiles do and found no better configurations (benchmarks/results/replay); it was dropped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from search.analysis.noise import SeedNoise, seed_noise
from search.analysis.outcomes import end_accuracy
from search.attributes import FAULT

PRIOR = SeedNoise(std=0.02, freedom=2)
"""Before anything is known, ends are expected to differ by two points from the regression; this counts as much as two
trials. Once a search has measured the noise between its seeds, that is the prior instead."""
PRIOR_SLOPE = 1.0
"""Standard deviation of the slope around one: a point more early is about a point more at the end."""


@dataclass(frozen=True)
class Extrapolation:
    """Student's t distribution of an accuracy."""

    mean: float
    scale: float
    freedom: float

    def draw(self, rng: np.random.Generator) -> float:
        """One value."""
        return float(self.mean + self.scale * rng.standard_t(self.freedom))


@dataclass(frozen=True)
class Regression:
    """Accuracy at a later epoch as a linear function of the accuracy at an earlier one.

    Attributes:
        centre: mean accuracy at the earlier epoch.
        gain: mean difference between the later and the earlier accuracy.
        slope: of that difference, for each unit of accuracy at the earlier epoch.
        slope_weight: sum of squares that the slope's uncertainty is divided by.
        variance: of single trainings around the line.
        count: trainings that it was fitted to.
        freedom: degrees of freedom.
    """

    centre: float
    gain: float
    slope: float
    slope_weight: float
    variance: float
    count: int
    freedom: float

    def at(self, accuracy: float) -> Extrapolation:
        """Where a training with this accuracy at the earlier epoch will be at the later one."""
        distance = accuracy - self.centre
        scale = math.sqrt(self.variance * (1 + 1 / self.count + distance**2 / self.slope_weight))
        return Extrapolation(accuracy + self.gain + self.slope * distance, scale, self.freedom)


def regression(known: Sequence[tuple[float, float]], prior: SeedNoise = PRIOR) -> Regression:
    """Fit the line to trainings.

    Args:
        known: accuracy of each training at the earlier and at the later epoch; one training or more.
        prior: how far ends are expected to be from the line, before any is known.
    """
    early, late = np.array(known, dtype=np.float64).T
    centre = float(early.mean())
    # The gain as a function of the distance from the mean: intercept and slope are then independent.
    gains, distances = late - early, early - centre
    prior_weight = (PRIOR.std / PRIOR_SLOPE) ** 2
    slope_weight = float(distances @ distances) + prior_weight
    slope = float(distances @ gains) / slope_weight
    residuals = gains - gains.mean() - slope * distances
    freedom = len(gains) - 1 + prior.freedom
    squares = float(residuals @ residuals) + slope**2 * prior_weight + prior.freedom * prior.std**2
    return Regression(centre, float(gains.mean()), slope, slope_weight, squares / freedom, len(gains), freedom)


@dataclass(frozen=True)
class LikelyEnds:
    """Where trainings ended or are heading, in the order of their trials' numbers.

    Attributes:
        numbers: of the trials.
        params: of each.
        accuracies: at the end of training, measured or predicted.
        variances: of the predictions; 0 for measured ends.
    """

    numbers: list[int]
    params: list[Mapping[str, Any]]
    accuracies: list[float]
    variances: list[float]


def likely_ends(trials: Sequence[FrozenTrial], sign: int = 1) -> LikelyEnds:
    """What is known of the ends of trainings; trials without any accuracy are left out.

    A configuration that diverged or did not fit into memory counts as much as the worst one that ran to its end.

    Args:
        trials: in any state.
        sign: multiplies every accuracy; -1 if less is better.
    """
    worst = min((sign * end for trial in trials if (end := end_accuracy(trial)) is not None), default=None)
    regressions: dict[int, Regression | None] = {}
    prior = seed_noise(trials) or PRIOR

    def from_epoch(epoch: int) -> Regression | None:
        if epoch not in regressions:
            pairs = _pairs(trials, epoch, sign)
            regressions[epoch] = regression(pairs, prior) if len(pairs) > 1 else None
        return regressions[epoch]

    ends = LikelyEnds([], [], [], [])
    for trial in sorted(trials, key=lambda trial: trial.number):
        if (measured := end_accuracy(trial)) is not None:
            end, variance = sign * measured, 0.0
        elif trial.state == TrialState.PRUNED and FAULT in trial.user_attrs and worst is not None:
            end, variance = worst, 0.0
        elif (
            trial.state in (TrialState.PRUNED, TrialState.RUNNING)
            and (epoch := trial.last_step) is not None
            and (line := from_epoch(epoch)) is not None
        ):
            prediction = line.at(sign * trial.intermediate_values[epoch])
            end, variance = prediction.mean, prediction.scale**2
        else:
            continue
        ends.numbers.append(trial.number)
        ends.params.append(trial.params)
        ends.accuracies.append(end)
        ends.variances.append(variance)
    return ends


def _pairs(trials: Sequence[FrozenTrial], epoch: int, sign: int) -> list[tuple[float, float]]:
    """Accuracy after an epoch and at the end, of those that have both."""
    return [
        (sign * trial.intermediate_values[epoch], sign * end)
        for trial in trials
        if epoch in trial.intermediate_values and (end := end_accuracy(trial)) is not None
    ]
