"""One contract, held by every kind of storage."""

from collections.abc import Iterator

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy.engine import URL

from search.ledger import CAUSE, RETRY_OF, SLOT, Budget, budget, hand_back, recover, slot
from search.storage import opened


@pytest.fixture
def study(any_storage: URL) -> Iterator[optuna.Study]:
    with opened(any_storage) as storage:
        yield optuna.create_study(storage=storage, study_name="s", direction="maximize")


def asked(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    trial.suggest_float("lr", 0.1, 1)
    trial.suggest_int("blocks", 1, 9)
    return trial


def test_the_budget_counts_what_is_done_and_nothing_else(study: optuna.Study) -> None:
    study.tell(asked(study), 0.5)
    pruned = asked(study)
    pruned.report(0.1, 1)
    study.tell(pruned, state=TrialState.PRUNED)
    study.tell(asked(study), state=TrialState.FAIL)
    asked(study)
    study.enqueue_trial({"lr": 0.2})
    count = budget(study, 5)
    assert count == Budget(requested=5, complete=1, pruned=1, failed_attempts=1, running=1, waiting=1)
    assert (count.done, count.remaining) == (2, 3)
    assert budget(study, 1).remaining == 0


def test_a_trial_handed_back_keeps_parameters_and_slot_over_every_attempt(study: optuna.Study) -> None:
    study.tell(asked(study), 0.5)
    first = asked(study)
    params, number = first.params, first.number
    for attempt in range(3):
        running = study.trials[-1] if attempt == 0 else study.trials[number]
        hand_back(study, running, "interrupted")
        assert study.trials[running.number].state == TrialState.FAIL
        assert study.trials[running.number].user_attrs[CAUSE] == "interrupted"
        retry = asked(study)
        assert retry.params == params
        assert slot(retry) == first.number
        assert retry.user_attrs[RETRY_OF] == running.number
        number = retry.number
    assert budget(study, 9).failed_attempts == 3


def test_recovery_queues_every_lost_trial_once(study: optuna.Study) -> None:
    lost = [asked(study) for _ in range(3)]
    assert recover(study) == [0, 1, 2]
    assert recover(study) == []
    waiting = study.get_trials(states=(TrialState.WAITING,))
    assert [trial.user_attrs[SLOT] for trial in waiting] == [0, 1, 2]
    assert [asked(study).params for _ in range(3)] == [trial.params for trial in lost]


def test_a_crash_between_queueing_and_failing_queues_nothing_twice(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(study)

    def crash(*_: object, **__: object) -> None:
        raise SystemExit("killed")

    with monkeypatch.context() as broken, pytest.raises(SystemExit):
        broken.setattr(study, "tell", crash)
        recover(study)
    assert study.trials[0].state == TrialState.RUNNING
    assert recover(study) == [0]
    assert budget(study, 1) == Budget(1, complete=0, pruned=0, failed_attempts=1, running=0, waiting=1)


def test_a_trial_killed_before_it_had_parameters_is_queued_without_any(study: optuna.Study) -> None:
    study.ask()
    assert recover(study) == [0]
    assert set(asked(study).params) == {"lr", "blocks"}
