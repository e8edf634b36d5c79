"""What known good configurations, tried first, were worth to a search."""

from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from search.analysis.outcomes import end_accuracy
from search.attributes import SLOT, START
from search.config.study_file import StudyConfig


@dataclass(frozen=True)
class StartValue:
    """Known good configurations compared with those that were drawn before the sampler took over.

    Attributes:
        tried: known good configurations that ran to their end.
        trial: the best of them.
        best: its accuracy.
        rank: of that accuracy among all ``complete`` trials, 1 for the highest.
        complete: trials that ran to their end.
        drawn: configurations drawn at the start without any knowledge.
        drawn_best: the highest accuracy of those; None if there are none.
        helped: whether ``best`` is higher than ``drawn_best``; None if there is nothing to compare with.
    """

    tried: int
    trial: int
    best: float
    rank: int
    complete: int
    drawn: int
    drawn_best: float | None
    helped: bool | None


def start_value(config: StudyConfig, trials: Sequence[FrozenTrial]) -> StartValue | None:
    """What a start with known good configurations was worth; None if none of them ran to its end."""
    ended = [trial for trial in trials if trial.state.is_finished() and SLOT in trial.user_attrs]
    complete = [trial for trial in ended if end_accuracy(trial) is not None]
    known = [trial for trial in complete if START in trial.user_attrs]
    if not known:
        return None
    early = set(range(max(config.sampler.startup_trials, len(config.start)))) - set(config.repeat_slots)
    drawn = [trial for trial in complete if START not in trial.user_attrs and trial.user_attrs[SLOT] in early]
    best = max(known, key=_accuracy)
    drawn_best = max(map(_accuracy, drawn), default=None)
    return StartValue(
        tried=len(known),
        trial=best.number,
        best=_accuracy(best),
        rank=1 + sum(_accuracy(trial) > _accuracy(best) for trial in complete),
        complete=len(complete),
        drawn=len(drawn),
        drawn_best=drawn_best,
        helped=None if drawn_best is None else _accuracy(best) > drawn_best,
    )


def _accuracy(trial: FrozenTrial) -> float:
    accuracy = end_accuracy(trial)
    assert accuracy is not None
    return accuracy
