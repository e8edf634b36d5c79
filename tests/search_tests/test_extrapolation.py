from collections.abc import Sequence

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from scipy import stats

from search.extrapolation import ExtrapolationPruner, likely_ends, regression

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
        chances.append(regression(known).at(early).chance_above(0.7))
        came.append(late > 0.7)
    for low, high in ((0.0, 0.1), (0.1, 0.4), (0.4, 0.6), (0.6, 0.9), (0.9, 1.0)):
        here = [(chance, above) for chance, above in zip(chances, came, strict=True) if low <= chance < high]
        expected, told = np.mean(here, axis=0)
        assert abs(expected - told) < 0.05


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


def stops(study: optuna.Study, curve: Sequence[float], **options: float) -> bool:
    pruner = ExtrapolationPruner(
        **{"top": 2, "trials": 20, "chance": 0.05, "startup_trials": 5, "warmup_epochs": 1, **options}  # type: ignore
    )
    sign = 1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1
    trial = create_trial(
        state=TrialState.RUNNING, params={}, distributions={},
        intermediate_values={epoch: sign * value for epoch, value in enumerate(curve, 1)},
    )  # fmt: skip
    return pruner.prune(study, trial)


CURVES = [(0.40 + 0.01 * row, 0.60 + 0.01 * row, 0.70 + 0.01 * row) for row in range(12)]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_it_stops_the_hopeless_and_no_other(direction: str) -> None:
    study = study_of(CURVES, direction=direction)
    assert stops(study, (0.30,))
    assert stops(study, (0.51, 0.50))
    assert not stops(study, (0.51,))
    assert not stops(study, (0.20, 0.72))


def test_warm_up_and_start_up() -> None:
    study = study_of(CURVES)
    assert not stops(study, (0.1,), warmup_epochs=2)
    assert stops(study, (0.1, 0.1), warmup_epochs=2)
    assert not stops(study, (0.1,), startup_trials=13)
    assert not stops(study_of(()), (0.1,), startup_trials=0)


def test_the_more_count_as_best_the_more_go_on() -> None:
    study = study_of(CURVES)
    assert stops(study, (0.44,), top=1)
    assert not stops(study, (0.44,), top=20)


def test_stopped_trials_count_among_those_that_the_best_are_a_share_of_but_have_no_end() -> None:
    few = study_of(CURVES)
    many = study_of(CURVES, [(0.2, 0.99)] * 60)
    near = (0.47,)
    assert stops(few, near, top=2)
    assert not stops(many, near, top=2)


def test_noise_that_was_measured_takes_the_place_of_what_is_expected_of_it() -> None:
    quiet, loud = study_of(CURVES), study_of(CURVES)
    for study, apart in ((quiet, 0.0005), (loud, 0.02)):
        for way in (-1, 1):
            end = 0.7 + way * apart
            study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE,
                    params={"x": 0.99},
                    distributions={"x": FloatDistribution(0, 1)},
                    value=end,
                    intermediate_values={1: end - 0.3, 2: end - 0.1, 3: end},
                )
            )
    between = (0.492,)
    assert not stops(study_of(CURVES), between)
    assert stops(quiet, between)
    assert not stops(loud, between)


def test_a_number_that_is_none_has_no_chance() -> None:
    assert stops(study_of(CURVES), (float("nan"),))


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
