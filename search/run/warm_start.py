"""Known good configurations, tried first: those of earlier studies, and whether such a start has helped.

A study file names some (``[[start]]``); `run --warm-start STUDY` adds the best that an earlier study on the same images
has found. They are ordinary trials: the sampler learns from them, and where they are bad they cost their time and
nothing else. `search.analysis.starts.start_value` says whether they were any good.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.storages import RDBStorage

from data.errors import UserError
from search import study as studies
from search.analysis.selection import candidates, selection_rule_of
from search.attributes import CONFIRM_SUFFIX, DATASET, DEFINITION
from search.config.space import fitting
from search.config.study_file import Start
from search.finale.confirm import confirmation
from search.storage.connect import study_names
from search.study import StudyRecord

MOST_STARTS = 3
"""Configurations that are taken over from one study."""


def warm_started(storage: RDBStorage, record: StudyRecord, name: str) -> StudyRecord:
    """A study with the best configurations of an earlier one among those that it tries first.

    Raises:
        UserError: there is no such study, it has other images, or nothing of it fits this study's space.
    """
    if name == record.name:
        raise UserError(f"study {name!r} cannot be its own warm start; name an earlier one")
    earlier = studies.load(storage, name)
    earlier_record = studies.record_of(earlier)
    assert earlier_record is not None  # load refuses a study without one
    if earlier_record.dataset.fingerprint != record.dataset.fingerprint:
        raise UserError(
            f"study {name!r} searched other images ({earlier_record.dataset.name}, fingerprint "
            f"{earlier_record.dataset.fingerprint[:12]}), so it is no warm start for {record.name!r}"
        )
    fitting_starts = [start for params in _best(storage, earlier) if (start := fitting(record.config.space, params))]
    if not fitting_starts:
        raise UserError(f"nothing that study {name!r} ran to its end fits the space of {record.name!r}")
    starts = joined(record.config.start, fitting_starts[:MOST_STARTS])
    return StudyRecord(record.name, record.config.model_copy(update={"start": starts}), record.dataset)


def joined(before: Sequence[Start], more: Sequence[Start]) -> tuple[Start, ...]:
    """Those before in their places, to which slots refer, and behind them the new ones."""
    starts = list(before)
    for start in more:
        if start not in starts:
            starts.append(start)
    return tuple(starts)


def _best(storage: RDBStorage, study: optuna.Study) -> list[Mapping[str, Any]]:
    """Configurations by their confirmed means, where there are any; then by their scores."""
    confirmed = confirmation(storage, study)
    rows = confirmed.configurations if confirmed else ()
    best = [row.params for row in rows if row.mean is not None]
    for trial in candidates(study.get_trials(deepcopy=False), selection_rule_of(study), len(best) + MOST_STARTS):
        if trial.params not in best:
            best.append(trial.params)
    return best


def offers(storage: RDBStorage, record: StudyRecord) -> list[str]:
    """Other searches of the same images and objective in a storage, of which one may be a warm start."""
    names = []
    for name in study_names(storage):
        if name == record.name or name.endswith(CONFIRM_SUFFIX):
            continue
        attributes = optuna.load_study(study_name=name, storage=storage).user_attrs
        same = attributes.get(DATASET, {}).get("fingerprint") == record.dataset.fingerprint
        if same and attributes.get(DEFINITION, {}).get("objective") == record.config.objective:
            names.append(name)
    return names
