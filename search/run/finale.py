"""The finale of a search, from the best trials to an honest number: confirm, retrain, test, report.

Each part can run by itself, continues where it was interrupted, and does nothing if it is already done.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch

from data.errors import RunError, first_line
from model.device import describe_device, keep_freed_pages
from model.saved import write_json
from search import study as studies
from search.analysis import selection as choice
from search.attributes import RETRAIN, RETRAIN_PROGRESS
from search.config.objective import CostName
from search.console.format import confirmation_text, trials_text
from search.events import Note, Show
from search.finale import confirm
from search.finale.job import RetrainContext
from search.finale.retrain import retrain
from search.launch.base import LauncherFactory, StudyLocation
from search.launch.local import adopt_orphans
from search.ledger.budget import count_budget
from search.ledger.leases import open_ledger
from search.report import collect, write_report
from search.results import Confirmation, RetrainProgress, RetrainResult, optional_from_json
from search.run.open_search import OpenSearch, load_images, trial_artifacts
from search.run.stage import StageContext, complete_budget, wall_time
from search.run.summary import summarise
from search.storage.connect import exclusive_lock
from search.storage.url import without_password
from search.summary import Summary, summary_as_json


def retrain_progress(search: OpenSearch) -> str:
    """One line on the retrain's progress, on any machine; empty while no retrain is running."""
    progress = optional_from_json(RetrainProgress, search.study.user_attrs.get(RETRAIN_PROGRESS))
    return f"retrain {progress.what}: epoch {progress.epoch}/{progress.epochs}" if progress else ""


@contextlib.contextmanager
def finale_lock(search: OpenSearch, show: Show) -> Iterator[bool]:
    """Lock a search's finale for as long as the context lasts; False if another process holds the lock."""
    with exclusive_lock(search.storage.location, f"{search.record.name}.finale", wait=False) as locked:
        if not locked:
            show(Note("another process is at this study's finale; this one leaves it to that"))
        yield locked


def change_limits(search: OpenSearch, limits: Mapping[CostName, float | None]) -> None:
    """Change the limits of a search's finale; None removes one.

    Raises:
        UserError: a limit on latency, which the search does not measure.
    """
    choice.refuse_unmeasured(limits, search.record.config.objective)
    choice.set_limits(search.study, limits)


def confirm_best(search: OpenSearch, launch: LauncherFactory, show: Show) -> Confirmation | None:
    """Train the best configurations again from fresh seeds, with the workers that ``launch`` starts and any others.

    Returns:
        None if the study file asks for none.

    Raises:
        UserError: no trial is within the limits.
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
    location = StudyLocation(search.storage.location, confirming.name, search.location.data_dir, search.out / "confirm")
    artifacts = trial_artifacts(study, search.out)
    context = StageContext("confirm", ledger, study, confirming, location, artifacts)
    with wall_time(search.study, show) as timed_show:
        complete_budget(context, launch, None, search.publisher, timed_show)
    search.publisher.publish(context, show)
    result = confirm.confirmation(search.storage, search.study)
    assert result is not None
    show(Note(f"confirmed: {confirmation_text(result)}"))
    return result


def retrain_winner(search: OpenSearch, device: torch.device, max_epochs: int | None, show: Show) -> RetrainResult:
    """Retrain the winner of the confirmation, or the best trial if there was none; test and save it.

    Raises:
        UserError, DataError: the images are not the study's, or no trial is within the limits.
        RunError: no trial has completed, or the training diverged.
    """
    _refuse_out_of_reach(search)
    if device.type == "cpu":
        keep_freed_pages()
    show(Note(f"retrain on {describe_device(device)}"))
    split = load_images(search, device)
    context = RetrainContext(search.study, search.record, split, search.location.data_dir, search.files, show)
    confirmed = confirm.confirmation(search.storage, search.study)
    if confirmed and confirmed.unconfirmed:
        others = trials_text(confirmed.unconfirmed)
        show(Note(f"warning: not confirmed, so not compared: {others}; `python -m search confirm` does that first"))
    with wall_time(search.study, show):
        return retrain(context, confirmed, max_epochs)


def _refuse_out_of_reach(search: OpenSearch) -> None:
    choice.refuse_out_of_reach(search.study.get_trials(deepcopy=False), choice.selection_rule_of(search.study).limits)


def write_outcome(search: OpenSearch, show: Show) -> Summary:
    """Bring the dashboard, ``summary.json`` and the report up to date.

    Returns:
        the summary.
    """
    search.publisher.publish(search.stage, show)
    storage_shown = without_password(search.storage.location)
    summary = summarise(search.study, search.record, search.ledger, storage_shown)
    write_json(search.out / "summary.json", summary_as_json(summary))
    count, done = count_budget(search.ledger), optional_from_json(RetrainResult, search.study.user_attrs.get(RETRAIN))
    try:
        data = collect(search.study, search.record, count, summary.confirm, done, summary, storage_shown)
        write_report(search.out, data)
    except OSError as error:  # such as a full disk; the study still holds all results
        show(Note(f"warning: no report: {first_line(error)}"))
    search.files.upload(*(search.out / name for name in ("summary.json", "report.html", "report.md")))
    return summary
