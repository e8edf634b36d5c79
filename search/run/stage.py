"""One stage of a run: a study whose budget a crew of workers, and whoever else comes, work off."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optuna

from search.artifacts.store import Store
from search.attributes import STUDY_SECONDS
from search.dashboard.publish import publish
from search.events import Budget, Note, Show, Stage, TrialFinished
from search.finale.confirm import confirmation
from search.launch.base import LauncherFactory, StudyLocation
from search.ledger.budget import count_budget, is_open
from search.ledger.leases import Ledger
from search.run.interrupts import interrupts_deferred
from search.run.watch import Watcher
from search.storage.retry import StorageLostError
from search.study import StudyRecord

POLL_SECONDS = 1.0
"""How often `run` looks at its workers and at the study."""

PUBLISH_SECONDS = 10.0
"""How often the study's notes, pictures and graphs are brought up to date."""


def complete_budget(
    ledger: Ledger,
    study: optuna.Study,
    crew: LauncherFactory,
    assignment: StudyLocation,
    stage: Stage,
    timeout: float | None,
    publish_now: Callable[[], None],
    show: Show,
) -> bool:
    """Keep the workers at work until the budget is done (then True) or the time is up."""
    deadline = time.monotonic() + timeout if timeout is not None else None
    launcher = crew(ledger, assignment, lambda text: show(Note(text)))
    watcher = Watcher(ledger, study, stage)
    published = -math.inf
    try:
        with interrupts_deferred(ledger.outage) as pause:
            while True:
                count, rows, events = watcher.look()
                for event in events:
                    show(event)
                if not is_open(ledger):
                    return True
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                launcher.tend(rows, count.done, count.remaining)
                if time.monotonic() - published > PUBLISH_SECONDS:
                    publish_now()
                    published = time.monotonic()
                pause(POLL_SECONDS)
    except KeyboardInterrupt:
        ledger.outage.leave()  # whoever wants to go does not wait for a database that is away
        raise
    finally:
        launcher.stop()
        with contextlib.suppress(StorageLostError):
            for event in watcher.look()[2]:
                show(event)


class Publisher:
    """Brings notes, pictures and graphs up to date, and says once what stands in the way."""

    def __init__(
        self,
        study: optuna.Study,
        record: StudyRecord,
        ledger: Ledger,
        files: Store,
        storage_shown: str,
        show: Show,
        told: set[str],
    ) -> None:
        self._study, self._record, self._ledger = study, record, ledger
        self._files, self._storage_shown, self._show, self._told = files, storage_shown, show, told

    def publish(self) -> None:
        count: Budget = count_budget(self._ledger)
        confirmed = confirmation(self._ledger.database, self._study)
        warnings = publish(
            self._study,
            self._record,
            count.requested,
            count.waiting,
            self._files,
            self._storage_shown,
            confirmed,
        )
        for warning in warnings:
            if warning not in self._told:
                self._told.add(warning)
                self._show(Note(f"warning: {warning}"))


@contextmanager
def wall_time(study: optuna.Study, show: Show) -> Iterator[Show]:
    """Add the time spent in here to the study's total, after every trial, so that a crash loses one at most."""
    before, start = study.user_attrs.get(STUDY_SECONDS, 0.0), time.monotonic()

    def store() -> None:
        study.set_user_attr(STUDY_SECONDS, before + time.monotonic() - start)

    def storing_show(event: Any) -> None:
        if isinstance(event, TrialFinished):
            store()
        show(event)

    try:
        yield storing_show
    finally:
        with contextlib.suppress(StorageLostError):
            store()
