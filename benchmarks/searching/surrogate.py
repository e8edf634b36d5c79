"""A space's learning curves as a function of the configuration, from curves that were measured.

For every epoch a Gaussian process (Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, chapter 2;
Matern kernel, a length scale for every feature) gives the accuracy that a configuration has on average over seeds, and
one more its seconds. What a seed adds is drawn from a normal distribution over whole curves, whose covariance comes
from configurations that were trained from several seeds. Surrogates of this kind rank optimisers as real trainings
do (Eggensperger et al., Efficient benchmarking of hyperparameter optimizers via surrogates, AAAI 2015).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel
from sklearn.model_selection import GroupKFold

from search.samplers.unit_cube import Distributions, features

FOLDS = 10


@dataclass(frozen=True)
class Curve:
    """One training.

    Attributes:
        params: Optuna parameters.
        accuracy: after each epoch, from 0 to 1.
        seconds: of each epoch, validation included.
    """

    params: Mapping[str, Any]
    accuracy: tuple[float, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Surrogate:
    """Learning curves of a whole space.

    Attributes:
        forms: of the space.
        epochs: of a whole training.
        noise: covariance (epochs, epochs) that a seed adds to a curve.
        error: of predictions that it was not fitted to.
    """

    forms: Distributions
    epochs: int
    noise: np.ndarray
    error: "Error"
    accuracies: tuple[GaussianProcessRegressor, ...]
    log_seconds: GaussianProcessRegressor

    def mean(self, params: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Accuracies (configurations, epochs), averaged over seeds."""
        rows = _rows(self.forms, params)
        return np.asarray(np.clip(np.stack([model.predict(rows) for model in self.accuracies], axis=1), 0.0, 1.0))

    def seconds(self, params: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Seconds that an epoch takes (configurations,)."""
        return np.asarray(np.exp(self.log_seconds.predict(_rows(self.forms, params))))

    def draw(self, params: Mapping[str, Any], rng: np.random.Generator) -> Curve:
        """The curve of one training."""
        noisy = self.mean([params])[0] + rng.multivariate_normal(np.zeros(self.epochs), self.noise)
        epoch = float(self.seconds([params])[0])
        return Curve(params, tuple(np.clip(noisy, 0.0, 1.0).tolist()), (epoch,) * self.epochs)


@dataclass(frozen=True)
class Error:
    """How far a surrogate is from trainings that it was not fitted to, in accuracy at the last epoch.

    Attributes:
        rmse: root mean square error; it includes the noise of the seeds.
        spearman: rank correlation of predictions and trainings.
        seeds: standard deviation between seeds of one configuration: no surrogate can have a smaller error.
        seconds: root mean square error of the seconds of an epoch, as a share of them.
        n: trainings.
    """

    rmse: float
    spearman: float
    seeds: float
    seconds: float
    n: int


def fit_surrogate(forms: Distributions, curves: Sequence[Curve], chance: float = 0.1) -> Surrogate:
    """Fit a surrogate to whole curves, some of them of one configuration.

    Args:
        forms: of the space.
        curves: of trainings; one that diverged has a shorter curve.
        chance: accuracy of a guess; a diverged training counts as one from there on.

    Raises:
        ValueError: fewer than two curves, or no configuration was trained twice.
    """
    epochs = max(len(curve.accuracy) for curve in curves)
    rows = _rows(forms, [curve.params for curve in curves])
    accuracy = np.array([curve.accuracy + (chance,) * (epochs - len(curve.accuracy)) for curve in curves])
    log_seconds = np.log([np.median(curve.seconds) for curve in curves])
    noise = _covariance_within(rows, accuracy)
    models = tuple(_fitted(rows, accuracy[:, epoch]) for epoch in range(epochs))
    cost = _fitted(rows, log_seconds)
    final = _predicted_blind(models[-1].kernel_, rows, accuracy[:, -1])
    blind_cost = _predicted_blind(cost.kernel_, rows, log_seconds)
    error = Error(
        rmse=float(np.sqrt(np.mean((final - accuracy[:, -1]) ** 2))),
        spearman=float(stats.spearmanr(final, accuracy[:, -1]).statistic),
        seeds=float(np.sqrt(noise[-1, -1])),
        seconds=float(np.sqrt(np.mean(np.expm1(blind_cost - log_seconds) ** 2))),
        n=len(curves),
    )
    return Surrogate(forms, epochs, noise, error, models, cost)


def _rows(forms: Distributions, params: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.stack([features(forms, configuration) for configuration in params])


def _covariance_within(rows: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Pooled covariance of curves around their configuration's mean."""
    _, group = np.unique(rows, axis=0, return_inverse=True)
    total, freedom = np.zeros((accuracy.shape[1],) * 2), 0
    for number in range(group.max() + 1):
        curves = accuracy[group == number]
        total += (curves - curves.mean(0)).T @ (curves - curves.mean(0))
        freedom += len(curves) - 1
    if not freedom:
        raise ValueError("no configuration was trained twice, so nothing tells the noise between seeds")
    return total / freedom


def _fitted(rows: np.ndarray, values: np.ndarray) -> GaussianProcessRegressor:
    scales = np.ones(rows.shape[1])
    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(scales, (0.05, 50.0), nu=2.5) + WhiteKernel(0.1, (1e-5, 1.0))
    return _regress(kernel, rows, values, "fmin_l_bfgs_b")


def _regress(kernel: Kernel, rows: np.ndarray, values: np.ndarray, optimizer: str | None) -> GaussianProcessRegressor:
    model = GaussianProcessRegressor(kernel, normalize_y=True, optimizer=optimizer, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound: the feature says nothing
        return model.fit(rows, values)


def _predicted_blind(kernel: Kernel, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Every value as predicted from the configurations of other folds."""
    _, group = np.unique(rows, axis=0, return_inverse=True)
    predicted = np.empty_like(values)
    for known, unknown in GroupKFold(min(FOLDS, int(group.max()) + 1)).split(rows, groups=group):
        predicted[unknown] = _regress(kernel, rows[known], values[known], None).predict(rows[unknown])
    return predicted
