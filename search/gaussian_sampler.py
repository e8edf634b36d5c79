"""A sampler for few, noisy, costly trainings: Gaussian processes, expected improvement a second.

A Gaussian process (Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006) is fitted to the accuracies at
the end of training. Trials that were stopped and trials in training take part with what their curve so far predicts
(`search.extrapolation`) and with that prediction's own uncertainty as their noise, which leaves no trial's device time
unused; Optuna's own Gaussian process forgets them. The next configuration is the one with the largest expected
improvement (Jones, Schonlau & Welch, Efficient global optimization, 1998) over the best that the process believes in,
not over the luckiest score (the plug-in of Picheny, Wagner & Ginsbourger, A benchmark of kriging-based infill criteria
for noisy optimization, 2013), divided by a power of the seconds that it is expected to take (Snoek, Larochelle & Adams,
Practical Bayesian optimization, 2012, 3.2). Configurations that others are training at this moment count as having come
out as expected, so that many workers do not take the same (Ginsbourger et al.'s kriging believer, 2010).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy import stats
from scipy.stats import qmc
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel

from search.extrapolation import likely_ends
from search.outcomes import epoch_seconds
from search.unit_cube import Forms, features, places, point

Relevant = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Of a point of the whole cube, the parameters that its configuration has."""

CANDIDATES = 1024
NEIGHBOURS = 64
"""Points that compete: so many all over the space, and so many around each of the `NEIGHBOURED` best."""
NEIGHBOURED = 8
STEP = 0.1
"""Standard deviation of a neighbour's distance in every coordinate."""
CHANGED = 0.5
"""Share of the coordinates in which a neighbour differs."""


class GaussianSampler(BaseSampler):
    """Proposes configurations of a single-objective study.

    Args:
        forms: of the whole space.
        relevant: see `Relevant`.
        startup_trials: that must have ended before the process takes over; until then the space is filled evenly.
        slot: number of the configuration that this is for: its place in the even filling.
        seed: of the study.
        cost_power: to which the seconds are raised: 0 ignores them.
    """

    def __init__(
        self, forms: Forms, relevant: Relevant, startup_trials: int, slot: int, seed: int, cost_power: float
    ) -> None:
        self._forms, self._relevant = dict(forms), relevant
        self._startup_trials, self._slot, self._seed, self._cost_power = startup_trials, slot, seed, cost_power
        self._independent = RandomSampler(seed=seed + slot)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        return self._forms

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],  # noqa: ARG002
    ) -> dict[str, Any]:
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        trials = [one for one in study.get_trials(deepcopy=False, states=states) if one.number != trial.number]
        sign = 1 if study.direction == StudyDirection.MAXIMIZE else -1
        ended = [one for one in trials if one.state == TrialState.COMPLETE and one.values]
        if len(ended) < max(2, self._startup_trials):
            return self._even()
        rng = np.random.default_rng([self._seed, self._slot])
        seen = likely_ends(trials, sign)
        begun = [one for one in trials if one.state == TrialState.RUNNING and one.params]
        running = [one.params for one in begun if one.number not in seen.numbers]
        ends = np.array(seen.accuracies)
        centre, spread = ends.mean(), max(float(ends.std()), 1e-6)
        rows = self._rows(seen.params)
        values, noise = (ends - centre) / spread, np.array(seen.variances) / spread**2
        process = _fitted(rows, values, noise)
        if running:
            more = self._rows(running)
            rows = np.vstack([rows, more])
            values = np.append(values, process.predict(more))
            noise = np.append(noise, np.zeros(len(running)))
            process = _conditioned(process.kernel_, rows, values, noise)
        believed = process.predict(rows)
        best = float(believed.max())
        around = [seen.params[place] for place in np.argsort(-believed[: len(seen.params)])[:NEIGHBOURED]]
        candidates = self._candidates(around, rng)
        competing = self._rows(candidates)
        gain = _log_expected_improvement(process, competing, best)
        if self._cost_power:
            gain = gain - self._cost_power * self._log_seconds(ended, competing)
        return dict(candidates[int(np.argmax(gain))])

    def _even(self) -> dict[str, Any]:
        cube = qmc.Sobol(len(self._forms), seed=self._seed)
        if self._slot:
            cube.fast_forward(self._slot)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about numbers of points that are no powers of two
            return point(self._forms, cube.random(1)[0].tolist())

    def _rows(self, params: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.stack([features(self._forms, self._relevant(one)) for one in params])

    def _candidates(self, around: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
        dimensions = len(self._forms)
        cube = [row.tolist() for row in rng.random((CANDIDATES, dimensions))]
        for params in around:
            centre = np.array(places(self._forms, params))
            moved = np.clip(centre + STEP * rng.standard_normal((NEIGHBOURS, dimensions)), 0, 1 - 1e-9)
            cube += np.where(rng.random(moved.shape) < CHANGED, moved, centre).tolist()
        return [point(self._forms, row) for row in cube]

    def _log_seconds(self, ended: Sequence[FrozenTrial], rows: np.ndarray) -> np.ndarray:
        """Of a whole training, less a constant."""
        timed = [(one.params, seconds) for one in ended if (seconds := epoch_seconds(one)) is not None]
        if len(timed) < 2:
            return np.zeros(len(rows))
        log_seconds = np.log([seconds for _, seconds in timed])
        mean = log_seconds.mean()
        model = _fitted(self._rows([params for params, _ in timed]), log_seconds - mean, np.zeros(len(timed)))
        return np.asarray(model.predict(rows))


def _fitted(rows: np.ndarray, values: np.ndarray, noise: np.ndarray) -> GaussianProcessRegressor:
    kernel = ConstantKernel(1.0, (0.1, 10.0)) * Matern(np.ones(rows.shape[1]), (0.2, 10.0), nu=2.5)
    return _conditioned(kernel + WhiteKernel(0.1, (1e-3, 1.0)), rows, values, noise, "fmin_l_bfgs_b")


def _conditioned(
    kernel: Kernel, rows: np.ndarray, values: np.ndarray, noise: np.ndarray, optimizer: str | None = None
) -> GaussianProcessRegressor:
    model = GaussianProcessRegressor(kernel, alpha=noise + 1e-10, optimizer=optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a scale at its bound
        return model.fit(rows, values)


def _log_expected_improvement(process: GaussianProcessRegressor, rows: np.ndarray, best: float) -> np.ndarray:
    """Natural logarithm of the expected improvement of the mean over seeds, which the process's own noise is not in."""
    mean, std = process.predict(rows, return_std=True)
    noise = float(process.kernel_.k2.noise_level)
    spread = np.sqrt(np.maximum(std**2 - noise, 1e-12))
    place = (mean - best) / spread
    improvement = spread * (place * stats.norm.cdf(place) + stats.norm.pdf(place))
    return np.asarray(np.log(np.maximum(improvement, 1e-300)))
