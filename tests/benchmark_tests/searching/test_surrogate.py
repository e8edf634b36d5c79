"""A surrogate of learning curves, fitted to curves that were made up."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from optuna.distributions import FloatDistribution, IntDistribution

from benchmarks.searching.surrogate import Curve, fit_surrogate
from search.samplers.unit_cube import params_at

FORMS = {"blocks": IntDistribution(1, 4), "lr": FloatDistribution(0.01, 1, log=True)}


def truth(params: Mapping[str, Any]) -> np.ndarray:
    end = 0.5 + 0.05 * params["blocks"] - 0.05 * (np.log10(params["lr"]) + 1) ** 2
    return end - np.array([0.2, 0.1, 0.0])


def measured(count: int, repeats: int, noise: float = 0.01) -> list[Curve]:
    rng = np.random.default_rng(0)
    curves = []
    for row in range(count):
        params = params_at(FORMS, rng.random(2).tolist())
        for _ in range(1 + repeats * (row % 4 == 0)):
            accuracy = truth(params) + noise * rng.standard_normal() + 0.001 * rng.standard_normal(3)
            curves.append(Curve(params, tuple(accuracy), (float(params["blocks"]),) * 3))
    return curves


def test_a_surrogate_finds_the_mean_the_noise_and_the_cost() -> None:
    surrogate = fit_surrogate(FORMS, measured(80, 2))
    unseen = [{"blocks": blocks, "lr": lr} for blocks in (1, 2, 4) for lr in (0.03, 0.1, 0.5)]
    assert np.abs(surrogate.mean(unseen) - [truth(params) for params in unseen]).max() < 0.015
    assert np.allclose(surrogate.seconds(unseen), [params["blocks"] for params in unseen], rtol=0.05)
    assert surrogate.error.seeds == pytest.approx(0.01, rel=0.3)
    assert surrogate.error.rmse == pytest.approx(0.01, rel=0.4)
    assert surrogate.error.spearman > 0.9
    assert surrogate.error.seconds < 0.05
    # A seed moves the whole curve.
    assert surrogate.noise[0, 2] / surrogate.noise[2, 2] > 0.8


def test_a_training_that_diverged_is_worth_a_guess_from_there_on() -> None:
    curves = measured(20, 2, noise=0)
    broken = [Curve({"blocks": 4, "lr": 0.9}, (0.3,), (4.0,))] * 2
    surrogate = fit_surrogate(FORMS, [*curves, *broken], chance=0.1)
    assert surrogate.mean([{"blocks": 4, "lr": 0.9}])[0, -1] < 0.5


def test_without_repeats_nothing_is_known_of_the_noise() -> None:
    with pytest.raises(ValueError, match="no configuration was trained twice"):
        fit_surrogate(FORMS, measured(20, 0))


def test_draws_follow_their_random_numbers() -> None:
    surrogate = fit_surrogate(FORMS, measured(20, 2))
    params = {"blocks": 2, "lr": 0.1}
    first, again = (surrogate.draw(params, np.random.default_rng(3)) for _ in range(2))
    assert first == again
    drawn = [surrogate.draw(params, np.random.default_rng(seed)).accuracy[-1] for seed in range(300)]
    assert np.std(drawn) == pytest.approx(surrogate.error.seeds, rel=0.15)
