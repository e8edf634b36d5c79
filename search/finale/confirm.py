"""Confirmation: the best configurations of a search once more, over fresh seeds, before one is called the winner.

The best of many noisy scores flatters itself. So the best configurations are trained again at a trial's full length,
each from the same few seeds that the search has not used, and compared on the validation images.

These trainings are a study of their own, NAME.confirm, in the same storage: every configuration and seed is a slot of
its budget, so all that is true of a search (exact budget, leases, retries, any number of workers on any machines) is
true of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from search import study as studies
from search.analysis.noise import seed_noise
from search.analysis.selection import candidates, selection_rule_of
from search.attributes import ARTIFACTS, CONFIRM_ENTRIES, CONFIRM_SUFFIX, ENVIRONMENT, FLOPS, LATENCY, PARAMETERS, START
from search.config.objective import score
from search.config.study_file import NoiseConfig, PrunerConfig, SamplerConfig, StudyConfig
from search.finale.comparison import Candidate, Comparison, compare
from search.ledger.budget import request_budget
from search.ledger.leases import open_ledger
from search.results import Confirmation, ConfirmedConfiguration, Difference, Optimism, as_json, from_json
from search.samplers.slots import MAX_SEED
from search.storage.connect import exclusive_lock
from search.storage.rdb import RetryingStorage
from search.study import StudyRecord

FIRST_SEED = 700_001


@dataclass(frozen=True)
class _Entry:
    """A slot of the confirming study: the trial that it repeats, the seed that it repeats it from, the parameters."""

    trial: int
    seed: int
    params: dict[str, Any]


def confirm_name(name: str) -> str:
    """The study that confirms a search."""
    return f"{name}{CONFIRM_SUFFIX}"


def confirm_seeds(config: StudyConfig) -> tuple[int, ...]:
    """Seeds of the confirmation; no configuration of the search has one of them
    (`search.samplers.slots.trial_seed`)."""
    return tuple((config.seed * 1_000_003 + FIRST_SEED + row) % MAX_SEED for row in range(config.confirm.seeds))


def prepare(storage: RetryingStorage, study: optuna.Study) -> StudyRecord | None:
    """Create the study that confirms a search, or add what it lacks; any process may, any number of times.

    Args:
        storage: open.
        study: the search, which should be done.

    Returns:
        the confirming study, or None if there is nothing to confirm.
    """
    record = studies.record_of(study)
    assert record is not None
    with exclusive_lock(storage.location, f"{record.name}.creation"):
        best = candidates(
            study.get_trials(deepcopy=False), selection_rule_of(study), record.config.confirm.configurations
        )
        if not best:
            return None
        confirming = studies.find(storage, confirm_name(record.name))
        entries = _entries(confirming) if confirming else []
        for trial in best:
            for seed in confirm_seeds(record.config):
                entry = _Entry(trial.number, seed, trial.params)
                if entry not in entries:
                    entries.append(entry)
        extended = StudyRecord(confirm_name(record.name), _definition(record.config, entries), record.dataset)
        begun = confirming is not None and CONFIRM_ENTRIES in confirming.user_attrs
        if confirming is None or not begun or studies.record_of(confirming) != extended:
            confirming = studies.create(storage, extended, study.user_attrs[ENVIRONMENT])
            confirming.set_user_attr(CONFIRM_ENTRIES, as_json(entries))
        if confirming.user_attrs.get(ARTIFACTS) != (store := study.user_attrs.get(ARTIFACTS)):
            confirming.set_user_attr(ARTIFACTS, store)
        # Also if nothing is new: the process that created the study may have died before this.
        ledger, _ = open_ledger(storage, extended.name, extended.config.workers)
        request_budget(ledger, len(entries), len(entries))
        return extended


def _entries(confirming: optuna.Study) -> list[_Entry]:
    return from_json(list[_Entry], confirming.user_attrs.get(CONFIRM_ENTRIES, []))


def _definition(config: StudyConfig, entries: Sequence[_Entry]) -> StudyConfig:
    return config.model_copy(
        update={
            "objective": "accuracy",  # what is confirmed; a cost is no matter of chance
            "trials": len(entries),
            "sampler": SamplerConfig(kind="random"),  # all parameters are given
            "pruner": PrunerConfig(kind="none"),
            "noise": NoiseConfig(repeats=0),
            "start": tuple(dict(entry.params) for entry in entries),
            "start_seeds": tuple(entry.seed for entry in entries),
        }
    )


def confirmation(storage: RDBStorage, study: optuna.Study) -> Confirmation | None:
    """How the confirmation of a search stands; None before it has begun."""
    record = studies.record_of(study)
    assert record is not None
    confirming = studies.find(storage, confirm_name(record.name))
    if confirming is None or CONFIRM_ENTRIES not in confirming.user_attrs:
        return None
    entries = _entries(confirming)
    ended = confirming.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    rule = selection_rule_of(study)
    searched = study.get_trials(deepcopy=False)
    best = candidates(searched, rule, record.config.confirm.configurations)
    trials = {trial.number: trial for trial in best}
    seeds = confirm_seeds(record.config)
    scores = _scores(entries, ended)
    compared = [
        Candidate(number, trial.user_attrs[FLOPS], {s: v for s, v in scores.get(number, {}).items() if s in seeds})
        for number, trial in trials.items()
    ]
    result = compare(compared, seeds, seed_noise(searched))
    return Confirmation(
        study=confirm_name(record.name),
        chosen_by=rule.rule,
        limits=rule.limits,
        unconfirmed=tuple(number for number in trials if all(entry.trial != number for entry in entries)),
        runs=len(entries),
        done=len(ended),
        seeds=seeds,
        configurations=tuple(_configuration(trials[ranked.key], ranked, result) for ranked in result.ranked),
        noise=result.noise.std if result.noise else None,
        noise_freedom=result.noise.freedom if result.noise else None,
        noise_of_difference=result.noise_of_difference,
        best_mean=result.ranked[0].key if result.tied else None,
        winner=result.winner,
        tie=len(result.tied) > 1,
        tied=result.tied,
        optimism=_optimism(best[0], compared) if best else None,
    )


def _scores(entries: Sequence[_Entry], ended: Sequence[FrozenTrial]) -> dict[int, dict[int, float]]:
    """By trial of the search and by seed, the accuracies of the trainings that went to their end."""
    scores: dict[int, dict[int, float]] = {}
    for trial in ended:
        entry = entries[trial.user_attrs[START]]
        # If a configuration broke twice, its slot has drawn another one.
        accuracy = score(trial) if trial.state == TrialState.COMPLETE else None
        if accuracy is not None and trial.params == entry.params:
            scores.setdefault(entry.trial, {})[entry.seed] = accuracy
    return scores


def _configuration(trial: FrozenTrial, candidate: Candidate, result: Comparison) -> ConfirmedConfiguration:
    behind, margin = result.behind.get(candidate.key), result.margin
    best = candidate.key == result.ranked[0].key
    return ConfirmedConfiguration(
        trial=trial.number,
        params=trial.params,
        parameters=trial.user_attrs[PARAMETERS],
        flops=trial.user_attrs[FLOPS],
        latency=trial.user_attrs.get(LATENCY),
        search_accuracy=score(trial),
        accuracies=candidate.scores,
        mean=candidate.mean,
        std=candidate.std,
        n=len(candidate.scores),
        behind=None
        if behind is None or margin is None or best
        else Difference(behind, behind - margin, behind + margin),
    )


def _optimism(best: FrozenTrial, compared: Sequence[Candidate]) -> Optimism | None:
    """By how much the search's best score flatters its configuration."""
    mean = next((candidate.mean for candidate in compared if candidate.key == best.number), None)
    searched = score(best)
    if mean is None or searched is None:
        return None
    return Optimism(best.number, searched, mean, searched - mean)
