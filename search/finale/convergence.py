"""When a training is long enough: its length is doubled until doubling helps by no more than noise.

A training whose learning rate falls to zero is tuned to its own length, so it cannot be lengthened by going on: every
length is a training of its own, from scratch. Lengths L, 2L, 4L, ... together cost at most twice the last one (the
doubling trick; Cesa-Bianchi and Lugosi, Prediction, Learning, and Games, 2006, 2.3).

The rule. With a(L) the validation accuracy at the end of the training of length L on the fit images alone, and s the
standard deviation between two such trainings that differ in their seed, a search has converged at 2L when

    a(2L) - a(L) <= sqrt(2) s,

one standard error of that difference: the same rule that picks the winner (`search.finale.comparison`). s is measured
in the confirmation, over trainings of a trial's length, and carried over to the accuracy a in proportion to
sqrt(a (1 - a)): the numbers of errors of two seeds differ like binomial ones (Jordan, Calibrated Chaos,
arXiv:2304.01910, section 3). If nothing was confirmed over two seeds, s is that binomial deviation itself, which is an
upper bound.

The length taken is the one with the highest validation accuracy; of equals the shorter. If time runs out while longer
still helps, it is the longest that the time left allows, although no training on the fit images was that long: the
report says so. A doubling is tried only if the time would suffice for final trainings twice as long again, so that the
length trainings never take most of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from search.finale.comparison import CONFIDENCE
from search.results import LengthLimits, Slope, StoppedBy


@dataclass(frozen=True)
class SeedDeviation:
    """What is known of the deviation between two seeds.

    Attributes:
        measured: standard deviation of the accuracy between seeds; None if it was not measured.
        at: mean accuracy that it was measured at.
        images: validation images.
    """

    measured: float | None
    at: float
    images: int

    def expected(self, accuracy: float) -> float:
        """The standard deviation to be expected at another accuracy."""
        binomial = _binomial(accuracy, self.images)
        if self.measured is None:
            return binomial
        at_measured = _binomial(self.at, self.images)
        return min(binomial, self.measured * binomial / at_measured) if at_measured else self.measured


def _binomial(accuracy: float, images: int) -> float:
    return math.sqrt(max(0.0, accuracy * (1 - accuracy)) / images)


@dataclass(frozen=True)
class TrainedLength:
    """A training of some length on the fit images, at its end.

    Attributes:
        epochs: its length.
        accuracy: on the validation images.
        seconds: that it took.
    """

    epochs: int
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What the trainings so far say.

    Attributes:
        next: epochs of the training to come; None: none is needed or allowed.
        epochs: the length to take, as far as is known; final if ``next`` is None.
        converged: whether the last doubling helped by no more than noise; None if there was no doubling.
        stopped_by: what ended the lengthening.
        noise: standard deviation between seeds, as expected at the last accuracy.
        threshold: a gain that is no larger is noise.
    """

    next: int | None
    epochs: int
    converged: bool | None
    stopped_by: StoppedBy | None
    noise: float
    threshold: float


def first_length(limits: LengthLimits, seconds_per_epoch: float) -> int:
    """Epochs of the first training: as configured, fewer if time would not suffice for it and its final ones."""
    first = min(limits.first, limits.longest)
    if limits.seconds is None:
        return first
    affordable = limits.seconds / (seconds_per_epoch * (1 + limits.finals * limits.final_share))
    return max(1, min(first, int(affordable)))


def judge_length(lengths: Sequence[TrainedLength], noise: SeedDeviation, limits: LengthLimits) -> Verdict:
    """Whether a longer training is worth trying.

    Args:
        lengths: at least one, in the order of their lengths.
        noise: between seeds.
        limits: of lengths and time.
    """
    last = lengths[-1]
    spread = noise.expected(last.accuracy)
    threshold = math.sqrt(2) * spread
    best = max(lengths, key=lambda length: (length.accuracy, -length.epochs)).epochs
    gain = last.accuracy - lengths[-2].accuracy if len(lengths) > 1 else None
    converged = None if gain is None else gain <= threshold
    following = min(2 * last.epochs, limits.longest)
    if converged:
        return Verdict(None, best, converged, "noise", spread, threshold)
    if following <= last.epochs:
        return Verdict(None, best, converged, "max epochs", spread, threshold)
    if limits.seconds is not None:
        left = limits.seconds - math.fsum(length.seconds for length in lengths)
        epoch = last.seconds / last.epochs
        final = epoch * limits.finals * limits.final_share
        if epoch * following + final * min(2 * following, limits.longest) > left:
            affordable = min(limits.longest, int(left / final))
            return Verdict(None, max(best, affordable), converged, "time", spread, threshold)
    return Verdict(following, best, converged, None, spread, threshold)


def last_slope(accuracies: Sequence[float]) -> Slope | None:
    """Slope of a curve's last fifth, accuracy per epoch, with its 95 % interval; None for fewer than three points."""
    count = max(3, math.ceil(len(accuracies) / 5))
    if len(accuracies) < 3:
        return None
    part = list(accuracies)[-count:]
    fit = stats.linregress(np.arange(count), part)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 2) * fit.stderr)
    slope = float(fit.slope)
    return Slope(slope, slope - margin, slope + margin)
