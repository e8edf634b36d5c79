from collections.abc import Sequence

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from scipy import stats

from search.analysis.extrapolation import likely_ends, regression
from search.analysis.noise import SeedNoise

RNG = np.random.default_rng(0)


def pairs(count: int, slope: float = 0.7, noise: float = 0.01, seed: int = 0) -> list[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    early = rng.uniform(0.4, 0.7, count)
    return [(x, 0.25 + slope * x + noise * rng.standard_normal()) for x in early.tolist()]


def test_with_many_trials_it_is_plain_least_squares() -> None:
    known = pairs(500)
    early, late = np.array(known).T
    line = stats.linregress(early, late)
    told = regression(known).at(0.6)
    assert told.mean == pytest.approx(line.intercept + line.slope * 0.6, abs=2e-4)
    residuals = late - line.intercept - line.slope * early
    assert told.scale == pytest.approx(residuals.std(ddof=2), rel=0.02)


def test_with_one_trial_it_gains_what_that_one_gained() -> None:
    told = regression([(0.5, 0.7)]).at(0.55)
    assert told.mean == pytest.approx(0.75)
    assert told.scale > 0.02


def test_chances_are_as_they_are_said() -> None:
    chances, came = [], []
    for seed in range(3000):
        *known, (early, late) = pairs(9, seed=seed, noise=0.02)
        told = regression(known).at(early)
        chances.append(stats.t.sf((0.7 - told.mean) / told.scale, told.freedom))
        came.append(late > 0.7)
    for low, high in ((0.0, 0.1), (0.1, 0.4), (0.4, 0.6), (0.6, 0.9), (0.9, 1.0)):
        here = [(chance, above) for chance, above in zip(chances, came, strict=True) if low <= chance < high]
        expected, told = np.mean(here, axis=0)
        assert abs(expected - told) < 0.05


def test_before_it_has_seen_much_it_expects_the_noise_that_was_measured() -> None:
    known = pairs(3, noise=0.0)
    quiet, loud = (regression(known, SeedNoise(std, 4)).at(0.55).scale for std in (0.001, 0.05))
    assert quiet < regression(known).at(0.55).scale < loud


def test_draws_are_spread_as_the_prediction_is() -> None:
    told = regression(pairs(50)).at(0.6)
    drawn = [told.draw(RNG) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(told.mean, abs=0.002)
    assert np.mean([value > told.mean + told.scale for value in drawn]) == pytest.approx(0.16, abs=0.03)


def study_of(
    curves: Sequence[Sequence[float]], stopped: Sequence[Sequence[float]] = (), direction: str = "maximize"
) -> optuna.Study:
    study = optuna.create_study(direction=direction)
    sign = 1 if direction == "maximize" else -1
    for state, some in ((TrialState.COMPLETE, curves), (TrialState.PRUNED, stopped)):
        for row, curve in enumerate(some):
            values = {epoch: sign * value for epoch, value in enumerate(curve, 1)}
            study.add_trial(
                create_trial(
                    state=state,
                    params={"x": row / 100},
                    distributions={"x": FloatDistribution(0, 1)},
                    value=sign * curve[-1],
                    intermediate_values=values,
                )
            )
    return study


def test_stopped_and_running_trials_count_with_what_their_curves_predict() -> None:
    study = study_of([(0.40 + 0.01 * row, 0.60 + 0.01 * row) for row in range(6)], [(0.30,)])
    begun, unknown = study.ask(), study.ask()
    begun.report(0.44, 1)
    ends = likely_ends(study.get_trials())
    assert ends.numbers == [0, 1, 2, 3, 4, 5, 6, begun.number]
    assert unknown.number not in ends.numbers
    assert ends.accuracies[:6] == [0.60 + 0.01 * row for row in range(6)]
    assert ends.variances[:6] == [0.0] * 6
    assert ends.accuracies[6:] == pytest.approx([0.5, 0.64], abs=0.01)
    assert ends.variances[6] > ends.variances[7] > 0  # the one further away is less sure
    assert likely_ends(study.get_trials(), -1).accuracies[:6] == [-0.60 - 0.01 * row for row in range(6)]


def test_what_diverged_or_did_not_fit_counts_as_the_worst() -> None:
    study = study_of([(0.40 + 0.01 * row, 0.60 + 0.01 * row) for row in range(6)])
    for fault in ("infeasible", "non-finite loss"):
        trial = study.ask()
        trial.set_user_attr("fault", fault)
        trial.report(0.9, 1)
        study.tell(trial, state=TrialState.PRUNED)
    study.tell(study.ask(), state=TrialState.FAIL)
    assert likely_ends(study.get_trials()).accuracies[6:] == [0.6, 0.6]


def test_before_anything_has_ended_nothing_is_known() -> None:
    study = study_of(())
    trial = study.ask()
    trial.report(0.4, 1)
    assert likely_ends(study.get_trials()).numbers == []
