"""A sampler for few, noisy, costly trainings: a Gaussian process and expected improvement.

A Gaussian process (Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006) is fitted to the accuracies at
the end of training. Trials that were stopped and trials in training take part with what their curve so far predicts
(`search.analysis.extrapolation`), and with that prediction's own uncertainty as their noise. So no trial's device time
is wasted; Optuna's own Gaussian process ignores these trials. The next configuration is the one with the largest
expected improvement (Jones, Schonlau & Welch, Efficient global optimization, 1998) over the best mean that the process
predicts, not over the luckiest score (the plug-in of Picheny, Wagner & Ginsbourger, A benchmark of kriging-based infill
criteria for noisy optimization, 2013). Configurations that other workers are training count as having ended as
predicted, so that many workers do not take the same one (Ginsbourger et al.'s kriging believer, 2010).
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
from search.config.space import Params
from search.samplers.unit_cube import Distributions, coordinates, features, params_at

Relevant = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""From the parameters at a point of the whole cube, those that its configuration has."""

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
        distributions: of the whole space.
        relevant: see `Relevant`.
        startup_trials: that must have ended before the process takes over; until then the space is filled evenly.
        slot: number of the configuration that this is for: its index in the even filling.
        seed: of the study.
    """

    def __init__(
        self, distributions: Distributions, relevant: Relevant, startup_trials: int, slot: int, seed: int
    ) -> None:
        self._distributions, self._relevant = dict(distributions), relevant
        self._startup_trials, self._slot, self._seed = startup_trials, slot, seed
        self._independent = RandomSampler(seed=seed + slot)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        return self._distributions

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],  # noqa: ARG002
    ) -> Params:
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        trials = [other for other in study.get_trials(deepcopy=False, states=states) if other.number != trial.number]
        sign = 1 if study.direction == StudyDirection.MAXIMIZE else -1
        complete = [other for other in trials if other.state == TrialState.COMPLETE and other.values]
        if len(complete) < max(2, self._startup_trials):
            return self._even()
        rng = np.random.default_rng([self._seed, self._slot])
        likely = likely_ends(trials, sign)
        running = [other for other in trials if other.state == TrialState.RUNNING and other.params]
        unpredicted = [other.params for other in running if other.number not in likely.numbers]
        ends = np.array(likely.accuracies)
        centre, spread = ends.mean(), max(float(ends.std()), 1e-6)
        rows = self._rows(likely.params)
        values, noise = (ends - centre) / spread, np.array(likely.variances) / spread**2
        process = _fitted(rows, values, noise)
        if unpredicted:
            running_rows = self._rows(unpredicted)
            rows = np.vstack([rows, running_rows])
            values = np.append(values, process.predict(running_rows))
            noise = np.append(noise, np.zeros(len(unpredicted)))
            process = _conditioned(process.kernel_, rows, values, noise)
        means = process.predict(rows)
        best = float(means.max())
        top = [likely.params[index] for index in np.argsort(-means[: len(likely.params)])[:NEIGHBOURED]]
        return self._maximised(lambda rows: _log_expected_improvement(process, rows, best), top, rng)

    def _maximised(
        self,
        acquisition: Callable[[np.ndarray], np.ndarray],
        starts: Sequence[Mapping[str, Any]],
        rng: np.random.Generator,
    ) -> Params:
        """The configuration of the largest acquisition, by local search from the best of points all over the space.

        Args:
            acquisition: of rows of features.
            starts: configurations that compete, too.
            rng: of the points and the neighbours.
        """
        dimensions = len(self._distributions)
        cube = np.vstack(
            [rng.random((CANDIDATES, dimensions)), *(coordinates(self._distributions, params) for params in starts)]
        )
        candidates = [params_at(self._distributions, row.tolist()) for row in cube]
        scores = acquisition(self._rows(candidates))
        for step in STEPS:
            top = [candidates[index] for index in np.argsort(-scores)[:NEIGHBOURED]]
            centres = np.array([coordinates(self._distributions, params) for params in top])
            repeated = np.repeat(centres, NEIGHBOURS, axis=0)
            moved = np.clip(repeated + step * rng.standard_normal(repeated.shape), 0, 1 - 1e-9)
            cube = np.where(rng.random(repeated.shape) < CHANGED, moved, repeated)
            neighbours = [params_at(self._distributions, row.tolist()) for row in cube]
            candidates += neighbours
            scores = np.append(scores, acquisition(self._rows(neighbours)))
        return candidates[int(np.argmax(scores))]

    def _even(self) -> Params:
        """The slot's point of a Sobol sequence."""
        sobol = qmc.Sobol(len(self._distributions), seed=self._seed)
        if self._slot:
            sobol.fast_forward(self._slot)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about numbers of points that are no powers of two
            return params_at(self._distributions, sobol.random(1)[0].tolist())

    def _rows(self, configurations: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Features (configurations, features), float64."""
        return np.stack([features(self._distributions, self._relevant(params)) for params in configurations])


class _Regressor(GaussianProcessRegressor):  # type: ignore[misc]
    """With normal priors on the logarithms of the kernel's parameters, which dozens of trials do not determine."""

    def log_marginal_likelihood(
        self, theta: np.ndarray | None = None, eval_gradient: bool = False, clone_kernel: bool = True
    ) -> Any:
        likelihood = super().log_marginal_likelihood(theta, eval_gradient, clone_kernel)
        if theta is None:
            return likelihood
        means, spreads = _priors(len(theta) - 2)
        distance = (theta - means) / spreads
        prior = -0.5 * float(distance @ distance)
        if eval_gradient:
            value, gradient = likelihood
            return value + prior, gradient - distance / spreads
        return likelihood + prior


def _priors(features: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of the logarithms: of the variance, the length scales and the noise's variance.

    A length scale is about the width of the space, within a factor of two; the noise a seventh of the spread of scores.
    """
    return np.array([0.0, *[0.0] * features, -4.0]), np.array([1.0, *[0.7] * features, 1.0])


def _fitted(rows: np.ndarray, values: np.ndarray, noise: np.ndarray) -> GaussianProcessRegressor:
    """A process whose kernel is fitted, from features (n, features), values (n,) and variances of their noise (n,)."""
    features = rows.shape[1]
    variance, *scales, white = np.exp(_priors(features)[0])
    kernel = ConstantKernel(variance, (1e-2, 1e2)) * Matern(scales, (0.05, 200.0), nu=2.5)
    return _conditioned(kernel + WhiteKernel(white, (1e-5, 1.0)), rows, values, noise, "fmin_l_bfgs_b")


def _conditioned(
    kernel: Kernel, rows: np.ndarray, values: np.ndarray, noise: np.ndarray, optimizer: str | None = None
) -> GaussianProcessRegressor:
    """A process with this kernel, as `_fitted`; without an optimizer the kernel stays as it is."""
    process = _Regressor(kernel, alpha=noise + 1e-10, optimizer=optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a scale at its bound
        return process.fit(rows, values)


def _log_expected_improvement(process: GaussianProcessRegressor, rows: np.ndarray, best: float) -> np.ndarray:
    """Natural logarithm of the expected improvement of the mean over seeds, without the process's own noise."""
    mean, std = process.predict(rows, return_std=True)
    noise = float(process.kernel_.k2.noise_level)
    spread = np.sqrt(np.maximum(std**2 - noise, 1e-12))
    z = (mean - best) / spread
    improvement = spread * (z * stats.norm.cdf(z) + stats.norm.pdf(z))
    return np.asarray(np.log(np.maximum(improvement, 1e-300)))
