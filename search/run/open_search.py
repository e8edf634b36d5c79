"""A search with its storage open: `run` creates or resumes it, other commands find it by name."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna
import torch

from data.errors import UserError
from data.paths import data_folder
from data.split import DIVISION_SEED, Split, load_split
from search import study as studies
from search.analysis.selection import set_limits
from search.artifacts.mirror import Mirror, mirror_of
from search.artifacts.store import Folder, Store, check_store, open_store, store_of, store_url
from search.attributes import CONFIRM_SUFFIX, FINALE
from search.events import Note, Show
from search.launch.base import StudyLocation
from search.ledger.leases import Ledger, open_ledger
from search.run.create_or_resume import check_writable, create_or_resume, default_name, objective_text
from search.run.options import RunOptions
from search.run.stage import Publisher, StageContext
from search.storage.connect import exclusive_lock, storage_opened
from search.storage.rdb import RetryingStorage
from search.storage.url import NETWORK_WARNING, network_file_system, without_password
from search.study import FALLBACK_WARNING, StudyRecord


@dataclass(frozen=True)
class OpenSearch:
    """A search with its storage open.

    Attributes:
        storage: open.
        ledger, study, record: the search's.
        location: where workers find it.
        files: its outputs and their copies.
        artifacts: the store for its trials' files in the dashboard.
        publisher: updates the dashboard for it and its confirmation.
    """

    storage: RetryingStorage
    ledger: Ledger
    study: optuna.Study
    record: StudyRecord
    location: StudyLocation
    files: Mirror
    artifacts: Store
    publisher: Publisher = field(default_factory=Publisher)

    @property
    def out(self) -> Path:
        """Its output folder."""
        return self.files.out

    @property
    def stage(self) -> StageContext:
        """The search itself as a stage of a run."""
        return StageContext("search", self.ledger, self.study, self.record, self.location, self.artifacts)


@contextlib.contextmanager
def opened_search(options: RunOptions, kind: str, show: Show) -> Iterator[OpenSearch]:
    """Create or resume a run's search; its storage stays open for as long as the context lasts.

    Args:
        options: the run's options.
        kind: ``cuda`` or ``cpu``, which chooses the study file if the options name none.
        show: receives notes on what is opened.

    Raises:
        UserError, DataError: it cannot be opened, or does not match the options.
    """
    name = studies.check_name(default_name(options, kind) if options.name is None else options.name)
    out = options.out or Path("studies") / name
    check_writable(out)
    data_dir = data_folder(options.data_dir)
    with storage_opened(options.storage) as storage:
        if network := network_file_system(options.storage):
            show(Note(f"warning: {NETWORK_WARNING.format(kind=network)}"))
        artifacts = store_url(options.artifacts, studies.find(storage, name))
        if artifacts is not None:
            check_store(open_store(artifacts).below(name))
        options = replace(options, artifacts=artifacts)
        with exclusive_lock(options.storage, f"{name}.creation"):
            record = create_or_resume(storage, name, options, kind, data_dir, show)
        ledger, study = open_ledger(storage, name, record.config.workers)
        storage.retry.tell = lambda text: show(Note(text))
        if study.user_attrs.get(FINALE) != options.finale:
            study.set_user_attr(FINALE, options.finale)
        set_limits(study, options.limits)
        _introduce(record, without_password(options.storage), show)
        files = mirror_of(study, out, show)
        if files.store is not None:
            show(Note(f"artifacts and checkpoints: {files.store.text}"))
        location = StudyLocation(options.storage, name, data_dir, out)
        yield OpenSearch(storage, ledger, study, record, location, files, trial_artifacts(study, out))


def _introduce(record: StudyRecord, storage_shown: str, show: Show) -> None:
    dataset = record.dataset
    images = f"{dataset.fit:,} fit and {dataset.validation:,} validation images"
    show(Note(f"study {record.name!r}, {dataset.name}, {images}; storage {storage_shown}"))
    if objective := objective_text(record.config):
        show(Note(objective))
    if dataset.fallback:
        show(Note(f"warning: {FALLBACK_WARNING}"))


def find_search(storage: RetryingStorage, name: str | None, data_dir: Path, out: Path | None, show: Show) -> OpenSearch:
    """A search by its name.

    Raises:
        UserError: there is none, this code reads it differently, or its store cannot be used here.
    """
    study = studies.load(storage, name)
    studies.refuse_other_reading(study)
    record = studies.record_of(study)
    assert record is not None  # load refuses a study without one
    if record.name.endswith(CONFIRM_SUFFIX):
        raise UserError(f"{record.name!r} is a confirmation; name the study that it confirms")
    ledger, study = open_ledger(storage, record.name, record.config.workers)
    files = mirror_of(study, out or Path("studies") / record.name, show)
    location = StudyLocation(storage.location, record.name, data_dir, files.out)
    return OpenSearch(storage, ledger, study, record, location, files, trial_artifacts(study, files.out))


def trial_artifacts(study: optuna.Study, out: Path) -> Store:
    """The store for the trials' files in the dashboard; ``out`` is the study's output folder."""
    store = store_of(study)
    return Folder(out / "artifacts") if store is None else store.below("artifacts")


def load_images(search: OpenSearch, device: torch.device) -> Split:
    """The search's images, on a device.

    Raises:
        UserError, DataError: they are absent, damaged or different.
    """
    split = load_split(search.record.dataset.name, search.location.data_dir, DIVISION_SEED, device)
    studies.refuse_other_data(search.record, split.fingerprint)
    return split
