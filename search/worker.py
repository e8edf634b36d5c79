"""The loop that works a study's budget off, one trial after another."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import optuna

from data.split import Split, first_images
from search.errors import RunError
from search.events import Best, Note, SearchStarted, Show, TrialFinished
from search.ledger import budget, hand_back, recover
from search.study import best_trial, build_pruner, build_sampler
from search.study_file import StudyConfig
from search.trial import StopTrial, TrialResult, run_trial

FAILURES_IN_A_ROW = 3
"""So many attempts failing one after another are no accident: the run stops and says why."""


@dataclass(frozen=True)
class SearchEnd:
    """Whether the whole budget is done, or else the time was up."""

    finished: bool


def search(study: optuna.Study, config: StudyConfig, split: Split, show: Show, timeout: float | None) -> SearchEnd:
    """Run trials until the budget is done or the time is up. The caller holds the study alone.

    Raises:
        RunError: several trials in a row failed.
        KeyboardInterrupt: the running trial is back in the queue.
    """
    deadline = time.monotonic() + timeout if timeout is not None else None
    split = first_images(split, config.trial.train_images or len(split.fit_labels))
    study.pruner = build_pruner(config.pruner)
    for number in recover(study):
        show(Note(f"trial {number} was cut off by a crash; its configuration is back in the queue"))
    show(SearchStarted(budget(study, config.trials), best_so_far(study)))

    def time_is_up() -> bool:
        return deadline is not None and time.monotonic() >= deadline

    failures = 0
    while budget(study, config.trials).remaining:
        if time_is_up():
            return SearchEnd(finished=False)
        result = _one_trial(study, config, split, show, time_is_up)
        if result is None:
            return SearchEnd(finished=False)
        failures = failures + 1 if result.outcome == "failed" else 0
        if failures == FAILURES_IN_A_ROW:
            raise RunError(
                f"{failures} trials in a row failed, the last one with: {result.cause}; "
                "the tracebacks are in the trials' attributes, and the same command goes on where this stopped"
            )
    return SearchEnd(finished=True)


def _one_trial(
    study: optuna.Study, config: StudyConfig, split: Split, show: Show, time_is_up: Callable[[], bool]
) -> TrialResult | None:
    """The next trial's result, or None where the time was up in the middle of it."""
    start = time.perf_counter()
    study.sampler = build_sampler(config, number=len(study.get_trials(deepcopy=False)))
    trial = study.ask()

    def finished(result: TrialResult) -> None:
        show(
            TrialFinished(
                trial.number,
                result.outcome,
                result.accuracy,
                result.epochs,
                time.perf_counter() - start,
                result.cause,
                budget(study, config.trials),
                best_so_far(study),
            )
        )

    try:
        result = run_trial(trial, config, split, show, time_is_up)
    except (StopTrial, KeyboardInterrupt) as stop:
        cause = "time is up" if isinstance(stop, StopTrial) else "interrupted"
        hand_back(study, study.get_trials(deepcopy=False)[trial.number], cause)
        finished(TrialResult(optuna.trial.TrialState.FAIL, "handed back", None, 0, cause))
        if isinstance(stop, KeyboardInterrupt):
            raise
        return None
    finished(result)
    return result


def best_so_far(study: optuna.Study) -> Best | None:
    """The best COMPLETE trial, as it is shown."""
    trial = best_trial(study)
    if trial is None or trial.value is None:
        return None
    return Best(trial.number, trial.value, trial.user_attrs["parameters"])
