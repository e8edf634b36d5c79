"""A sampler for few, noisy, costly trainings: a Gaussian process and expected improvement.

A Gaussian process (Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006) is fitted to the accuracies at
the end of training. Trials that were stopped and trials in training take part with what their curve so far predicts
(`search.analysis.extrapolation`) and with that prediction's own uncertainty as their noise, which leaves no trial's
device time
unused; Optuna's own Gaussian process forgets them. The next configuration is the one with the largest expected
improvement (Jones, Schonlau & Welch, Efficient global optimization, 1998) over the best that the process believes in,
not over the luckiest score (the plug-in of Picheny, Wagner & Ginsbourger, A benchmark of kriging-based infill criteria
for noisy optimization, 2013). Configurations that others are training at this moment count as having come
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

from search.analysis.extrapolation import likely_ends
from search.samplers.unit_cube import Forms, coordinates, features, point

Relevant = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Of a point of the whole cube, the parameters that its configuration has."""

CANDIDATES = 1024
"""Points all over the space that compete first."""
STEPS = (0.3, 0.15, 0.05)
"""Then, round by round, neighbours of the best points so far: standard deviation of their distance in a coordinate."""
NEIGHBOURED, NEIGHBOURS = 8, 48
"""Best points of a round, and neighbours of each."""
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
    """

    def __init__(self, forms: Forms, relevant: Relevant, startup_trials: int, slot: int, seed: int) -> None:
        self._forms, self._relevant = dict(forms), relevant
        self._startup_trials, self._slot, self._seed = startup_trials, slot, seed
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
        return self._best(lambda rows: _log_expected_improvement(process, rows, best), around, rng)

    def _best(
        self, worth: Callable[[np.ndarray], np.ndarray], around: Sequence[Mapping[str, Any]], rng: np.random.Generator
    ) -> dict[str, Any]:
        """The configuration that is worth most, by local search from the best of points all over the space."""
        dimensions = len(self._forms)
        cube = np.vstack(
            [rng.random((CANDIDATES, dimensions)), *(coordinates(self._forms, params) for params in around)]
        )
        found = [point(self._forms, row.tolist()) for row in cube]
        worths = worth(self._rows(found))
        for step in STEPS:
            top = np.argsort(-worths)[:NEIGHBOURED]
            centres = np.repeat(np.array([coordinates(self._forms, found[place]) for place in top]), NEIGHBOURS, axis=0)
            moved = np.clip(centres + step * rng.standard_normal(centres.shape), 0, 1 - 1e-9)
            near = np.where(rng.random(centres.shape) < CHANGED, moved, centres)
            more = [point(self._forms, row.tolist()) for row in near]
            found += more
            worths = np.append(worths, worth(self._rows(more)))
        return found[int(np.argmax(worths))]

    def _even(self) -> dict[str, Any]:
        cube = qmc.Sobol(len(self._forms), seed=self._seed)
        if self._slot:
            cube.fast_forward(self._slot)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about numbers of points that are no powers of two
            return point(self._forms, cube.random(1)[0].tolist())

    def _rows(self, params: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.stack([features(self._forms, self._relevant(one)) for one in params])


class _Regressor(GaussianProcessRegressor):  # type: ignore[misc]
    """With normal priors on the logarithms of the kernel's parameters: dozens of trials do not settle them."""

    def log_marginal_likelihood(
        self, theta: np.ndarray | None = None, eval_gradient: bool = False, clone_kernel: bool = True
    ) -> Any:
        told = super().log_marginal_likelihood(theta, eval_gradient, clone_kernel)
        if theta is None:
            return told
        means, spreads = _priors(len(theta) - 2)
        away = (theta - means) / spreads
        prior = -0.5 * float(away @ away)
        return (told[0] + prior, told[1] - away / spreads) if eval_gradient else told + prior


def _priors(features: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of the logarithms: of the variance, the length scales and the noise's variance.

    A length scale is about the width of the space, within a factor of two; the noise a seventh of the spread of scores.
    """
    return np.array([0.0, *[0.0] * features, -4.0]), np.array([1.0, *[0.7] * features, 1.0])


def _fitted(rows: np.ndarray, values: np.ndarray, noise: np.ndarray) -> GaussianProcessRegressor:
    features = rows.shape[1]
    variance, *scales, white = np.exp(_priors(features)[0])
    kernel = ConstantKernel(variance, (1e-2, 1e2)) * Matern(scales, (0.05, 200.0), nu=2.5)
    return _conditioned(kernel + WhiteKernel(white, (1e-5, 1.0)), rows, values, noise, "fmin_l_bfgs_b")


def _conditioned(
    kernel: Kernel, rows: np.ndarray, values: np.ndarray, noise: np.ndarray, optimizer: str | None = None
) -> GaussianProcessRegressor:
    model = _Regressor(kernel, alpha=noise + 1e-10, optimizer=optimizer)
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
