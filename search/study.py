"""Create a study, find it again, and refuse what does not belong to it."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from pydantic import ValidationError

from data.errors import UserError, first_line
from search.analysis.selection import candidates, ranked, selection_rule_of
from search.attributes import CONFIRM_SUFFIX, DATASET, DEFINITION, ENVIRONMENT, SPACE_HASH
from search.config.objective import COST_LABELS, Objective, second_objective
from search.config.space import differences, space_hash
from search.config.study_file import StudyConfig, comparable_part
from search.storage.connect import study_names
from search.storage.rdb import RetryingStorage

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class DatasetRecord:
    """The images that a study's scores were measured on.

    Attributes:
        name: ``cifar10``, ``digits`` or ``folder:DIR``.
        fingerprint: of images, labels and division (`data.split.Split`).
        classes: the name of each class.
        fit, validation: numbers of images.
        fallback: digits were used because CIFAR-10 was not available.
    """

    name: str
    fingerprint: str
    classes: tuple[str, ...]
    fit: int
    validation: int
    fallback: bool


@dataclass(frozen=True)
class StudyRecord:
    """A study as it is stored: its definition and its images."""

    name: str
    config: StudyConfig
    dataset: DatasetRecord


def check_name(name: str) -> str:
    """Refuse a name that could not be a folder's name everywhere."""
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name a study: use letters, digits, '.', '_' and '-', at most 100")
    if name.endswith(CONFIRM_SUFFIX):
        raise UserError(
            f"{name!r} cannot name a study: {CONFIRM_SUFFIX!r} at the end stands for another one's confirmation"
        )
    return name


def find(storage: RDBStorage, name: str) -> optuna.Study | None:
    """The study of that name, if this project made one.

    Raises:
        UserError: something else made the study of that name.
    """
    if name not in study_names(storage):
        return None
    study = optuna.load_study(study_name=name, storage=storage)
    if DEFINITION in study.user_attrs:
        return study
    if not study.user_attrs and not study.get_trials(deepcopy=False):
        return study  # its creator died before it could write the definition
    raise UserError(f"study {name!r} was made by something else; choose another --name")


def load(storage: RDBStorage, name: str | None) -> optuna.Study:
    """An existing study by name, or the storage's only search.

    Raises:
        UserError: there is none of that name, or several and no name was given.
    """
    names = [other for other in study_names(storage) if other == name or not other.endswith(CONFIRM_SUFFIX)]
    if name is None:
        if len(names) != 1:
            names_text = f"it has {', '.join(names)}; choose with --name" if names else "it has none yet"
            raise UserError(f"which study? {names_text}")
        name = names[0]
    study = find(storage, name)
    if study is None or DEFINITION not in study.user_attrs:
        names_text = f"this storage has {', '.join(names)}" if names else "this storage has no study yet"
        raise UserError(f"no study {name!r}: {names_text}")
    return study


def record_of(study: optuna.Study) -> StudyRecord | None:
    """What a study's creator stored in it; None if the creator died before it could."""
    attributes = study.user_attrs
    if DEFINITION not in attributes:
        return None
    dataset = attributes[DATASET]
    return StudyRecord(
        name=study.study_name,
        config=definition_of(study),
        dataset=DatasetRecord(**{**dataset, "classes": tuple(dataset["classes"])}),
    )


def create(storage: RDBStorage, record: StudyRecord, environment: Mapping[str, Any]) -> optuna.Study:
    """Create a study, or finish one whose creator died halfway."""
    cost = second_objective(record.config.objective)
    directions, metrics = [StudyDirection.MAXIMIZE], ["validation accuracy"]
    if cost is not None:
        directions, metrics = [*directions, StudyDirection.MINIMIZE], [*metrics, COST_LABELS[cost]]
    study = _created(storage, record.name, directions)
    if len(study.directions) != len(directions):  # its creator wanted another objective, and died
        optuna.delete_study(study_name=record.name, storage=storage)
        study = _created(storage, record.name, directions)
    with experimental_allowed():
        study.set_metric_names(metrics)
    study.set_user_attr(DATASET, asdict(record.dataset))
    study.set_user_attr(SPACE_HASH, space_hash(comparable_part(record.config)))
    study.set_user_attr(ENVIRONMENT, dict(environment))
    study.set_user_attr(DEFINITION, record.config.model_dump(mode="json"))
    return study


def _created(storage: RDBStorage, name: str, directions: list[StudyDirection]) -> optuna.Study:
    return optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)


def update(study: optuna.Study, config: StudyConfig) -> None:
    """Store a definition that differs only in what may change: budget, sampler, pruner, retrain, description."""
    definition = config.model_dump(mode="json")
    if study.user_attrs[DEFINITION] != definition:
        study.set_user_attr(DEFINITION, definition)


def definition_of(study: optuna.Study) -> StudyConfig:
    """A study's definition as it is stored now.

    Raises:
        UserError: this version of the project does not know something in it.
    """
    try:
        return _parsed(json.dumps(study.user_attrs[DEFINITION]))
    except ValidationError as error:
        raise UserError(_other_version(study, first_line(error))) from error


def definition_now(storage: RetryingStorage, study: optuna.Study) -> StudyConfig:
    """Like `definition_of`, by one small statement: workers ask before every trial.

    Raises:
        UserError: this version of the project does not know something in it.
    """
    text = storage.study_attribute(study._study_id, DEFINITION)
    assert text is not None
    try:
        return _parsed(text)
    except ValidationError:
        return definition_of(study)


@lru_cache(maxsize=8)
def _parsed(text: str) -> StudyConfig:
    return StudyConfig.model_validate_json(text)


def refuse_other_reading(study: optuna.Study) -> None:
    """Raise `UserError` if this code reads the study's definition differently from the code that wrote it."""
    if space_hash(comparable_part(definition_of(study))) != study.user_attrs[SPACE_HASH]:
        raise UserError(_other_version(study, "a setting means something else here"))


def _other_version(study: optuna.Study, why: str) -> str:
    commit = study.user_attrs[ENVIRONMENT].get("commit", "unknown")
    return (
        f"study {study.study_name!r} was made by another version of this project ({why}): "
        f"install the one with commit {commit} here"
    )


def refuse_other_space(record: StudyRecord, config: StudyConfig, source: str) -> None:
    """Raise `UserError` with the difference if scores of the two definitions cannot be compared."""
    changed = differences(comparable_part(record.config), comparable_part(config))
    if changed:
        raise UserError(
            f"study {record.name!r} was created with another space or trial length than {source}: "
            f"{'; '.join(changed)}; give the changed one another --name"
        )


def refuse_other_objective(record: StudyRecord, asked: Objective | None) -> None:
    """Raise `UserError` if the objective asked for is not the study's own; None asks for none."""
    if asked not in (None, record.config.objective):
        raise UserError(
            f"study {record.name!r} was created with the objective {record.config.objective}, not {asked}, and keeps "
            "it: leave --objective out, or give the other one another --name"
        )


def refuse_other_data(record: StudyRecord, fingerprint: str) -> None:
    """Raise `UserError` if the images are not those that the study began with."""
    if record.dataset.fingerprint != fingerprint:
        raise UserError(
            f"study {record.name!r} was begun on other images (fingerprint {record.dataset.fingerprint[:12]}, "
            f"these have {fingerprint[:12]}); point --data-dir at those, or give these another --name"
        )


@contextmanager
def experimental_allowed() -> Iterator[None]:
    """Silence Optuna's experimental warnings: such features are used knowingly, and tests notice changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def ranked_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The COMPLETE trials, highest validation accuracy first; ties go to the earliest."""
    return ranked(study.get_trials(deepcopy=False))


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The best COMPLETE trial by the study's aim: the most accurate, the front's knee, or within its limits."""
    return next(iter(candidates(study.get_trials(deepcopy=False), selection_rule_of(study), 1)), None)


FALLBACK_WARNING = (
    "CIFAR-10 was not to be had when this study began, so its scores are those of scikit-learn's 8x8 digits; "
    "for CIFAR-10 give another --name with --dataset cifar10"
)
