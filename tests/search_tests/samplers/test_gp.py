import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from search.config.space import block_width, parameter_distributions, parse_space, relevant, sample
from search.samplers.gp import GaussianSampler

FORMS = {"lr": FloatDistribution(1e-3, 1, log=True), "blocks": IntDistribution(1, 8)}


def sampler_at(slot: int, seed: int = 0, startup: int = 6) -> GaussianSampler:
    return GaussianSampler(FORMS, dict, startup, slot, seed)


def hill(params: Mapping[str, Any]) -> float:
    """Best at a learning rate of 0.1 and six blocks."""
    return 0.9 - 0.1 * (math.log10(params["lr"]) + 1) ** 2 - 0.01 * (params["blocks"] - 6) ** 2


def ask(study: optuna.Study, **options: Any) -> optuna.Trial:
    study.sampler = sampler_at(len(study.trials), **options)
    trial = study.ask()
    trial.suggest_float("lr", 1e-3, 1, log=True)
    trial.suggest_int("blocks", 1, 8)
    return trial


def searched(trials: int, seed: int, noise: float = 0.005, direction: str = "maximize") -> optuna.Study:
    rng = np.random.default_rng(seed)
    study = optuna.create_study(direction=direction)
    sign = 1 if direction == "maximize" else -1
    for _ in range(trials):
        trial = ask(study, seed=seed)
        study.tell(trial, sign * (hill(trial.params) + noise * rng.standard_normal()))
    return study


def test_until_enough_has_ended_the_space_is_filled_evenly() -> None:
    study = optuna.create_study(direction="maximize")
    trials = [ask(study, startup=99) for _ in range(16)]
    assert sorted(trial.params["blocks"] for trial in trials) == sorted([*range(1, 9)] * 2)
    tens = sorted(math.floor((math.log10(trial.params["lr"]) + 3) / 3 * 16) for trial in trials)
    assert tens == list(range(16))


def test_a_slot_gets_the_same_proposal_again() -> None:
    study = searched(9, seed=1)
    params = []
    for _ in range(2):
        study.sampler = sampler_at(9, seed=1)
        trial = study.ask(FORMS)
        params.append(trial.params)
        study.tell(trial, state=TrialState.FAIL)
    assert params[0] == params[1]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_it_finds_the_hill_and_random_draws_do_not(direction: str) -> None:
    best = [max(hill(trial.params) for trial in searched(20, seed, direction=direction).trials) for seed in range(3)]
    drawn = []
    for seed in range(30):
        study = optuna.create_study(sampler=RandomSampler(seed=seed))
        drawn.append(max(hill(study.ask(FORMS).params) for _ in range(20)))
    assert min(best) > 0.897
    assert np.median(drawn) < min(best)


def test_what_others_are_training_is_not_proposed_again() -> None:
    study = searched(15, seed=0)
    alone = ask(study)
    beside = [ask(study) for _ in range(4)]
    everyone = {tuple(trial.params.values()) for trial in (alone, *beside)}
    assert len(everyone) == 5


def test_it_draws_from_spaces_with_choices_and_a_width_for_every_block() -> None:
    space = parse_space(
        {
            "blocks": {"low": 3, "high": 5},
            "block_widths": {"low": 8, "high": 32, "step": 8},
            "activation": ["relu", "gelu"],
        }
    )
    forms = parameter_distributions(space)
    assert isinstance(forms["activation"], CategoricalDistribution)
    study = optuna.create_study(direction="maximize")
    for slot in range(9):
        study.sampler = GaussianSampler(forms, lambda params: relevant(space, params), 4, slot, 0)
        trial = study.ask()
        settings = sample(space, trial)
        assert set(trial.params) == {"blocks", "activation", *map(block_width, range(settings.blocks))}
        study.tell(trial, settings.blocks / 10)
    assert study.best_trial.params["blocks"] == 5
