"""The events that a watcher gives of a study."""

from collections.abc import Iterator

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy.engine import URL

from search.events import EpochFinished, Event, SearchProgress, TrialFinished, TrialStarted
from search.ledger.attempts import Attempt, finish_attempt
from search.ledger.budget import request_budget
from search.ledger.leases import Ledger
from search.run.watch import Watcher
from support.bench import enter, one_attempt, opened_ledger, started


@pytest.fixture
def both(any_storage: URL) -> Iterator[tuple[Ledger, optuna.Study]]:
    with opened_ledger(any_storage) as both:
        request_budget(both[0], 6)
        yield both


def new_events(watcher: Watcher) -> list[tuple[object, ...]]:
    """The events of one poll without the summary, which comes first."""
    events: list[Event] = watcher.poll().events
    assert isinstance(events[0], SearchProgress)
    short: list[tuple[object, ...]] = []
    for event in events[1:]:
        if isinstance(event, EpochFinished):
            short.append((event.number, "epoch", event.epoch))
        elif isinstance(event, TrialStarted):
            short.append((event.number, "started"))
        elif isinstance(event, TrialFinished):
            short.append((event.number, event.outcome, event.accuracy))
    return short


def begun(ledger: Ledger, study: optuna.Study) -> Attempt:
    attempt = started(ledger, study, enter(ledger))
    attempt.trial.set_user_attr("parameters", 10)
    return attempt


def test_events_come_in_order_and_once(both: tuple[Ledger, optuna.Study]) -> None:
    ledger, study = both
    earlier = begun(ledger, study)
    earlier.trial.report(0.25, 1)
    finish_attempt(ledger, earlier, TrialState.COMPLETE, 0.25)
    watcher = Watcher(ledger, study)
    first = begun(ledger, study)
    first.trial.report(0.3, 1)
    second = begun(ledger, study)
    for attempt in (first, second):
        attempt.trial.report(0.5, 2)
    assert new_events(watcher) == [(1, "started"), (1, "epoch", 1), (1, "epoch", 2), (2, "started"), (2, "epoch", 2)]
    assert new_events(watcher) == []
    second.trial.report(0.75, 3)
    finish_attempt(ledger, first, TrialState.PRUNED, None)
    finish_attempt(ledger, second, TrialState.COMPLETE, 0.75)
    assert new_events(watcher) == [(1, "pruned", 0.5), (2, "epoch", 3), (2, "complete", 0.75)]
    assert new_events(watcher) == []
    one_attempt(ledger, study, enter(ledger), "preempted")
    one_attempt(ledger, study, enter(ledger), "infeasible")
    assert [words for words in new_events(watcher) if words[1] != "epoch"] == [
        (3, "handed back", None), (4, "infeasible", None),
    ]  # fmt: skip
