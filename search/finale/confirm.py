"""Confirmation: the best configurations of a search once more, over fresh seeds, before one is called the winner.

The best of many noisy scores flatters itself. So the best configurations are trained again at a trial's full length,
each from the same few seeds that the search has not used, and compared on the validation images.

These trainings are a study of their own, NAME.confirm, in the same storage: every configuration and seed is a slot of
its budget, so all that holds of a search (exact budget, leases, retries, any number of workers on any machines) holds
of them.
"""

from collections.abc import Mapping, Sequence
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
from search.samplers.slots import MAX_SEED
from search.storage.connect import exclusive_lock
from search.storage.rdb import RetryingStorage
from search.study import StudyRecord

FIRST_SEED = 700_001


def confirm_name(name: str) -> str:
    """The study that confirms a search."""
    return f"{name}{CONFIRM_SUFFIX}"


def confirm_seeds(config: StudyConfig) -> tuple[int, ...]:
    """Seeds of the confirmation; no configuration of the search has one of them
    (`search.samplers.slots.trial_seed`)."""
    return tuple((config.seed * 1_000_003 + FIRST_SEED + row) % MAX_SEED for row in range(config.confirm.seeds))


def prepare(storage: RetryingStorage, study: optuna.Study) -> StudyRecord | None:
    """Create the study that confirms a search, or give it what it lacks; anyone may, any number of times.

    Args:
        storage: open.
        study: the search, which should be done.

    Returns:
        the confirming study, or None where there is nothing to confirm.
    """
    record = studies.record_of(study)
    assert record is not None
    with exclusive_lock(storage.location, f"{record.name}.creation"):
        best = candidates(
            study.get_trials(deepcopy=False), selection_rule_of(study), record.config.confirm.configurations
        )
        if not best:
            return None
        found = studies.find(storage, confirm_name(record.name))
        entries: list[dict[str, Any]] = list(found.user_attrs.get(CONFIRM_ENTRIES, [])) if found else []
        for trial in best:
            for seed in confirm_seeds(record.config):
                entry = {"trial": trial.number, "seed": seed, "params": trial.params}
                if entry not in entries:
                    entries.append(entry)
        confirming = StudyRecord(confirm_name(record.name), _definition(record.config, entries), record.dataset)
        if found is None or CONFIRM_ENTRIES not in found.user_attrs or studies.record_of(found) != confirming:
            found = studies.create(storage, confirming, study.user_attrs[ENVIRONMENT])
            found.set_user_attr(CONFIRM_ENTRIES, entries)
        if found.user_attrs.get(ARTIFACTS) != (store := study.user_attrs.get(ARTIFACTS)):
            found.set_user_attr(ARTIFACTS, store)
        # Also where nothing is new: whoever created the study may have died before this.
        ledger, _ = open_ledger(storage, confirming.name, confirming.config.workers)
        request_budget(ledger, len(entries), len(entries))
        return confirming


def _definition(config: StudyConfig, entries: Sequence[Mapping[str, Any]]) -> StudyConfig:
    return config.model_copy(
        update={
            "objective": "accuracy",  # what is confirmed; a cost is no matter of chance
            "trials": len(entries),
            "sampler": SamplerConfig(kind="random"),  # all parameters are given
            "pruner": PrunerConfig(kind="none"),
            "noise": NoiseConfig(repeats=0),
            "start": tuple(dict(entry["params"]) for entry in entries),
            "start_seeds": tuple(entry["seed"] for entry in entries),
        }
    )


def confirmation(storage: RDBStorage, study: optuna.Study) -> dict[str, Any] | None:
    """How the confirmation of a search stands; None before it has begun.

    Returns:
        study: its name. runs, done: trainings in all, and those that have ended.
        seeds: that every configuration gets.
        configurations: best mean first, each with ``trial``, ``params``, ``parameters``, ``flops``,
            ``search_accuracy``, ``accuracies`` by seed, ``mean``, ``std``, ``n``, and ``behind``: the difference of the
            best mean and this one, with its 95 % interval; ``latency`` where the search measured it.
        chosen_by, limits: how they were chosen (`search.analysis.selection`).
        unconfirmed: trials among them that no training was asked for yet, as the limits have changed since.
        noise, noise_of_difference: see `search.finale.comparison.Comparison`; noise_freedom: the former's degrees of
        freedom.
        best_mean, winner, tie, tied: trials of the search.
        optimism: the best trial's score in the search beside its confirmed mean.
    """
    record = studies.record_of(study)
    assert record is not None
    found = studies.find(storage, confirm_name(record.name))
    if found is None or CONFIRM_ENTRIES not in found.user_attrs:
        return None
    entries = found.user_attrs[CONFIRM_ENTRIES]
    ended = found.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    scores: dict[int, dict[int, float]] = {}
    for trial in ended:
        entry = entries[trial.user_attrs[START]]
        # Where a configuration broke twice, its slot has drawn another one.
        accuracy = score(trial) if trial.state == TrialState.COMPLETE else None
        if accuracy is not None and trial.params == entry["params"]:
            scores.setdefault(entry["trial"], {})[entry["seed"]] = accuracy
    wanted = selection_rule_of(study)
    searched = study.get_trials(deepcopy=False)
    best = candidates(searched, wanted, record.config.confirm.configurations)
    trials = {trial.number: trial for trial in best}
    seeds = confirm_seeds(record.config)
    compared = [
        Candidate(number, trial.user_attrs[FLOPS], {s: v for s, v in scores.get(number, {}).items() if s in seeds})
        for number, trial in trials.items()
    ]
    result = compare(compared, seeds, seed_noise(searched))
    return {
        "study": confirm_name(record.name),
        "chosen_by": wanted.rule,
        "limits": dict(wanted.limits.most),
        "unconfirmed": [number for number in trials if all(entry["trial"] != number for entry in entries)],
        "runs": len(entries),
        "done": len(ended),
        "seeds": list(seeds),
        "configurations": [_row(trials[one.key], one, result) for one in result.ranked],
        "noise": result.noise and result.noise.std,
        "noise_freedom": result.noise and result.noise.freedom,
        "noise_of_difference": result.noise_of_difference,
        "best_mean": result.ranked[0].key if result.tied else None,
        "winner": result.winner,
        "tie": len(result.tied) > 1,
        "tied": list(result.tied),
        "optimism": _optimism(best[0], compared) if best else None,
    }


def _row(trial: FrozenTrial, candidate: Candidate, result: Comparison) -> dict[str, Any]:
    behind = result.behind.get(candidate.key)
    margin = result.margin
    return {
        "trial": trial.number,
        "params": trial.params,
        "parameters": trial.user_attrs[PARAMETERS],
        "flops": trial.user_attrs[FLOPS],
        **{name: trial.user_attrs[name] for name in (LATENCY,) if name in trial.user_attrs},
        "search_accuracy": score(trial),
        "accuracies": {str(seed): score for seed, score in candidate.scores.items()},
        "mean": candidate.mean,
        "std": candidate.std,
        "n": len(candidate.scores),
        "behind": None
        if behind is None or margin is None or candidate.key == result.ranked[0].key
        else {"mean": behind, "low": behind - margin, "high": behind + margin},
    }


def _optimism(best: FrozenTrial, compared: Sequence[Candidate]) -> dict[str, Any] | None:
    """By how much the search's best score flatters its configuration."""
    mean = next((one.mean for one in compared if one.key == best.number), None)
    told = score(best)
    if mean is None or told is None:
        return None
    return {"trial": best.number, "score": told, "confirmed": mean, "difference": told - mean}
