"""Where a training that has begun will end: a regression on those that went to their end.

The accuracy at the end is regressed on the accuracy so far: Bayesian linear regression (Bishop, Pattern Recognition and
Machine Learning, 2006, 3.3; with unknown noise the prediction is Student's t). A regression on earlier trials in the
place of one curve's own parametric form is simpler and better (Baker et al., Accelerating neural architecture search
using performance prediction, arXiv:1705.10823).

Trials that were stopped have no end to learn from. That does not bias the regression: whether a trial was stopped was
decided by what it is a regression on.

A pruner that went by this (stop where the chance to end among the best is small; Domhan et al., IJCAI 2015) stopped far
more trials than percentiles do and found no better configurations for it (benchmarks/results/replay); it was dropped.
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
"""Before anything is known, ends are expected to differ by two points from what the regression says; this counts as
much as two trials. Where a search has measured the noise between its seeds, that takes its place."""
PRIOR_SLOPE = 1.0
"""Standard deviation of the slope around one: a point more now is about a point more at the end."""


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
        gain: mean difference of the later one.
        slope: of the difference, an accuracy.
        slope_weight: sum of squares that the slope's uncertainty is divided by.
        variance: of single trainings around the line.
        count: trainings that it is from.
        freedom: degrees of freedom.
    """

    centre: float
    gain: float
    slope: float
    slope_weight: float
    variance: float
    count: int
    freedom: float

    def at(self, now: float) -> Extrapolation:
        """Where a training that has this accuracy at the earlier epoch will be at the later one."""
        distance = now - self.centre
        scale = math.sqrt(self.variance * (1 + 1 / self.count + distance**2 / self.slope_weight))
        return Extrapolation(now + self.gain + self.slope * distance, scale, self.freedom)


def regression(known: Sequence[tuple[float, float]], prior: SeedNoise = PRIOR) -> Regression:
    """Learn from trainings how they go on.

    Args:
        known: of each training its accuracy at the earlier and at the later epoch; one or more.
        prior: how far ends are expected to be from what the regression says, before it has seen any.
    """
    early, late = np.array(known, dtype=np.float64).T
    centre = float(early.mean())
    # What is gained, as a function of the distance from the mean: intercept and slope are then independent.
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
    """Where trainings ended or are heading, in the order of their beginning.

    Attributes:
        numbers: of the trials.
        params: of each.
        accuracies: at the end of training, measured or predicted.
        variances: of the predictions; 0 where it was measured.
    """

    numbers: list[int]
    params: list[Mapping[str, Any]]
    accuracies: list[float]
    variances: list[float]


def likely_ends(trials: Sequence[FrozenTrial], sign: int = 1) -> LikelyEnds:
    """What is known of the ends of trainings; trials of which nothing is known are left out.

    A configuration that diverged or did not fit counts as no better than the worst one that went to its end.

    Args:
        trials: in any state.
        sign: -1 where less is better: accuracies are told with it.
    """
    worst = min((sign * end for one in trials if (end := end_accuracy(one)) is not None), default=None)
    regressions: dict[int, Regression | None] = {}
    prior = seed_noise(trials) or PRIOR

    def from_epoch(epoch: int) -> Regression | None:
        if epoch not in regressions:
            pairs = _pairs(trials, epoch, sign)
            regressions[epoch] = regression(pairs, prior) if len(pairs) > 1 else None
        return regressions[epoch]

    found = LikelyEnds([], [], [], [])
    for one in sorted(trials, key=lambda trial: trial.number):
        if (measured := end_accuracy(one)) is not None:
            end, variance = sign * measured, 0.0
        elif one.state == TrialState.PRUNED and FAULT in one.user_attrs and worst is not None:
            end, variance = worst, 0.0
        elif (
            one.state in (TrialState.PRUNED, TrialState.RUNNING)
            and (epoch := one.last_step) is not None
            and (line := from_epoch(epoch)) is not None
        ):
            told = line.at(sign * one.intermediate_values[epoch])
            end, variance = told.mean, told.scale**2
        else:
            continue
        found.numbers.append(one.number)
        found.params.append(one.params)
        found.accuracies.append(end)
        found.variances.append(variance)
    return found


def _pairs(trials: Sequence[FrozenTrial], epoch: int, sign: int) -> list[tuple[float, float]]:
    """Accuracy after an epoch and at the end, of those that have both."""
    return [
        (sign * one.intermediate_values[epoch], sign * end)
        for one in trials
        if epoch in one.intermediate_values and (end := end_accuracy(one)) is not None
    ]
