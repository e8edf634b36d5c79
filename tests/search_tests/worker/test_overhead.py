"""What a trial costs beside its training: counted in statements, not in seconds; and how `status` tells of it."""

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import optuna
import psutil
import pytest
import sqlalchemy as sa
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy.engine import URL

from benchmarks.service.growth import definition, grow
from search.analysis.outcomes import TrialsOverhead, trials_overhead
from search.attributes import CAUSE, FAULT, OVERHEAD
from search.config.study_file import PrunerConfig, SamplerConfig
from search.host.process import age
from search.ledger.attempts import (
    Attempt,
    begin_attempt,
    end_attempt,
    end_earlier_attempts,
    finish_attempt,
    mark_infeasible,
)
from search.ledger.budget import request_budget
from search.ledger.heartbeat import mark_dead
from search.ledger.leases import LeaseLostError, lease_slot
from search.storage.connect import storage_opened
from search.storage.rdb import RetryingStorage
from search.worker.overhead import OverheadTimer
from support.bench import draw, enter, new_study, opened_ledger, started
from support.command import Command

# Of a trial of four epochs and six parameters, with TPE and the percentile pruner. Half of them are readings: of the
# others before sampling and after each epoch but the last, of the trial itself once it is there and twice by `tell`.
MOST_STATEMENTS, MOST_TRANSACTIONS = 39, 18


@pytest.mark.parametrize("trials", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_the_last_trial_costs_the_database_what_the_fifth_cost(any_storage: URL, home: Path, trials: int) -> None:
    config = definition(trials).model_copy(
        update={
            "sampler": SamplerConfig(startup_trials=2),
            "pruner": PrunerConfig(percentile=99.9, startup_trials=2, warmup_epochs=1),
        }
    )
    meter = grow(any_storage, home, config)
    with opened_ledger(any_storage, name="growth") as (_, study):
        whole = [trial.number for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert len(whole) > trials / 2
    assert whole[-1] > trials * 0.8
    steps = [
        (after.statements - before.statements, after.transactions - before.transactions)
        for before, after in pairwise(meter.marks)
    ]
    late = {steps[number] for number in whole if number >= 5}
    assert late == {steps[next(number for number in whole if number >= 5)]}
    ((statements, transactions),) = late
    assert statements <= MOST_STATEMENTS, "\n".join(meter.last)
    assert transactions <= MOST_TRANSACTIONS, "\n".join(meter.last)


# Many writes in one transaction


@pytest.fixture
def storage(any_storage: URL) -> Iterator[RetryingStorage]:
    with storage_opened(any_storage) as storage:
        yield storage


@pytest.fixture
def commits(storage: RetryingStorage) -> Callable[[], int]:
    """How many transactions there were since the last call."""
    count = 0

    def committed(_: object) -> None:
        nonlocal count
        count += 1

    def since() -> int:
        nonlocal count
        before, count = count, 0
        return before

    sa.event.listen(storage.engine, "commit", committed)
    return since


def test_what_is_gathered_is_one_transaction_and_plain_optuna_reads_it(
    any_storage: URL, storage: RetryingStorage, commits: Callable[[], int]
) -> None:
    ledger, study = new_study(storage, "s")
    request_budget(ledger, 2)
    worker = enter(ledger)
    started(ledger, study, worker)  # a process's first parameters are written by themselves
    attempt = begin_attempt(ledger, study, lease_slot(ledger, worker), {}, {})  # type: ignore[arg-type]
    assert attempt is not None
    commits()
    with attempt.batched_writes():
        draw(attempt)
    assert commits() == 1
    with attempt.batched_writes():
        attempt.trial.set_user_attr("text", "Grüße")
        attempt.trial.set_user_attr("list", [1, {"a": None}])
        attempt.trial.set_user_attr("text", "the last one counts")
        study._storage.set_trial_system_attr(attempt.trial_id, "system", 1)
    assert commits() == 1
    other = RDBStorage(any_storage.render_as_string(hide_password=False))
    plain = optuna.load_study(study_name="s", storage=other).trials[1]
    other.remove_session()
    other.engine.dispose()
    assert plain.params == attempt.trial.params
    assert plain.distributions == attempt.trial.distributions
    assert plain.user_attrs["text"] == "the last one counts"
    assert plain.user_attrs["list"] == [1, {"a": None}]
    assert plain.system_attrs["system"] == 1


def test_what_is_gathered_is_written_also_where_an_error_comes_in_between(storage: RetryingStorage) -> None:
    study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "s")
    trial, other = storage.create_new_trial(study_id), storage.create_new_trial(study_id)
    with pytest.raises(ZeroDivisionError), storage.batched_writes(trial):
        storage.set_trial_user_attr(trial, "a", 1)
        storage.set_trial_user_attr(other, "b", 2)
        assert storage.get_trial(other).user_attrs == {"b": 2}  # another trial's are not held back
        raise ZeroDivisionError
    storage.set_trial_user_attr(trial, "c", 3)
    assert storage.get_trial(trial).user_attrs == {"a": 1, "c": 3}
    with pytest.raises(TypeError), storage.batched_writes(trial):
        storage.set_trial_user_attr(trial, "no JSON", object())


def test_nothing_is_written_to_a_trial_that_has_ended(storage: RetryingStorage) -> None:
    study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "s")
    trial = storage.create_new_trial(study_id)
    with pytest.raises(UpdateFinishedTrialError), storage.batched_writes(trial):
        storage.set_trial_user_attr(trial, "late", 1)
        storage.set_trial_state_values(trial, TrialState.FAIL)
    assert storage.get_trial(trial).user_attrs == {}


@pytest.mark.parametrize("ending", ["finish", "end_attempt", "give_up"])
def test_notes_go_with_the_end_and_not_with_somebody_elses(any_storage: URL, ending: str) -> None:
    with opened_ledger(any_storage) as (ledger, study):
        request_budget(ledger, 2)

        def end(attempt: Attempt) -> None:
            attempt.notes["seconds"] = 1.5
            if ending == "finish":
                finish_attempt(ledger, attempt, TrialState.COMPLETE, 0.5)
            elif ending == "end_attempt":
                end_attempt(ledger, attempt, "why", "error")
            else:
                mark_infeasible(ledger, attempt, "why")

        attempt = started(ledger, study, enter(ledger))
        end(attempt)
        assert study.trials[0].user_attrs["seconds"] == 1.5
        assert (study.trials[0].user_attrs.get(CAUSE), FAULT in study.trials[0].user_attrs) == (
            (None, False) if ending == "finish" else ("why", True)
        )
        worker = enter(ledger)
        late = started(ledger, study, worker)
        mark_dead(ledger, worker, "taken for dead")
        end_earlier_attempts(ledger, lease_slot(ledger, enter(ledger)))  # type: ignore[arg-type]
        with pytest.raises(LeaseLostError):
            end(late)
        assert "seconds" not in study.trials[late.trial.number].user_attrs
        assert study.trials[late.trial.number].state == TrialState.FAIL


# Readings and reports, in fewer statements than Optuna's own


def test_what_is_read_is_what_plain_optuna_reads(any_storage: URL, storage: RetryingStorage) -> None:
    study = optuna.create_study(storage=storage, study_name="s", directions=["maximize", "minimize"])
    other = optuna.create_study(storage=storage, study_name="other")
    other.add_trial(create_trial(value=1.0))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        trial.suggest_float("lr", 1e-4, 1.0, log=True)
        trial.suggest_int("blocks", 1, 9, step=2)
        trial.suggest_categorical("pool", ["max", None, 3, 0.5, True])
        trial.set_user_attr("text", {"a": [1, None, "Grüße"]})
        for step, value in enumerate((0.5, math.inf, -math.inf, math.nan, 0.1)):
            storage.set_trial_intermediate_value(trial._trial_id, step, value)
        storage.set_trial_intermediate_value(trial._trial_id, 0, 0.25)  # in the place of the first
        if trial.number == 1:
            raise optuna.TrialPruned
        return (0.5, math.inf)

    study.optimize(objective, n_trials=3)
    study.ask().suggest_float("lr", 1e-4, 1.0, log=True)
    study.enqueue_trial({"lr": 0.5})
    own = RDBStorage(any_storage.render_as_string(hide_password=False))
    plain = own.get_all_trials(study._study_id)
    own.remove_session()
    own.engine.dispose()
    assert [trial.state for trial in plain] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.COMPLETE,
        TrialState.RUNNING,
        TrialState.WAITING,
    ]
    for read in (
        storage.get_all_trials(study._study_id),
        [storage.get_trial(trial._trial_id) for trial in plain],
        study.get_trials(),
    ):
        assert [repr(trial) for trial in read] == [repr(trial) for trial in plain]  # NaN is not equal to itself
    complete = storage.get_all_trials(study._study_id, states=(TrialState.COMPLETE,))
    assert [trial.number for trial in complete] == [0, 2]
    with pytest.raises(KeyError):
        storage.get_trial(10**6)


def test_nothing_is_reported_to_a_trial_that_has_ended(storage: RetryingStorage) -> None:
    study = optuna.create_study(storage=storage, study_name="s")
    trial = study.ask()
    storage.set_trial_intermediate_value(trial._trial_id, 1, 0.5)
    study.tell(trial, 1.0)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_intermediate_value(trial._trial_id, 2, 0.5)
    with pytest.raises(KeyError):
        storage.set_trial_intermediate_value(10**6, 2, 0.5)
    with pytest.raises(UpdateFinishedTrialError):  # at once: not by a reading that waits for this very transaction
        storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    assert study.trials[0].intermediate_values == {1: 0.5}


def test_trials_are_read_once_where_that_is_asked_for_and_again_afterwards(
    storage: RetryingStorage, any_storage: URL
) -> None:
    ledger, study = new_study(storage, "s")
    study.add_trial(create_trial(value=1.0))
    assert len(study.get_trials()) == 1  # the cache holds something
    plain = RDBStorage(any_storage.render_as_string(hide_password=False))
    somebody = optuna.load_study(study_name="s", storage=plain)
    with storage.cached_reads():
        assert len(study.get_trials()) == 1
        somebody.add_trial(create_trial(value=2.0))
        assert len(study.get_trials()) == 1
    assert len(study.get_trials()) == 2
    plain.remove_session()
    plain.engine.dispose()
    assert ledger.storage is study._storage


def test_numbers_follow_one_another_whoever_creates_the_trials(any_storage: URL) -> None:
    def create(worker: int) -> None:
        with storage_opened(any_storage) as storage:
            study = storage.get_study_id_from_name("s")
            for turn in range(5):
                template = create_trial(state=TrialState.RUNNING, user_attrs={"worker": worker, "turn": turn})
                storage.create_new_trial(study, template if turn % 2 else None)

    with storage_opened(any_storage) as storage:
        study = optuna.create_study(storage=storage, study_name="s")
        optuna.create_study(storage=storage, study_name="other").ask()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(create, range(4)))
        trials = study.get_trials()
        assert [trial.number for trial in trials] == list(range(20))
        assert sorted((t.user_attrs["worker"], t.user_attrs["turn"]) for t in trials if t.user_attrs) == [
            (worker, turn) for worker in range(4) for turn in (1, 3)
        ]


# Measuring


def test_a_trials_overhead_holds_the_end_of_the_one_before_and_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr("search.worker.overhead.time.perf_counter", lambda: clock)
    monkeypatch.setattr("search.worker.overhead.time.sleep", lambda _: None)
    monkeypatch.setattr("search.worker.overhead.age", lambda: 9.0)
    timer = OverheadTimer()
    timer.wait_idle(2)
    timer.start_trial()
    assert timer.start_up() == 7
    clock += 10.5  # ten of them in epochs
    assert timer.overhead(10) == pytest.approx(0.5)
    clock += 0.25
    timer.end_trial()
    clock += 1000  # nothing to do
    timer.start_trial()
    assert timer.start_up() is None
    clock += 20.5
    assert timer.overhead(20) == pytest.approx(0.5 + 0.25)
    timer.end_trial()
    timer.start_trial()
    clock += 1  # this one breaks off and has no overhead
    timer.start_trial()
    clock += 5.125
    assert timer.overhead(5) == pytest.approx(0.125)


def test_the_share_of_overhead_is_that_of_all_time() -> None:
    def trial(seconds: float, overhead: float | None) -> optuna.trial.FrozenTrial:
        known = {"seconds": seconds} | ({} if overhead is None else {OVERHEAD: overhead})
        return create_trial(state=TrialState.COMPLETE, value=0.5, user_attrs=known)

    assert trials_overhead([]) is None
    assert trials_overhead([trial(5, None)]) is None
    assert trials_overhead([trial(10, 0.1), trial(30, 0.2), trial(60, 0.9), trial(5, None)]) == TrialsOverhead(
        share=0.012, median_seconds=0.2, trials=3
    )


def test_a_processs_age_is_what_the_system_says() -> None:
    seconds = age()
    assert seconds is not None
    assert seconds == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.5)


def test_status_shows_overhead_and_start_up(search: Command, tiny: Path) -> None:
    words = ("--study", tiny, "--dataset", "digits", "--trials", 3, "--no-finale")
    ended = search("run", *words)
    assert ended.status == 0, ended.err
    stated = json.loads(search("status", "--format", "json").out)
    assert stated["overhead"]["trials"] == 3
    assert 0 < stated["overhead"]["share"] <= 1
    assert 0 < stated["overhead"]["median_seconds"] < 60
    assert stated["start_up"]["workers"] == 1
    assert 0 < stated["start_up"]["median_seconds"] == stated["start_up"]["longest_seconds"]
    assert list(stated["budget"]) == ["requested", "complete", "pruned", "failed_attempts", "running", "waiting"]
    table = " ".join(search("status").out.split())
    assert f"overhead {100 * stated['overhead']['share']:.1f} % of trial time (median " in table
    assert "s, from a worker's process to its first trial" in table
    written = json.loads(Path("studies/tiny/summary.json").read_text())
    assert (written["overhead"], written["start_up"]) == (stated["overhead"], stated["start_up"])
    study = optuna.load_study(study_name="tiny", storage="sqlite:///studies/search.db")
    for trial in study.trials:
        epochs = sum(epoch["seconds"] for epoch in trial.user_attrs["curve"])
        assert 0 < trial.user_attrs[OVERHEAD] < trial.user_attrs["seconds"] + 60
        assert epochs < trial.user_attrs["seconds"]
