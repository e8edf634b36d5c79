"""Configurations compared over the same seeds: which is best, by how much, and how much of that is noise.

Every configuration is trained once from each of the same seeds, so the scores form a table, and what a seed does to
all of them alike cancels in their differences: a randomised block design. With a_cs the score of configuration c under
seed s, the residuals a_cs - mean_c - mean_s + mean have (C - 1)(S - 1) degrees of freedom; their variance v gives the
standard error of the difference between two configurations' means, sqrt(2 v / S). The noise that the search measured
early (`search.analysis.noise`) joins v with its own degrees of freedom; it holds also what a seed does to all alike,
so it can only make the comparison more careful, and it is an estimate even for one seed or one configuration.

The winner is chosen by the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984, 3.4.3):
of all configurations whose mean is within one standard error of the best one, the cheapest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from search.analysis.noise import SeedNoise, combined_noise, pooled_noise

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Candidate:
    """A configuration and its scores.

    Attributes:
        key: names it.
        cost: of two that are as good, the one with the smaller cost is taken.
        scores: by seed; a seed is absent while it has not been trained, or if the training diverged.
    """

    key: int
    cost: float
    scores: Mapping[int, float]

    @property
    def mean(self) -> float | None:
        """Over the seeds that have a score."""
        return math.fsum(self.scores.values()) / len(self.scores) if self.scores else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds."""
        return float(np.std(list(self.scores.values()), ddof=1)) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """What the scores of several configurations say.

    Attributes:
        ranked: best mean first; those that lack a seed follow those that have all.
        behind: for each configuration with all seeds, how far its mean is below the best one's.
        noise: between trainings of one configuration that differ in their seed, what was measured earlier included.
        noise_of_difference: standard error of the difference of two means; None for one configuration or one seed.
        margin: half the width of that difference's 95 % interval.
        tied: configurations within one standard error of the best mean, the best one included.
        winner: the cheapest of these; None if nothing has a score.
    """

    ranked: tuple[Candidate, ...]
    behind: Mapping[int, float]
    noise: SeedNoise | None
    noise_of_difference: float | None
    margin: float | None
    tied: tuple[int, ...]
    winner: int | None


def compare(candidates: Sequence[Candidate], seeds: Sequence[int], earlier: SeedNoise | None = None) -> Comparison:
    """Rank configurations by their mean over the seeds and choose one.

    A configuration that lacks a seed can win only if none has them all.

    Args:
        candidates: to rank.
        seeds: that each has, or will have.
        earlier: noise that was measured before.
    """

    def rank(candidate: Candidate) -> tuple[int, float, float]:
        mean = candidate.mean
        return -len(candidate.scores), -math.inf if mean is None else -mean, candidate.cost

    ranked = tuple(sorted(candidates, key=rank))
    whole = [candidate for candidate in ranked if len(candidate.scores) == len(seeds)]
    table = np.array([[candidate.scores[seed] for seed in seeds] for candidate in whole])
    noise = combined_noise(pooled_noise([list(candidate.scores.values()) for candidate in candidates]), earlier)
    error, freedom = _error_of_difference(table.reshape(len(whole), len(seeds)), earlier)
    margin = None if error is None else error * float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    contenders = whole or [candidate for candidate in ranked if candidate.scores][:1]
    if not contenders:
        return Comparison(ranked, {}, noise, error, margin, (), None)
    behind = {contender.key: _mean(contenders[0]) - _mean(contender) for contender in contenders}
    tied = [contender for contender in contenders if behind[contender.key] <= (error or 0.0)]
    winner = min(tied, key=lambda contender: (contender.cost, behind[contender.key])).key
    return Comparison(ranked, behind, noise, error, margin, tuple(contender.key for contender in tied), winner)


def _mean(candidate: Candidate) -> float:
    assert candidate.mean is not None
    return candidate.mean


def _error_of_difference(table: np.ndarray, earlier: SeedNoise | None) -> tuple[float | None, int]:
    rows, columns = table.shape
    if rows < 2 or columns < 1:
        return None, 0
    residuals = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    freedom = (rows - 1) * (columns - 1)
    own = SeedNoise(math.sqrt(float((residuals**2).sum()) / freedom), freedom) if freedom else None
    noise = combined_noise(own, earlier)
    return (None, 0) if noise is None else (noise.std * math.sqrt(2 / columns), noise.freedom)
