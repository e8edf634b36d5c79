"""What a search has cost, the time that it still takes, and what more trials would bring.

The gain of more trials extrapolates the best configurations so far. What lies above a high quantile of the ends (also
those that stopped trials were heading for, `search.analysis.extrapolation.likely_ends`) follows a generalised Pareto
distribution, no matter what the rest looks like (peaks over threshold; its parameters by probability-weighted moments,
Hosking & Wallis, Parameter and quantile estimation for the generalized Pareto distribution, Technometrics 29, 1987;
their uncertainty by the bootstrap). The best of the further draws is what the search would choose. A share of its
distance to the best so far is noise between seeds and does not last (regression to the mean). So the gain is in
accuracy over fresh seeds, not in lucky scores; it may be negative, as a luckier configuration may be the worse one.

In replayed searches the 90 % interval covered the real gain about 90 times in 100 (`benchmarks.searching.replay`). A
normal distribution of the latest ends predicted ten times the real gain: most of what a sampler tries is far from the
best, and says nothing about what lies beyond it. If ends have no bound, the interval is too narrow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from optuna.trial import FrozenTrial

from search.analysis.extrapolation import likely_ends
from search.analysis.noise import SeedNoise, seed_noise
from search.analysis.outcomes import Outcome, end_accuracy, outcome, seconds
from search.events import Budget

MORE = 50
"""Further trials that a forecast is for."""
LEAST = 15
"""Ends that a forecast of the gain needs."""
UPPER = 0.3
"""Share of the ends, the best ones, that the tail is fitted to."""
LATEST = 20
"""Latest trials whose time predicts that of the next ones."""
DRAWS = 500
CONFIDENCE = 0.9


@dataclass(frozen=True)
class Gain:
    """By how much the best configuration's accuracy over fresh seeds may rise.

    Attributes:
        more: further trials.
        mean, low, high: of the rise, with a 90 % interval.
        worthwhile: chance that the rise exceeds the noise of one training, and a tenth of a point.
    """

    more: int
    mean: float
    low: float
    high: float
    worthwhile: float

    @property
    def unlikely(self) -> bool:
        """More trials are unlikely to help."""
        return self.worthwhile < 1 - CONFIDENCE


@dataclass(frozen=True)
class Forecast:
    """What a search has cost and what it may still bring, rounded for people.

    Attributes:
        device_seconds: by outcome of the trials.
        eta_seconds: until the budget is done; None without workers, or before a trial has ended.
        noise: between seeds; None if it is not known.
        gain: of more trials; None if it is not known.
    """

    device_seconds: Mapping[Outcome, float]
    eta_seconds: float | None
    noise: SeedNoise | None
    gain: Gain | None


def forecast(
    trials: Sequence[FrozenTrial], count: Budget, workers: int, single: bool, confirmed: SeedNoise | None = None
) -> Forecast:
    """How a search stands, for ``summary.json`` and the report.

    Args:
        trials: of the search.
        count: its budget.
        workers: working at this moment.
        single: whether the search has one objective; with two there is no gain to forecast.
        confirmed: noise that the confirmation measured; None: use the repeated trials of the search.
    """
    spent: dict[Outcome, float] = {}
    for trial in trials:
        if trial.state.is_finished():
            spent[outcome(trial)] = spent.get(outcome(trial), 0.0) + seconds(trial)
    noise = confirmed or seed_noise(trials)
    scores = [reached for trial in trials if (reached := end_accuracy(trial)) is not None]
    gain = None
    if single and scores:
        gain = expected_gain(likely_ends(trials).accuracies, max(scores), noise.std if noise else 0.0)
    return Forecast(
        device_seconds={kind: round(value, 1) for kind, value in spent.items()},
        eta_seconds=time_left(trials, count, workers),
        noise=noise and replace(noise, std=round(noise.std, 5)),
        gain=gain and _rounded(gain),
    )


def _rounded(gain: Gain) -> Gain:
    return replace(
        gain,
        mean=round(gain.mean, 5),
        low=round(gain.low, 5),
        high=round(gain.high, 5),
        worthwhile=round(gain.worthwhile, 5),  # a multiple of 1 / DRAWS: nothing is lost
    )


def time_left(trials: Sequence[FrozenTrial], count: Budget, workers: int) -> float | None:
    """Seconds until the budget is done, at the pace of the latest trials; None if it cannot be known."""
    ended = [trial for trial in trials if outcome(trial) in ("complete", "pruned")][-LATEST:]
    if not ended or not workers or not count.remaining:
        return None
    return round(sum(map(seconds, ended)) / len(ended) * count.remaining / min(workers, count.remaining), 1)


def expected_gain(ends: Sequence[float], best: float, noise: float, more: int = MORE, seed: int = 0) -> Gain | None:
    """Predict what more trials bring; None if too few have ended.

    Args:
        ends: accuracies that the trials ended at or were heading for.
        best: score of the best trial so far.
        noise: standard deviation between seeds; 0 if it is not known, which is optimistic.
        more: further trials.
        seed: of the draws.
    """
    known = np.array(ends, dtype=np.float64)
    if len(known) < LEAST:
        return None
    rng = np.random.default_rng(seed)
    variance = float(known.var(ddof=1))
    own = max(0.0, 1 - noise**2 / variance) if variance else 0.0
    drawn = [_best_of(more, known[rng.integers(len(known), size=len(known))], rng) for _ in range(DRAWS)]
    ahead = np.array(drawn) - best
    luck = math.sqrt(2 * own) * noise * rng.standard_normal(DRAWS)  # of the new best one and of the old one
    gains = np.where(ahead > 0, own * ahead + luck, 0.0)
    low, high = np.quantile(gains, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    worthwhile = float(np.mean(gains > max(noise, 0.001)))
    return Gain(more, float(gains.mean()), float(low), float(high), worthwhile)


def _best_of(more: int, ends: np.ndarray, rng: np.random.Generator) -> float:
    """The best of ``more`` further draws from the distribution of these ends."""
    threshold = float(np.quantile(ends, 1 - UPPER))
    excesses = np.sort(ends[ends > threshold] - threshold)
    above = int(rng.binomial(more, UPPER))
    if len(excesses) < 2 or not above:
        return threshold
    mean = float(excesses.mean())
    ranks = (np.arange(1, len(excesses) + 1) - 0.35) / len(excesses)
    moment = float(np.mean((1 - ranks) * excesses))
    # Accuracies have an upper bound, so the tail gets one too: no shape below 0 in Hosking & Wallis's sign.
    shape = max(0.0, mean / (mean - 2 * moment) - 2) if mean > 2 * moment else 0.0
    scale = mean * (1 + shape)
    left = float(rng.random(above).min())
    return threshold + (-scale * math.log(left) if shape < 1e-6 else scale / shape * (1 - left**shape))
