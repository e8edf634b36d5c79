"""One search of `benchmarks.searching.replay` on a simulated clock, and what it came to."""

import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import optuna
from scipy.stats import qmc

from benchmarks.searching.clock import Ended, simulate
from benchmarks.searching.methods import RANDOM, methods
from benchmarks.searching.surrogate import Curve, Surrogate, fit_surrogate
from search.analysis.extrapolation import regression
from search.analysis.forecast import MORE, expected_gain
from search.analysis.noise import noise_of
from search.config.space import parameter_distributions
from search.config.study_file import StudyConfig, find_study
from search.samplers.unit_cube import point

TARGET = 0.995
"""Of the best accuracy."""
POINTS = 16
"""Two to the power of so many points of the space among which its best is sought."""
OVERHEAD = 0.5
"""Seconds of a trial beside its epochs."""
LONGER = 6
"""Times the others' time that the random search has, which needs it to come to the target."""
FORECASTS = (20, 40)
"""Trials after which a forecast is checked."""


@dataclass(frozen=True)
class Table:
    """Measured curves and the study that they are of."""

    config: StudyConfig
    curves: tuple[Curve, ...]


def read_table(path: Path) -> Table:
    """A file of `benchmarks.searching.curves`."""
    first, *rows = map(json.loads, path.read_text().splitlines())
    _, config = find_study(first["study"])
    curves = tuple(
        Curve(row["params"], tuple(row["accuracy"]), tuple(row["seconds"])) for row in rows if row["seconds"]
    )
    return Table(config, curves)


@dataclass(frozen=True)
class World:
    """What every search of a comparison shares.

    Attributes:
        surrogate: of the curves.
        config: of the study.
        best: accuracy, on average over seeds, of the best configuration that was measured. target: `TARGET` of it.
        summit: accuracy of the best one of the whole space, measured or not.
        training: mean seconds of a whole training of a configuration drawn at random.
    """

    surrogate: Surrogate
    config: StudyConfig
    best: float
    summit: float
    training: float

    @property
    def target(self) -> float:
        """What a search is to reach."""
        return TARGET * self.best

    @property
    def last_target(self) -> float:
        """The same of the whole space: the best of the table is but the best of as many random ones."""
        return TARGET * self.summit


def world_of(table: Table) -> World:
    """Fit the surrogate; find the target."""
    surrogate = fit_surrogate(parameter_distributions(table.config.space), table.curves)
    params = [curve.params for curve in table.curves]
    best = float(surrogate.mean(params)[:, -1].max())
    cube = qmc.Sobol(len(surrogate.forms), seed=0).random_base2(POINTS)
    summit = float(surrogate.mean([point(surrogate.forms, row.tolist()) for row in cube])[:, -1].max())
    training = surrogate.epochs * float(surrogate.seconds(params).mean()) + OVERHEAD
    return World(surrogate, table.config, best, max(best, summit), training)


@dataclass(frozen=True)
class Search:
    """One simulated search.

    Attributes:
        reached: seconds until the target was; None: never.
        reached_last: the same of the last target.
        regret: accuracy that the incumbent lacked to the space's best, after the time of 1, 2, ... whole trainings.
        pruned: trainings that were stopped. would: that the pruner wanted to stop.
        false: of `would`, those among the best `top` at the end.
        trials: that ended.
        foretold: after each of `FORECASTS` trials, whether the gain of `search.analysis.forecast` covered what came.
        thought: seconds of real time in sampler and pruner.
    """

    reached: float | None
    reached_last: float | None
    regret: tuple[float, ...]
    pruned: int
    would: int
    false: int
    trials: int
    foretold: tuple[bool, ...]
    thought: float


def handed_over(world: World, ended: Sequence[Ended]) -> list[tuple[float, float]]:
    """When a search's best score changed, and what that configuration is worth on average over seeds."""
    truth = world.surrogate.mean([one.params for one in ended])[:, -1] if ended else np.zeros(0)
    best_score = -math.inf
    incumbents: list[tuple[float, float]] = []
    for one, true in zip(ended, truth, strict=True):
        if not one.stopped and one.whole > best_score:
            best_score = one.whole
            incumbents.append((one.seconds, float(true)))
    return incumbents


def summed_up(world: World, ended: Sequence[Ended], trainings: int, thought: float) -> Search:
    """What a simulated search came to."""
    incumbents = handed_over(world, ended)
    regret = []
    for place in range(1, trainings + 1):
        there = [value for seconds, value in incumbents if seconds <= place * world.training]
        regret.append(world.summit - (there[-1] if there else 0.1))
    top = world.config.confirm.configurations
    ranked = sorted(ended, key=lambda one: -one.whole)[:top]
    would = [one for one in ended if one.would_stop is not None]
    return Search(
        reached(incumbents, world.target),
        reached(incumbents, world.last_target),
        tuple(round(value, 5) for value in regret),
        sum(one.stopped for one in ended),
        len(would),
        sum(one in ranked for one in would),
        len(ended),
        tuple(
            _covers(world, ended[:count], ended[: count + MORE]) for count in FORECASTS if len(ended) >= count + MORE
        ),
        thought,
    )


def reached(incumbents: Sequence[tuple[float, float]], target: float) -> float | None:
    """The first of the seconds at which what the search would hand over had the target."""
    return next((seconds for seconds, value in incumbents if value >= target), None)


def _covers(world: World, known: Sequence[Ended], later: Sequence[Ended]) -> bool:
    """Whether the gain that is foretold of the trials that are known covers the one that came."""
    whole = [one for one in known if not one.stopped]
    ends = []
    for one in known:
        pairs = [(other.curve[len(one.curve) - 1], other.whole) for other in whole]
        ends.append(regression(pairs).at(one.curve[-1]).mean if one.stopped else one.whole)

    def chosen(some: Sequence[Ended]) -> Ended:
        return max((one for one in some if not one.stopped), key=lambda one: one.whole)

    noise = noise_of((one.params, one.whole) for one in whole)
    told = expected_gain(ends, chosen(known).whole, noise.std if noise else 0.0)
    before, after = world.surrogate.mean([chosen(known).params, chosen(later).params])[:, -1]
    return told is not None and told.low <= after - before <= told.high


@cache
def world_in(path: Path) -> World:
    """`world_of` a file, once a process."""
    return world_of(read_table(path))


def alone(path: Path) -> World:
    """`world_in`, in a process that simulates beside others."""
    os.environ["OMP_NUM_THREADS"] = "1"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return world_in(path)


def run_one(path: Path, name: str, seed: int, workers: int, trainings: int) -> Search:
    """One simulated search, in a process of its own, with the device time of so many whole trainings."""
    world = alone(path)
    method = methods(world.config, world.surrogate.epochs)[name]
    began = time.perf_counter()
    seconds = trainings * (LONGER if name == RANDOM else 1) * world.training / workers
    ended = simulate(world.surrogate, world.config.space, method, seed, seconds, workers, OVERHEAD)
    return summed_up(world, ended, trainings, time.perf_counter() - began)
