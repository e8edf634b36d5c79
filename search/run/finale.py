"""The finale of a search, from the best trials to an honest number: confirm, retrain, test, report.

Each part can be asked for by itself, goes on where it was interrupted, and does nothing where it is done already.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch

from data.errors import RunError, UserError, first_line
from data.split import DIVISION_SEED, Split, load_split
from model.device import describe_device, keep_freed_pages
from model.saved import write_json
from search import study as studies
from search.analysis import selection as choice
from search.artifacts.mirror import Mirror, mirror_of
from search.artifacts.store import Folder, Store, store_of
from search.attributes import CONFIRM_SUFFIX, RETRAIN, RETRAIN_PROGRESS
from search.config.objective import CostName
from search.console.format import confirmation_text, trials_text
from search.events import Note, Show
from search.finale import confirm, retrain
from search.launch.base import LauncherFactory, StudyLocation
from search.launch.local import adopt_orphans
from search.ledger.budget import count_budget
from search.ledger.leases import Ledger, open_ledger
from search.report import write_report
from search.results import Confirmation, from_json
from search.run.stage import Publisher, complete_budget, wall_time
from search.run.summary import summarise
from search.storage.connect import exclusive_lock
from search.storage.rdb import RetryingStorage
from search.storage.url import without_password
from search.study import StudyRecord
from search.summary import Summary, summary_as_json


@dataclass(frozen=True)
class OpenSearch:
    """A search whose storage is open.

    Attributes:
        storage: open.
        ledger, study, record: of the search.
        data_dir: that holds its images.
        files: its outputs, and their copies.
        told: warnings of what could not be published, which are told once.
    """

    storage: RetryingStorage
    ledger: Ledger
    study: optuna.Study
    record: StudyRecord
    data_dir: Path
    files: Mirror
    told: set[str] = field(default_factory=set)

    @property
    def out(self) -> Path:
        """The folder of its outputs."""
        return self.files.out


def location_of(search: OpenSearch) -> StudyLocation:
    """Where workers find a search."""
    return StudyLocation(search.storage.location, search.record.name, search.data_dir, search.out)


def retrain_progress(search: OpenSearch) -> str:
    """Where the retrain is, whoever does it, as a line; empty where it is not under way."""
    progress = search.study.user_attrs.get(RETRAIN_PROGRESS)
    return f"retrain {progress['what']}: epoch {progress['epoch']}/{progress['epochs']}" if progress else ""


def find_search(storage: RetryingStorage, name: str | None, data_dir: Path, out: Path | None, show: Show) -> OpenSearch:
    """A search by its name.

    Raises:
        UserError: there is none, this code reads it differently, or its store cannot be used from here.
    """
    study = studies.load(storage, name)
    studies.refuse_other_reading(study)
    record = studies.record_of(study)
    assert record is not None  # load refuses a study without one
    if record.name.endswith(CONFIRM_SUFFIX):
        raise UserError(f"{record.name!r} is a confirmation; name the study that it confirms")
    ledger, study = open_ledger(storage, record.name, record.config.workers)
    files = mirror_of(study, out or Path("studies") / record.name, show)
    return OpenSearch(storage, ledger, study, record, data_dir, files)


@contextlib.contextmanager
def finale_lock(search: OpenSearch, show: Show) -> Iterator[bool]:
    """Hold a search's finale for as long as the context lasts; False where another process holds it."""
    with exclusive_lock(search.storage.location, f"{search.record.name}.finale", wait=False) as mine:
        if not mine:
            show(Note("another process is at this study's finale; this one leaves it to that"))
        yield mine


def change_limits(search: OpenSearch, limits: Mapping[CostName, float | None]) -> None:
    """Change the limits that a search's finale keeps to; None lifts one.

    Raises:
        UserError: on a latency that the search does not measure.
    """
    choice.refuse_unmeasured(limits, search.record.config.objective)
    choice.set_limits(search.study, limits)


def confirm_best(search: OpenSearch, crew: LauncherFactory, show: Show) -> dict[str, Any] | None:
    """Train the best configurations again over fresh seeds, with a crew of workers and whoever else comes.

    Returns:
        `search.finale.confirm.confirmation`; None where the study file asks for none.

    Raises:
        UserError: no trial keeps to the limits.
        RunError: no trial has completed.
    """
    if not studies.ranked_trials(search.study):
        raise RunError("no trial ran to its end, so there is nothing to confirm; raise --trials")
    _refuse_out_of_reach(search)
    confirming = confirm.prepare(search.storage, search.study)
    if confirming is None:
        return None
    ledger, study = open_ledger(search.storage, confirming.name, confirming.config.workers)
    adopt_orphans(ledger)
    place = without_password(search.storage.location)
    publisher = Publisher(study, confirming, ledger, _artifacts(study, search.out), place, show, search.told)
    assignment = StudyLocation(search.storage.location, confirming.name, search.data_dir, search.out / "confirm")
    with wall_time(search.study, show) as timed:
        complete_budget(ledger, study, crew, assignment, "confirm", None, publisher.publish, timed)
    publisher.publish()
    result = confirm.confirmation(search.storage, search.study)
    assert result is not None
    show(Note(f"confirmed: {confirmation_text(from_json(Confirmation, result))}"))
    return result


def retrain_winner(search: OpenSearch, device: torch.device, max_epochs: int | None, show: Show) -> dict[str, Any]:
    """Retrain the winner of the confirmation, or the best trial where there was none; test and save it.

    Raises:
        UserError, DataError: not the study's images, or no trial keeps to the limits.
        RunError: no trial has completed, or the training diverged.
    """
    _refuse_out_of_reach(search)
    if device.type == "cpu":
        keep_freed_pages()
    show(Note(f"retrain on {describe_device(device)}"))
    split = load_images(search, device)
    confirmed = confirm.confirmation(search.storage, search.study)
    if confirmed and confirmed["unconfirmed"]:
        others = trials_text(confirmed["unconfirmed"])
        show(Note(f"warning: not confirmed, so not compared: {others}; `python -m search confirm` does that first"))
    with wall_time(search.study, show):
        return retrain.retrain(
            search.study, search.record, confirmed, split, search.data_dir, search.files, max_epochs, show
        )


def _refuse_out_of_reach(search: OpenSearch) -> None:
    choice.refuse_out_of_reach(search.study.get_trials(deepcopy=False), choice.selection_rule_of(search.study).limits)


def build_publisher(search: OpenSearch, show: Show) -> Publisher:
    """What brings a search's part of the dashboard up to date."""
    place = without_password(search.storage.location)
    artifacts = _artifacts(search.study, search.out)
    return Publisher(search.study, search.record, search.ledger, artifacts, place, show, search.told)


def _artifacts(study: optuna.Study, out: Path) -> Store:
    """Where the dashboard's files of a study go."""
    store = store_of(study)
    return Folder(out / "artifacts") if store is None else store.below("artifacts")


def write_outcome(search: OpenSearch, publisher: Publisher, show: Show) -> Summary:
    """Bring the dashboard, ``summary.json`` and the report up to date.

    Returns:
        the summary.
    """
    publisher.publish()
    place = without_password(search.storage.location)
    summary = summarise(search.study, search.record, search.ledger, place)
    content = summary_as_json(summary)
    write_json(search.out / "summary.json", content)
    count, done = count_budget(search.ledger), search.study.user_attrs.get(RETRAIN)
    try:
        write_report(search.out, search.study, search.record, count, content["confirm"], done, summary, place)
    except OSError as error:  # a full disk: what was found out is in the study
        show(Note(f"warning: no report: {first_line(error)}"))
    search.files.put(*(search.out / name for name in ("summary.json", "report.html", "report.md")))
    return summary


def load_images(search: OpenSearch, device: torch.device) -> Split:
    """The search's images, on a device.

    Raises:
        UserError, DataError: they are absent, damaged or others.
    """
    split = load_split(search.record.dataset.name, search.data_dir, DIVISION_SEED, device)
    studies.refuse_other_data(search.record, split.fingerprint)
    return split
