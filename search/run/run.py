"""``search run``: create or resume a study, complete its budget, then confirm, retrain and test.

Workers in separate processes do the work (`search.worker.loop`): they continue if this process dies, and the same
command finds them again.
"""

import contextlib
from dataclasses import dataclass

import torch

from data import source
from search import study as studies
from search.dashboard.process import dashboard_process
from search.events import Note, Show
from search.run.backend import Backend, chosen_backend
from search.run.finale import confirm_best, finale_lock, write_outcome
from search.run.open_search import OpenSearch, opened_search
from search.run.options import RunEnd, RunOptions
from search.run.stage import complete_budget, wall_time
from search.storage.retry import StorageLostError


def run(options: RunOptions, show: Show) -> RunEnd:
    """Run a study from its current state to its end: open it, complete its budget, finale, summary.

    Raises:
        UserError, DataError, ConfigError: wrong input; nothing stored is lost.
        RunError: the run failed.
        KeyboardInterrupt: interrupted; the trials of this machine's workers are back in the queue.
    """
    torch.set_float32_matmul_precision("high")
    source.check_name(options.dataset)
    with (
        chosen_backend(options) as backend,
        opened_search(options, backend.kind, show) as search,
        _served_dashboard(options, search, show),
    ):
        try:
            finished = _complete_search(options, search, backend, show)
            _run_finale(finished, backend, show)
        except BaseException:
            with contextlib.suppress(StorageLostError):
                write_outcome(search, show)
            raise
        summary = write_outcome(search, show)
    return RunEnd(summary, search.out, finished.budget_done)


def _served_dashboard(options: RunOptions, search: OpenSearch, show: Show) -> contextlib.AbstractContextManager[None]:
    if not options.dashboard:
        return contextlib.nullcontext()
    return dashboard_process(options.storage, search.out, lambda text: show(Note(text)))


@dataclass(frozen=True)
class FinishedSearch:
    """A search after its workers have left.

    Attributes:
        search: still open.
        budget_done: False if the time ran out first.
        finale_due: whether there is a trial to confirm and retrain, and the options ask for it.
    """

    search: OpenSearch
    budget_done: bool
    finale_due: bool


def _complete_search(options: RunOptions, search: OpenSearch, backend: Backend, show: Show) -> FinishedSearch:
    """Keep workers on the search until its budget is done or the time is up."""
    with wall_time(search.study, show) as timed_show:
        budget_done = complete_budget(search.stage, backend.launcher, options.timeout, search.publisher, timed_show)
    if not budget_done and not studies.ranked_trials(search.study):
        show(Note("the time was up before any trial ran to its end, so there is no finale"))
        return FinishedSearch(search, budget_done, finale_due=False)
    return FinishedSearch(search, budget_done, options.finale)


def _run_finale(finished: FinishedSearch, backend: Backend, show: Show) -> None:
    """Confirm the best configurations and retrain the winner, unless another process is doing that."""
    if not finished.finale_due:
        return
    search = finished.search
    with finale_lock(search, show) as locked:
        if locked:
            confirm_best(search, backend.launcher, show)
            if backend.retrains_here:
                backend.retrain(search, show)
    if locked and not backend.retrains_here:
        backend.retrain(search, show)
