"""One stage of a run: the workers that it launches, and any others, complete a study's budget."""

import contextlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import optuna

from search.artifacts.store import Store
from search.attributes import STUDY_SECONDS
from search.dashboard.publish import publish
from search.events import Event, Note, Show, Stage, TrialFinished
from search.finale.confirm import confirmation
from search.launch.base import LauncherFactory, StudyLocation
from search.ledger.budget import count_budget, is_open
from search.ledger.leases import Ledger
from search.run.interrupts import interrupts_deferred
from search.run.watch import Watcher
from search.storage.retry import StorageLostError
from search.storage.url import without_password
from search.study import StudyRecord

POLL_SECONDS = 1.0
"""Interval at which `run` checks its workers and the study."""

PUBLISH_SECONDS = 10.0
"""Interval at which the study's notes, pictures and graphs are updated."""


@dataclass(frozen=True)
class StageContext:
    """A study with a budget to complete: the search itself, or its confirmation.

    Attributes:
        stage: which of the two.
        ledger, study, record: those of that study.
        location: where workers find it.
        artifacts: the store for its trials' files in the dashboard.
    """

    stage: Stage
    ledger: Ledger
    study: optuna.Study
    record: StudyRecord
    location: StudyLocation
    artifacts: Store


class Publisher:
    """Updates what the dashboard shows of studies, and shows each warning about that once."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def publish(self, context: StageContext, show: Show) -> None:
        """Publish what is new in one study."""
        count = count_budget(context.ledger)
        database = context.ledger.database
        warnings = publish(
            context.study,
            context.record,
            count.requested,
            count.waiting,
            context.artifacts,
            without_password(database.location),
            confirmation(database, context.study),
        )
        for warning in warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                show(Note(f"warning: {warning}"))


def complete_budget(
    context: StageContext, launch: LauncherFactory, timeout: float | None, publisher: Publisher, show: Show
) -> bool:
    """Keep workers on a study until its budget is done or the time is up.

    Args:
        context: the study.
        launch: launches the workers.
        timeout: seconds; None for no limit.
        publisher: updates what the dashboard shows of the study.
        show: receives events.

    Returns:
        whether the budget is done.

    Raises:
        UserError, RunError: no worker is left on any machine.
        KeyboardInterrupt: interrupted; the workers have left.
    """
    ledger = context.ledger
    deadline = time.monotonic() + timeout if timeout is not None else None
    launcher = launch(ledger, context.location, lambda text: show(Note(text)))
    watcher = Watcher(ledger, context.study, context.stage)
    last_published = -math.inf
    try:
        with interrupts_deferred(ledger.retry) as pause:
            while True:
                changes = watcher.poll()
                for event in changes.events:
                    show(event)
                if not is_open(ledger):
                    return True
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                launcher.maintain(changes.workers, changes.budget.done, changes.budget.remaining)
                if time.monotonic() - last_published > PUBLISH_SECONDS:
                    publisher.publish(context, show)
                    last_published = time.monotonic()
                pause(POLL_SECONDS)
    except KeyboardInterrupt:
        ledger.retry.leave()  # an interrupted run does not wait for a lost database
        raise
    finally:
        launcher.stop()
        with contextlib.suppress(StorageLostError):
            for event in watcher.poll().events:
                show(event)


@contextmanager
def wall_time(study: optuna.Study, show: Show) -> Iterator[Show]:
    """Add the time spent in the context to the study's total after every trial: a crash loses at most one trial's."""
    before, start = study.user_attrs.get(STUDY_SECONDS, 0.0), time.monotonic()

    def store() -> None:
        study.set_user_attr(STUDY_SECONDS, before + time.monotonic() - start)

    def storing_show(event: Event) -> None:
        if isinstance(event, TrialFinished):
            store()
        show(event)

    try:
        yield storing_show
    finally:
        with contextlib.suppress(StorageLostError):
            store()
