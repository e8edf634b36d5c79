"""How far chance moves a score: its estimate, and the trainings that it is measured by."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from data.errors import UserError
from search.analysis.noise import SeedNoise, combined_noise, pooled_noise, seed_noise
from search.config.study_file import NoiseConfig, SamplerConfig, StudyConfig, find_study, parse_study
from search.samplers.slots import given_parameters
from support.trials import trial

COMPLETE, PRUNED, RUNNING, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL


def test_noise_is_pooled_over_what_was_trained_more_than_once() -> None:
    trials = [
        trial(0, 0.70, lr=0.1), trial(1, 0.72, lr=0.1), trial(2, 0.50, lr=0.2), trial(3, 0.50, lr=0.2),
        trial(4, 0.53, lr=0.2), trial(5, 0.9, lr=0.3), trial(6, lr=0.3, state=FAIL),
    ]  # fmt: skip
    noise = seed_noise(trials)
    assert noise is not None
    assert noise.freedom == 3
    assert noise.std == pytest.approx(math.sqrt((0.0002 + 0.0006) / 3))
    assert seed_noise([trial(0), trial(1)]) is None


def test_estimates_count_by_their_degrees_of_freedom() -> None:
    whole = pooled_noise([(0.1, 0.3, 0.2), (0.5, 0.6), (0.9,)])
    parts = combined_noise(pooled_noise([(0.1, 0.3, 0.2)]), None, pooled_noise([(0.5, 0.6)]))
    assert whole is not None
    assert parts is not None
    assert (parts.std, parts.freedom) == (pytest.approx(whole.std), whole.freedom)
    assert combined_noise(None, SeedNoise(0.1, 3)) == SeedNoise(pytest.approx(0.1), 3)
    assert combined_noise() is None
    assert combined_noise(None, None) is None


def test_the_estimate_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    squares = []
    for _ in range(2000):
        noise = pooled_noise(rng.normal(0.7, 0.01, (2, 3)).tolist())
        assert noise is not None
        squares.append(noise.std**2)
    assert np.mean(squares) == pytest.approx(0.01**2, rel=0.05)


def config(**changes: Any) -> StudyConfig:
    found = find_study("cpu")[1].model_copy(update={"sampler": SamplerConfig(startup_trials=4), "trials": 100})
    return found.model_copy(update=changes)


@pytest.mark.parametrize(
    ("trials", "repeats", "slots"),
    [(100, 2, [2, 3]), (39, 2, [3]), (20, 2, [3]), (19, 2, []), (100, 0, []), (100, 9, [1, 2, 3, 4, 5])],
)
def test_few_trials_are_repeats_and_in_a_small_budget_none(trials: int, repeats: int, slots: list[int]) -> None:
    assert list(config(trials=trials, noise=NoiseConfig(repeats=repeats)).repeat_slots) == slots


def test_repeats_come_behind_the_known_good_configurations() -> None:
    assert list(config(start=({"lr": 0.1},) * 7).repeat_slots) == [7, 8]
    assert list(config(start=({"lr": 0.1},) * 3).repeat_slots) == [3, 4]


def test_a_study_file_can_ask_for_more_repeats_or_none() -> None:
    table = {"trial": {"epochs": 1}, "retrain": {"epochs": 1}, "space": {}}
    assert parse_study(table, "f").noise.repeats == 2
    assert parse_study({**table, "noise": {"repeats": 0}}, "f").noise.repeats == 0
    with pytest.raises(UserError, match=r"f: noise\.repeats: should be greater than or equal to 0, got -1"):
        parse_study({**table, "noise": {"repeats": -1}}, "f")


def given(trials: Sequence[FrozenTrial], slot: int = 2, start: int | None = None, **changes: Any) -> dict[str, Any]:
    return dict(given_parameters(config(**changes), slot, start, lambda: trials))


def test_the_first_configuration_is_repeated_whatever_its_score() -> None:
    trials = [trial(2, 0.9), trial(0, 0.1, lr=0.5), trial(1, 0.95)]
    assert given(trials) == {"lr": 0.5}
    assert given(trials, slot=3) == {"lr": 0.5}
    assert given(trials, slot=4) == {}


def test_what_failed_or_was_stopped_is_not_repeated_what_runs_is() -> None:
    trials = [trial(0, lr=0.5, state=FAIL), trial(1, lr=0.6, state=PRUNED), trial(2, lr=0.7, state=RUNNING)]
    assert given([*trials, trial(3)]) == {"lr": 0.7}
    unknown = create_trial(state=RUNNING, params={}, distributions={}, user_attrs={"slot": 0})
    assert given([unknown]) == {}
    foreign = create_trial(value=0.5, params={"lr": 0.5}, distributions={"lr": FloatDistribution(0.01, 1.0)})
    assert given([foreign]) == {}
    assert given([foreign, trial(1, lr=0.6)]) == {"lr": 0.6}
    assert given([]) == {}


def test_a_known_good_configuration_has_its_parameters_and_asks_for_no_trials() -> None:
    def never() -> Sequence[FrozenTrial]:
        raise AssertionError

    starts = ({"lr": 0.1}, {"lr": 0.2})
    assert given_parameters(config(start=starts), 4, 1, never) == {"lr": 0.2}
    assert given_parameters(config(start=starts), 0, 2, never) == {}
    assert given_parameters(config(start=starts), 1, None, never) == {}
