"""Creating a study, finding it again, and refusing what does not belong to it."""

import json
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from search.choice import aim_of, candidates, ranked
from search.errors import UserError, first_line
from search.ledger import SLOT
from search.objective import METRICS, Objective, second_objective
from search.persistent import PersistentStorage
from search.space import PER_BLOCK, differences, parameter_distributions, relevant, space_hash
from search.storage import study_names
from search.study_file import StudyConfig, comparable_part

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
CONFIRM = ".confirm"
"""Ends the name of the study that confirms another one's best configurations (`search.confirm`)."""
FINALE = "finale"
"""User attribute of a search: whether its end is followed by a confirmation and a retrain."""
ARTIFACTS = "artifacts"
"""User attribute of a study: the URL of the store (`search.artifacts`) that its files are copied to."""
MAX_SEED = 2**31
MOST_GAUSSIAN = 300
"""Slots from here on are TPE's: a Gaussian process of 300 trials takes 0.24 s of two cores for a proposal, of 1,000
3 s."""
DIVISION_SEED = 0
"""Of the division into fit and validation images: one division for all studies, so that they can be compared."""


@dataclass(frozen=True)
class DatasetRecord:
    """The images that a study's scores were measured on.

    Attributes:
        name: ``cifar10``, ``digits`` or ``folder:DIR``.
        fingerprint: of images, labels and division (`data.split.Split`).
        classes: the name of each class.
        fit, validation: numbers of images.
        fallback: digits taken because CIFAR-10 was not to be had.
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
    if name.endswith(CONFIRM):
        raise UserError(f"{name!r} cannot name a study: {CONFIRM!r} at the end stands for another one's confirmation")
    return name


def find(storage: RDBStorage, name: str) -> optuna.Study | None:
    """The study of that name, if there is one that this project made.

    Raises:
        UserError: the study of that name was made by something else.
    """
    if name not in study_names(storage):
        return None
    study = optuna.load_study(study_name=name, storage=storage)
    if "definition" in study.user_attrs:
        return study
    if not study.user_attrs and not study.get_trials(deepcopy=False):
        return study  # its creator died before it could write the definition
    raise UserError(f"study {name!r} was made by something else; choose another --name")


def load(storage: RDBStorage, name: str | None) -> optuna.Study:
    """An existing study by name, or the storage's only search.

    Raises:
        UserError: there is none of that name, or several and no name was given.
    """
    names = [one for one in study_names(storage) if one == name or not one.endswith(CONFIRM)]
    if name is None:
        if len(names) != 1:
            there = f"it has {', '.join(names)}; choose with --name" if names else "it has none yet"
            raise UserError(f"which study? {there}")
        name = names[0]
    study = find(storage, name)
    if study is None or "definition" not in study.user_attrs:
        there = f"this storage has {', '.join(names)}" if names else "this storage has no study yet"
        raise UserError(f"no study {name!r}: {there}")
    return study


def record_of(study: optuna.Study) -> StudyRecord | None:
    """What a study's creator stored in it; None where the creator died before it could."""
    attributes = study.user_attrs
    if "definition" not in attributes:
        return None
    dataset = attributes["dataset"]
    return StudyRecord(
        name=study.study_name,
        config=definition_of(study),
        dataset=DatasetRecord(**{**dataset, "classes": tuple(dataset["classes"])}),
    )


def create(storage: RDBStorage, record: StudyRecord, environment: Mapping[str, Any]) -> optuna.Study:
    """Create a study, or finish one whose creator died half-way."""
    cost = second_objective(record.config.objective)
    directions, metrics = [StudyDirection.MAXIMIZE], ["validation accuracy"]
    if cost is not None:
        directions, metrics = [*directions, StudyDirection.MINIMIZE], [*metrics, METRICS[cost]]
    study = _created(storage, record.name, directions)
    if len(study.directions) != len(directions):  # of a creator that wanted another objective, and died
        optuna.delete_study(study_name=record.name, storage=storage)
        study = _created(storage, record.name, directions)
    with _experimental():
        study.set_metric_names(metrics)
    study.set_user_attr("dataset", asdict(record.dataset))
    study.set_user_attr("space_hash", space_hash(comparable_part(record.config)))
    study.set_user_attr("environment", dict(environment))
    study.set_user_attr("definition", record.config.model_dump(mode="json"))
    return study


def _created(storage: RDBStorage, name: str, directions: list[StudyDirection]) -> optuna.Study:
    return optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)


def update(study: optuna.Study, config: StudyConfig) -> None:
    """Store a definition that differs only in what may change: budget, sampler, pruner, retrain, description."""
    definition = config.model_dump(mode="json")
    if study.user_attrs["definition"] != definition:
        study.set_user_attr("definition", definition)


def definition_of(study: optuna.Study) -> StudyConfig:
    """A study's definition as it is stored at this moment.

    Raises:
        UserError: this version of the project does not know something in it.
    """
    try:
        return _parsed(json.dumps(study.user_attrs["definition"]))
    except ValidationError as error:
        raise UserError(_other_version(study, first_line(error))) from error


def definition_now(storage: PersistentStorage, study: optuna.Study) -> StudyConfig:
    """The same by one small statement: workers ask before every trial.

    Raises:
        UserError: this version of the project does not know something in it.
    """
    text = storage.study_attribute(study._study_id, "definition")
    assert text is not None
    try:
        return _parsed(text)
    except ValidationError:
        return definition_of(study)


@lru_cache(maxsize=8)
def _parsed(text: str) -> StudyConfig:
    return StudyConfig.model_validate_json(text)


def refuse_other_reading(study: optuna.Study) -> None:
    """Raise `UserError` where this code reads the study's definition differently than the code that wrote it."""
    if space_hash(comparable_part(definition_of(study))) != study.user_attrs["space_hash"]:
        raise UserError(_other_version(study, "a setting means something else here"))


def _other_version(study: optuna.Study, why: str) -> str:
    commit = study.user_attrs["environment"].get("commit", "unknown")
    return (
        f"study {study.study_name!r} was made by another version of this project ({why}): "
        f"install the one with commit {commit} here"
    )


def refuse_other_space(record: StudyRecord, config: StudyConfig, source: str) -> None:
    """Raise `UserError` with the difference where scores of the two definitions cannot be compared."""
    changed = differences(comparable_part(record.config), comparable_part(config))
    if changed:
        raise UserError(
            f"study {record.name!r} was created with another space or trial length than {source}: "
            f"{'; '.join(changed)}; give the changed one another --name"
        )


def refuse_other_objective(record: StudyRecord, asked: Objective | None) -> None:
    """Raise `UserError` where somebody asks a study for another objective than its own; None asks for none."""
    if asked not in (None, record.config.objective):
        raise UserError(
            f"study {record.name!r} was created with the objective {record.config.objective}, not {asked}, and keeps "
            "it: leave --objective out, or give the other one another --name"
        )


def refuse_other_data(record: StudyRecord, fingerprint: str) -> None:
    """Raise `UserError` where the images are not those that the study began with."""
    if record.dataset.fingerprint != fingerprint:
        raise UserError(
            f"study {record.name!r} was begun on other images (fingerprint {record.dataset.fingerprint[:12]}, "
            f"these have {fingerprint[:12]}); point --data-dir at those, or give these another --name"
        )


def build_sampler(config: StudyConfig, number: int) -> BaseSampler:
    """The sampler for slot ``number``.

    It is seeded by study and slot, so an interrupted study goes on with the draws of an uninterrupted one
    instead of starting the same random sequence again.
    """
    seed = (config.seed * 1_000_003 + number) % MAX_SEED
    if config.sampler.kind == "random":
        return RandomSampler(seed=seed)
    if config.sampler.kind == "gp" and second_objective(config.objective) is None and number < MOST_GAUSSIAN:
        from search.gaussian_sampler import GaussianSampler  # scikit-learn takes a second, which `status` does not have

        return GaussianSampler(
            parameter_distributions(config.space),
            lambda params: relevant(config.space, params),
            config.sampler.startup_trials,
            number,
            config.seed,
        )
    with _experimental():
        return TPESampler(
            n_startup_trials=config.sampler.startup_trials,
            multivariate=True,
            group=PER_BLOCK in config.space.varied,  # only then do trials differ in which parameters they have
            seed=seed,
        )


@contextmanager
def _experimental() -> Iterator[None]:
    """What Optuna calls experimental is used knowingly; its tests here say so when it changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def given_parameters(
    config: StudyConfig, slot: int, start: int | None, trials: Callable[[], Sequence[FrozenTrial]]
) -> Mapping[str, Any]:
    """Parameters that a slot's configuration has from the outset; the sampler draws the others.

    Args:
        config: of the study.
        slot: of the configuration.
        start: index of the known good configuration that the slot begins with, if any.
        trials: of the study, asked for where the slot repeats a configuration. That is the first one there is, a known
            good one if the study has any: chosen without a look at its score, which would be a lucky one.
    """
    if start is not None:
        return config.start[start] if start < len(config.start) else {}
    if slot not in config.repeat_slots:
        return {}
    begun = [one for one in trials() if one.params and one.state in (TrialState.COMPLETE, TrialState.RUNNING)]
    own = [one for one in begun if SLOT in one.user_attrs]
    return min(own, key=lambda one: one.user_attrs[SLOT]).params if own else {}


def is_audited(config: StudyConfig, slot: int) -> bool:
    """Whether a configuration runs to its end also where the pruner would stop it; decided by seed and slot alone."""
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


def ranked_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The COMPLETE trials, the highest validation accuracy first; of equals the earliest."""
    return ranked(study.get_trials(deepcopy=False))


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The COMPLETE trial that the study's aim calls best: the most accurate, the front's knee, or within its limits."""
    return next(iter(candidates(study.get_trials(deepcopy=False), aim_of(study), 1)), None)
