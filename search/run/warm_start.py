"""Known good configurations to try first, taken from earlier studies.

A study file lists some (``[[start]]``); `run --warm-start STUDY` adds the best that an earlier study on the same images
found. They are ordinary trials: the sampler learns from them, and bad ones cost only their time.
`search.analysis.starts.start_value` says whether they helped.
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
"""The most configurations to take from one study."""


def warm_started(storage: RDBStorage, record: StudyRecord, name: str) -> StudyRecord:
    """Add the best configurations of an earlier study to those that a study tries first.

    Raises:
        UserError: there is no such study, it has other images, or none of its trials fits this study's space.
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
    """Append the new starts; the earlier ones keep their places, because slots refer to these."""
    starts = list(before)
    for start in more:
        if start not in starts:
            starts.append(start)
    return tuple(starts)


def _best(storage: RDBStorage, study: optuna.Study) -> list[Mapping[str, Any]]:
    """Configurations by their confirmed means, if there are any; then by their scores."""
    confirmed = confirmation(storage, study)
    rows = confirmed.configurations if confirmed else ()
    best = [row.params for row in rows if row.mean is not None]
    for trial in candidates(study.get_trials(deepcopy=False), selection_rule_of(study), len(best) + MOST_STARTS):
        if trial.params not in best:
            best.append(trial.params)
    return best


def offers(storage: RDBStorage, record: StudyRecord) -> list[str]:
    """Other searches in a storage that may be a warm start: same images, same objective."""
    names = []
    for name in study_names(storage):
        if name == record.name or name.endswith(CONFIRM_SUFFIX):
            continue
        attributes = optuna.load_study(study_name=name, storage=storage).user_attrs
        same = attributes.get(DATASET, {}).get("fingerprint") == record.dataset.fingerprint
        if same and attributes.get(DEFINITION, {}).get("objective") == record.config.objective:
            names.append(name)
    return names
