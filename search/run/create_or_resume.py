"""Create a run's study, or resume and update it, with its budget."""

from pathlib import Path
from typing import Any

import torch

from data import source
from data.errors import UserError
from data.paths import data_folder
from data.split import DIVISION_SEED, load_split
from search import study as studies
from search.analysis.selection import refuse_unmeasured
from search.attributes import ARTIFACTS, PUBLISHED
from search.config.objective import second_objective
from search.config.study_file import StudyConfig, find_study
from search.events import Note, Show
from search.host.environment import environment
from search.launch.local import adopt_orphans
from search.ledger.budget import request_budget
from search.ledger.leases import Ledger, open_ledger
from search.ledger.registry import list_workers
from search.run.options import RunOptions
from search.run.warm_start import joined, offers, warm_started
from search.storage.rdb import RetryingStorage
from search.study import DatasetRecord, StudyRecord


def objective_text(config: StudyConfig) -> str:
    """One sentence on what a search with two objectives does; empty for one objective."""
    if second_objective(config.objective) is None:
        return ""
    sampler = "random sampling" if config.sampler.kind == "random" else "multi-objective TPE"
    return (
        f"objective {config.objective}: a Pareto search by {sampler}; nothing is pruned, every trial trains its "
        f"{config.trial.epochs} epochs"
    )


def create_or_resume(
    storage: RetryingStorage, name: str, options: RunOptions, kind: str, data_dir: Path, show: Show
) -> StudyRecord:
    """Create or update the study and its budget, and tie it to exactly these images.

    Raises:
        UserError, DataError: the options do not fit what is stored, or the images are absent or different.
    """
    study = studies.find(storage, name)
    stored = studies.record_of(study) if study else None
    record = _resumed_record(stored, options, show) if stored else _new_record(name, options, kind, show)
    refuse_unmeasured(options.limits, record.config.objective)
    source.prepare(record.dataset.name, data_dir, notify=lambda text: show(Note(text)))
    split = load_split(record.dataset.name, data_dir, DIVISION_SEED, torch.device("cpu"))
    if study is None or stored is None:
        dataset = DatasetRecord(
            name=record.dataset.name,
            fingerprint=split.fingerprint,
            classes=split.classes,
            fit=len(split.fit_labels),
            validation=len(split.validation_labels),
            fallback=record.dataset.fallback,
        )
        record = StudyRecord(record.name, record.config, dataset)
    else:
        studies.refuse_other_data(record, split.fingerprint)
        studies.refuse_other_reading(study)
    if options.warm_start is not None:
        record = warm_started(storage, record, options.warm_start)
    elif stored is None and (others := offers(storage, record)):
        show(Note(f"these images were searched before: --warm-start {others[-1]} tries its best configurations first"))
    ledger = _store_with_budget(storage, record, stored, options.artifacts)
    if stored is not None and (orphans := adopt_orphans(ledger)):
        workers_are = "1 worker of an earlier run is" if orphans == 1 else f"{orphans} workers of an earlier run are"
        show(Note(f"{workers_are} still at work and belong to this one now"))
    return record


def _store_with_budget(
    storage: RetryingStorage, record: StudyRecord, stored: StudyRecord | None, artifacts: str | None
) -> Ledger:
    """Store the definition, the URL of the artifacts' store, and the budget.

    Raises:
        UserError: the budget would shrink while workers are at work on it.
    """
    if stored is None:
        studies.create(storage, record, environment())
        ledger, study = open_ledger(storage, record.name, record.config.workers)
    else:
        ledger, study = open_ledger(storage, record.name, record.config.workers)
        living = sum(row.lives for row in list_workers(ledger))
        if record.config.trials < stored.config.trials and living:
            raise UserError(
                f"study {record.name!r} has a budget of {stored.config.trials}, and workers ({living}) are working "
                f"it off; it can be lowered to {record.config.trials} once they have stopped"
            )
        studies.update(study, record.config)
    if artifacts is not None and study.user_attrs.get(ARTIFACTS) != artifacts:
        study.set_user_attr(PUBLISHED, None)  # earlier publications go there, too
        study.set_user_attr(ARTIFACTS, artifacts)
    request_budget(ledger, record.config.trials, len(record.config.start))
    return ledger


def default_name(options: RunOptions, kind: str) -> str:
    """The study's name if the options give none: its study file's name."""
    return find_study(options.study or _shipped_study(kind))[0]


def _shipped_study(kind: str) -> str:
    return "cifar10" if kind == "cuda" else "cpu"


def check_writable(out: Path) -> None:
    """Raise `UserError` unless files can be created in the output folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {out} cannot be written: {error.strerror}; choose one with --out") from error


def _new_record(name: str, options: RunOptions, kind: str, show: Show) -> StudyRecord:
    """The record of a study that does not exist yet; its images are not loaded yet."""
    definition, config = find_study(options.study or _shipped_study(kind))
    if options.study is None:
        show(Note(f"study definition {definition!r}, which fits {kind}; another one with --study"))
    data_dir = data_folder(options.data_dir)
    dataset = source.resolve(options.dataset, data_dir, lambda text: show(Note(text)))
    fallback = options.dataset == "auto" and dataset == "digits"
    config = _with_options(config, options)
    return StudyRecord(name, config, DatasetRecord(dataset, "", (), 0, 0, fallback))


def _resumed_record(stored: StudyRecord, options: RunOptions, show: Show) -> StudyRecord:
    """The stored record with the options' changes, where changes are allowed.

    Raises:
        UserError: the options name a different space, trial length, objective or data set.
    """
    objective = options.objective
    if options.study is None:
        base, source_name = stored.config, "this command"
    else:
        _, base = find_study(options.study)
        if objective is None and "objective" in base.model_fields_set:
            objective = base.objective
        lasting = {
            "trials": max(base.trials, stored.config.trials),
            "seed": stored.config.seed,
            "objective": stored.config.objective,
            "start": joined(stored.config.start, base.start),
        }
        base = base.model_copy(update=lasting)
        source_name = options.study
    studies.refuse_other_objective(stored, objective)
    config = _with_options(base, options)
    studies.refuse_other_space(stored, config, source_name)
    if options.dataset not in ("auto", stored.dataset.name):
        raise UserError(
            f"study {stored.name!r} was begun on {stored.dataset.name}, not on {options.dataset}; "
            "give the other images another --name"
        )
    show(Note(f"study {stored.name!r} goes on where it stopped"))
    return StudyRecord(stored.name, config, stored.dataset)


def _with_options(config: StudyConfig, options: RunOptions) -> StudyConfig:
    """A definition with the changes that the options ask for."""
    trial = config.trial
    if options.max_epochs is not None:
        trial = trial.model_copy(update={"epochs": min(trial.epochs, options.max_epochs)})
    if options.train_images is not None:
        trial = trial.model_copy(
            update={"train_images": min(trial.train_images or options.train_images, options.train_images)}
        )
    changes: dict[str, Any] = {"trial": trial}
    if options.trials is not None:
        changes["trials"] = options.trials
    if options.seed is not None:
        changes["seed"] = options.seed
    if options.objective is not None:
        changes["objective"] = options.objective
    return config.model_copy(update=changes)
