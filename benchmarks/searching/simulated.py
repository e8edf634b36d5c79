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
from search.samplers.unit_cube import params_at

TARGET = 0.995
"""The share of the best accuracy that is the target."""
POINTS = 16
"""The best of the space is taken among two to the power of this many points."""
OVERHEAD = 0.5
"""Seconds of a trial besides its epochs."""
LONGER = 6
"""Random search has this many times the others' time, because it needs that to reach the target."""
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
        best: accuracy, on average over seeds, of the best configuration measured; `TARGET` of it is the target.
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
        """The accuracy that a search is to reach."""
        return TARGET * self.best

    @property
    def last_target(self) -> float:
        """The same of the whole space: the best of the table is only the best of that many random configurations."""
        return TARGET * self.summit


def world_of(table: Table) -> World:
    """Fit the surrogate; find the target."""
    surrogate = fit_surrogate(parameter_distributions(table.config.space), table.curves)
    params = [curve.params for curve in table.curves]
    best = float(surrogate.mean(params)[:, -1].max())
    cube = qmc.Sobol(len(surrogate.forms), seed=0).random_base2(POINTS)
    summit = float(surrogate.mean([params_at(surrogate.forms, row.tolist()) for row in cube])[:, -1].max())
    training = surrogate.epochs * float(surrogate.seconds(params).mean()) + OVERHEAD
    return World(surrogate, table.config, best, max(best, summit), training)


@dataclass(frozen=True)
class Search:
    """One simulated search.

    Attributes:
        reached: seconds until the target was reached; None: never.
        reached_last: the same for the last target.
        regret: accuracy that the incumbent lacked to the space's best, after the time of 1, 2, ... whole trainings.
        pruned: trainings that were stopped.
        would: trainings that the pruner wanted to stop.
        false: of `would`, those that would have ended among the best that are confirmed.
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
    truth = world.surrogate.mean([trial.params for trial in ended])[:, -1] if ended else np.zeros(0)
    best_score = -math.inf
    incumbents: list[tuple[float, float]] = []
    for trial, accuracy in zip(ended, truth, strict=True):
        if not trial.stopped and trial.whole > best_score:
            best_score = trial.whole
            incumbents.append((trial.seconds, float(accuracy)))
    return incumbents


def summed_up(world: World, ended: Sequence[Ended], trainings: int, thought: float) -> Search:
    """What a simulated search came to."""
    incumbents = handed_over(world, ended)
    regret = []
    for count in range(1, trainings + 1):
        so_far = [value for seconds, value in incumbents if seconds <= count * world.training]
        regret.append(world.summit - (so_far[-1] if so_far else 0.1))
    top = world.config.confirm.configurations
    ranked = sorted(ended, key=lambda trial: -trial.whole)[:top]
    would = [trial for trial in ended if trial.would_stop is not None]
    return Search(
        reached(incumbents, world.target),
        reached(incumbents, world.last_target),
        tuple(round(value, 5) for value in regret),
        sum(trial.stopped for trial in ended),
        len(would),
        sum(trial in ranked for trial in would),
        len(ended),
        tuple(
            _covers(world, ended[:count], ended[: count + MORE]) for count in FORECASTS if len(ended) >= count + MORE
        ),
        thought,
    )


def reached(incumbents: Sequence[tuple[float, float]], target: float) -> float | None:
    """Seconds until what the search would hand over reached the target; None: never."""
    return next((seconds for seconds, value in incumbents if value >= target), None)


def _covers(world: World, known: Sequence[Ended], later: Sequence[Ended]) -> bool:
    """Whether the forecast from the known trials covers the gain that came."""
    whole = [trial for trial in known if not trial.stopped]
    ends = []
    for trial in known:
        pairs = [(other.curve[len(trial.curve) - 1], other.whole) for other in whole]
        ends.append(regression(pairs).at(trial.curve[-1]).mean if trial.stopped else trial.whole)

    def chosen(trials: Sequence[Ended]) -> Ended:
        return max((trial for trial in trials if not trial.stopped), key=lambda trial: trial.whole)

    noise = noise_of((trial.params, trial.whole) for trial in whole)
    gain = expected_gain(ends, chosen(known).whole, noise.std if noise else 0.0)
    before, after = world.surrogate.mean([chosen(known).params, chosen(later).params])[:, -1]
    return gain is not None and gain.low <= after - before <= gain.high


@cache
def world_in(path: Path) -> World:
    """`world_of` a file, once a process."""
    return world_of(read_table(path))


def world_of_process(path: Path) -> World:
    """`world_in`, in a process of a pool: one thread, and Optuna says nothing."""
    os.environ["OMP_NUM_THREADS"] = "1"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return world_in(path)


def run_one(path: Path, name: str, seed: int, workers: int, trainings: int) -> Search:
    """One simulated search, in a process of its own, with the device time of ``trainings`` whole trainings."""
    world = world_of_process(path)
    method = methods(world.config, world.surrogate.epochs)[name]
    began = time.perf_counter()
    seconds = trainings * (LONGER if name == RANDOM else 1) * world.training / workers
    ended = simulate(world.surrogate, world.config.space, method, seed, seconds, workers, OVERHEAD)
    return summed_up(world, ended, trainings, time.perf_counter() - began)
