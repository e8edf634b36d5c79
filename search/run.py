"""``search run``: create or resume a study, work its budget off, retrain and test the winner."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL

from data import source
from data.split import Split, load_split
from model.device import describe_device, keep_freed_pages, resolve_device
from model.saved import write_json
from search import study as studies
from search.environment import environment
from search.errors import UserError
from search.events import Note, Show, TrialFinished
from search.retrain import retrain
from search.storage import exclusive, opened, shown
from search.study import DatasetRecord, StudyRecord
from search.study_file import StudyConfig, find_study
from search.summary import FALLBACK_WARNING, summarise
from search.worker import search

DIVISION_SEED = 0
"""Of the division into fit and validation images: one division for all studies, so that they can be compared."""


@dataclass(frozen=True)
class RunOptions:
    """What the command line asks for; None leaves a thing to the study file or to what is stored."""

    storage: URL
    study: str | None = None
    name: str | None = None
    trials: int | None = None
    seed: int | None = None
    data_dir: Path | None = None
    dataset: str = "auto"
    device: str = "auto"
    out: Path | None = None
    timeout: float | None = None
    finale: bool = True
    max_epochs: int | None = None
    train_images: int | None = None
    max_retrain_epochs: int | None = None


@dataclass(frozen=True)
class RunEnd:
    """How a run ended: its summary, the folder that holds the outputs, and whether the budget is done."""

    summary: dict[str, Any]
    out: Path
    finished: bool


def run(options: RunOptions, show: Show) -> RunEnd:
    """Run a study from wherever it stands to its end.

    Raises:
        UserError, DataError, ConfigError: wrong input; nothing stored is lost.
        RunError: the run failed.
        KeyboardInterrupt: interrupted; the running trial is back in the queue.
    """
    device = resolve_device(options.device)
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        keep_freed_pages()
    source.check_name(options.dataset)
    name = studies.check_name(_default_name(options, device) if options.name is None else options.name)
    out = options.out or Path("studies") / name
    _check_writable(out)
    with opened(options.storage) as storage, exclusive(options.storage, name):
        found = studies.find(storage, name)
        stored = studies.record_of(found) if found else None
        record = _resumed(stored, options, show) if stored else _new(name, options, device, show)
        data_dir = source.data_folder(options.data_dir)
        source.prepare(record.dataset.name, data_dir)
        split = load_split(record.dataset.name, data_dir, DIVISION_SEED, device)
        study, record = _stored(storage, found if stored else None, record, split)
        show(Note(f"study {name!r} on {describe_device(device)}, {record.dataset.name}, "
                  f"{record.dataset.fit:,} fit and {record.dataset.validation:,} validation images; "
                  f"storage {shown(options.storage)}"))  # fmt: skip
        if record.dataset.fallback:
            show(Note(f"warning: {FALLBACK_WARNING}"))
        try:
            with _wall_time(study, show) as timed_show:
                end = search(study, record.config, split, timed_show, options.timeout)
            if options.finale:
                with _wall_time(study, show):
                    retrain(study, record, split, data_dir, out, options.max_retrain_epochs, show)
        finally:
            summary = summarise(study, record, shown(options.storage))
            write_json(out / "summary.json", summary)
    return RunEnd(summary, out, end.finished)


def _default_name(options: RunOptions, device: torch.device) -> str:
    return find_study(options.study or _shipped_for(device))[0]


def _shipped_for(device: torch.device) -> str:
    return "cifar10" if device.type == "cuda" else "cpu"


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {out} cannot be written: {error.strerror}; choose one with --out") from error


def _new(name: str, options: RunOptions, device: torch.device, show: Show) -> StudyRecord:
    """The record of a study that does not exist yet, its images not yet loaded."""
    chosen, config = find_study(options.study or _shipped_for(device))
    if options.study is None:
        show(Note(f"study definition {chosen!r}, which fits {device.type}; another one with --study"))
    data_dir = source.data_folder(options.data_dir)
    dataset = source.resolve(options.dataset, data_dir)
    fallback = options.dataset == "auto" and dataset == "digits"
    config = _overridden(config, options)
    return StudyRecord(name, config, DatasetRecord(dataset, "", (), 0, 0, fallback))


def _resumed(stored: StudyRecord, options: RunOptions, show: Show) -> StudyRecord:
    """What is stored, with what may change changed.

    Raises:
        UserError: the command line asks for another space, another trial length or other images.
    """
    if options.study is None:
        base, source_name = stored.config, "this command"
    else:
        _, base = find_study(options.study)
        kept = {"trials": max(base.trials, stored.config.trials), "seed": stored.config.seed}
        base = base.model_copy(update=kept)
        source_name = options.study
    config = _overridden(base, options)
    studies.refuse_other_space(stored, config, source_name)
    if options.dataset not in ("auto", stored.dataset.name):
        raise UserError(
            f"study {stored.name!r} was begun on {stored.dataset.name}, not on {options.dataset}; "
            "give the other images another --name"
        )
    show(Note(f"study {stored.name!r} goes on where it stopped"))
    return StudyRecord(stored.name, config, stored.dataset)


def _overridden(config: StudyConfig, options: RunOptions) -> StudyConfig:
    """The study file's definition with the command line's wishes."""
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
    return config.model_copy(update=changes)


def _stored(
    storage: RDBStorage, found: optuna.Study | None, record: StudyRecord, split: Split
) -> tuple[optuna.Study, StudyRecord]:
    """The study in its storage, created or brought up to date, bound to these very images."""
    if found is not None:
        studies.refuse_other_data(record, split.fingerprint)
        studies.update(found, record.config)
        return found, record
    dataset = DatasetRecord(
        name=record.dataset.name,
        fingerprint=split.fingerprint,
        classes=split.classes,
        fit=len(split.fit_labels),
        validation=len(split.validation_labels),
        fallback=record.dataset.fallback,
    )
    record = StudyRecord(record.name, record.config, dataset)
    return studies.create(storage, record, environment()), record


@contextmanager
def _wall_time(study: optuna.Study, show: Show) -> Iterator[Show]:
    """Add the time spent in here to the study's total, after every trial, so that a crash loses one at most."""
    before, start = study.user_attrs.get("seconds", 0.0), time.monotonic()

    def store() -> None:
        study.set_user_attr("seconds", before + time.monotonic() - start)

    def storing_show(event: Any) -> None:
        if isinstance(event, TrialFinished):
            store()
        show(event)

    try:
        yield storing_show
    finally:
        store()
