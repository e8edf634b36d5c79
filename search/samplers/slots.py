"""What each slot of a budget begins with: its sampler, given parameters, seed, and whether it is audited."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from search.attributes import SLOT
from search.config.objective import second_objective
from search.config.space import PER_BLOCK, parameter_distributions, relevant
from search.config.study_file import StudyConfig
from search.study import experimental_allowed

MAX_SEED = 2**31
MOST_GAUSSIAN = 300
"""Slots from here on are TPE's: a Gaussian process of 300 trials takes 0.24 s of two cores for a proposal, of 1,000
3 s."""


def build_sampler(config: StudyConfig, number: int) -> BaseSampler:
    """The sampler for slot ``number``.

    It is seeded by study and slot, so an interrupted study continues with the draws of an uninterrupted one instead of
    starting the same random sequence again.
    """
    seed = (config.seed * 1_000_003 + number) % MAX_SEED
    if config.sampler.kind == "random":
        return RandomSampler(seed=seed)
    if config.sampler.kind == "gp" and second_objective(config.objective) is None and number < MOST_GAUSSIAN:
        from search.samplers.gp import GaussianSampler  # scikit-learn takes a second, too long for `status`

        return GaussianSampler(
            parameter_distributions(config.space),
            lambda params: relevant(config.space, params),
            config.sampler.startup_trials,
            number,
            config.seed,
        )
    with experimental_allowed():
        return TPESampler(
            n_startup_trials=config.sampler.startup_trials,
            multivariate=True,
            group=PER_BLOCK in config.space.varied,  # only then do trials differ in which parameters they have
            seed=seed,
        )


def given_parameters(
    config: StudyConfig, slot: int, start: int | None, trials: Callable[[], Sequence[FrozenTrial]]
) -> Mapping[str, Any]:
    """Parameters that a slot's configuration has from the outset; the sampler draws the others.

    Args:
        config: of the study.
        slot: of the configuration.
        start: index of the known good configuration that the slot begins with, if any.
        trials: of the study, called if the slot repeats a configuration. That is the first one, a known good one if the
            study has any. Its score does not decide: a configuration chosen for its score has a lucky one.
    """
    if start is not None:
        return config.start[start] if start < len(config.start) else {}
    if slot not in config.repeat_slots:
        return {}
    states = (TrialState.COMPLETE, TrialState.RUNNING)
    sampled = [trial for trial in trials() if trial.params and trial.state in states]
    slotted = [trial for trial in sampled if SLOT in trial.user_attrs]
    return min(slotted, key=lambda trial: trial.user_attrs[SLOT]).params if slotted else {}


def is_audited(config: StudyConfig, slot: int) -> bool:
    """Whether a configuration runs to its end even if the pruner would stop it; decided by seed and slot alone."""
    return random.Random(f"{config.seed} {slot}").random() < config.pruner.audit


def trial_seed(config: StudyConfig, slot: int, start: int | None = None) -> int:
    """Seed of one configuration's weights and batches; every attempt at it has the same.

    Args:
        config: of the study.
        slot: of the configuration.
        start: index of the known good configuration that the slot begins with, if any.
    """
    if start is not None and start < len(config.start_seeds):
        return config.start_seeds[start]
    return (config.seed * 1_000_003 + slot) % MAX_SEED
