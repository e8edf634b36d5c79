"""What known good configurations, tried first, were worth to a search."""

from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial

from search.analysis.outcomes import end_accuracy
from search.attributes import SLOT, START
from search.config.study_file import StudyConfig


def start_value(config: StudyConfig, trials: Sequence[FrozenTrial]) -> dict[str, Any] | None:
    """What a start with known good configurations was worth, beside those drawn before the sampler takes over.

    Returns:
        ``tried`` configurations that ended and their ``best`` accuracy, with its ``trial`` and its ``rank`` among the
        ``complete`` trials now; ``drawn`` at the outset without any knowledge, and the best of these, ``drawn_best``;
        ``helped``: whether the best known one is ahead of that, None where either has none. None where none ran to
        its end.
    """
    ended = [one for one in trials if one.state.is_finished() and SLOT in one.user_attrs]
    complete = [one for one in ended if end_accuracy(one) is not None]
    known = [one for one in complete if START in one.user_attrs]
    if not known:
        return None
    early = set(range(max(config.sampler.startup_trials, len(config.start)))) - set(config.repeat_slots)
    drawn = [one for one in complete if START not in one.user_attrs and one.user_attrs[SLOT] in early]
    best = max(known, key=_accuracy)
    against = max(map(_accuracy, drawn), default=None)
    return {
        "tried": len(known),
        "trial": best.number,
        "best": _accuracy(best),
        "rank": 1 + sum(_accuracy(one) > _accuracy(best) for one in complete),
        "complete": len(complete),
        "drawn": len(drawn),
        "drawn_best": against,
        "helped": None if against is None else _accuracy(best) > against,
    }


def _accuracy(trial: FrozenTrial) -> float:
    accuracy = end_accuracy(trial)
    assert accuracy is not None
    return accuracy
