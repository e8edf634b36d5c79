"""The exact budget, by its contract and against crashes between any two transactions."""

import itertools
import multiprocessing
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import optuna
import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import TPESampler
from optuna.trial import TrialState
from sqlalchemy.engine import URL

from search.attributes import ATTEMPT, CAUSE, FAULT, SLOT, START, WORKER
from search.ledger.attempts import (
    ERRORS_IN_A_ROW,
    begin_attempt,
    end_attempt,
    errors_in_a_row,
    finish_attempt,
    hand_back,
    mark_infeasible,
)
from search.ledger.budget import count_budget, open_slots, request_budget
from search.ledger.heartbeat import mark_dead, reap, send_heartbeat
from search.ledger.leases import LeaseLostError, Ledger, close_slot, lease_again, lease_slot, release_lease
from search.ledger.registry import unregister_worker
from search.storage.connect import storage_opened
from search.storage.rdb import RetryingStorage
from support.bench import (
    DONE,
    ENDINGS,
    NEVER,
    KilledError,
    Puppet,
    begin,
    check_ended,
    draw,
    enter,
    hold_up_puppets,
    hooked_commits,
    new_study,
    one_attempt,
    opened_ledger,
    pass_time,
    reap_now,
    slots,
    started,
    train,
    work_to_the_end,
)

Both = tuple[Ledger, optuna.Study]


@pytest.fixture
def both(any_storage: URL) -> Iterator[Both]:
    with opened_ledger(any_storage) as both:
        yield both


# What the budget promises


def test_a_budget_grows_and_keeps_what_is_there(both: Both) -> None:
    ledger, study = both
    assert request_budget(ledger, 3) == 3
    one_attempt(ledger, study, enter(ledger), "complete")
    assert request_budget(ledger, 3) == 3
    assert request_budget(ledger, 5) == 5
    assert [(row.slot, row.state) for row in slots(ledger)] == [(0, "done"), *((i, "waiting") for i in range(1, 5))]


def test_a_budget_shrinks_to_what_is_done_or_under_way_and_no_further(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 6)
    worker = enter(ledger)
    one_attempt(ledger, study, worker, "complete")
    lease_slot(ledger, worker)
    assert request_budget(ledger, 4) == 4
    assert [row.slot for row in slots(ledger)] == [0, 1, 2, 3]
    assert request_budget(ledger, 1) == 2
    assert [row.state for row in slots(ledger)] == ["done", "leased"]
    assert request_budget(ledger, 3) == 3
    work_to_the_end(ledger, study)
    check_ended(ledger, 3)


def test_a_budget_that_shrinks_leaves_no_trial_behind_that_runs_or_counts_too_much(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 4)
    dies, ends, hands_back = enter(ledger), enter(ledger), enter(ledger)
    started(ledger, study, dies)
    told = started(ledger, study, ends)
    study.tell(told.trial, 0.5)  # and it dies before it can close its slot
    hand_back(ledger, started(ledger, study, hands_back), "asked to go", "preempted")
    for worker in (dies, ends):
        mark_dead(ledger, worker, "killed")
    kept = request_budget(ledger, 1)
    work_to_the_end(ledger, study)
    check_ended(ledger, kept)
    request_budget(ledger, 4)
    work_to_the_end(ledger, study)
    check_ended(ledger, 4)


def test_known_good_configurations_are_given_out_once_also_when_the_list_grows(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 1, starts=2)
    assert [row.start for row in slots(ledger)] == [0]
    taken = lease_slot(ledger, enter(ledger))
    assert taken is not None
    assert taken.start == 0
    request_budget(ledger, 4, starts=3)
    assert [row.start for row in slots(ledger)] == [0, 1, 2, None]
    request_budget(ledger, 4, starts=3)
    assert [row.start for row in slots(ledger)] == [0, 1, 2, None]
    attempt = begin(ledger, study, taken, [{"lr": 0.25}, {"lr": 0.5}])
    assert attempt is not None
    draw(attempt)
    assert attempt.trial.params["lr"] == 0.25
    assert attempt.trial.user_attrs[START] == 0


def test_a_known_good_configuration_never_goes_to_a_slot_that_was_begun(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 2)
    hand_back(ledger, started(ledger, study, enter(ledger)), "asked to go", "preempted")
    request_budget(ledger, 2, starts=1)
    assert [row.start for row in slots(ledger)] == [None, 0]


def _grow(url: URL, gate: Any) -> None:
    with opened_ledger(url) as (ledger, _):
        gate.wait(60)
        for trials in range(1, 30):
            request_budget(ledger, trials, starts=5)


def _lease_and_finish(url: URL, gate: Any, took: Any) -> None:
    with opened_ledger(url) as (ledger, study):
        worker = enter(ledger)
        gate.wait(60)
        while (taken := lease_slot(ledger, worker)) is not None:
            took.put((taken.slot, taken.attempt))
            attempt = begin(ledger, study, taken)
            assert attempt is not None
            train(attempt, epochs=1)
            finish_attempt(ledger, attempt, TrialState.COMPLETE, 0.5)


def in_processes(count: int, target: Callable[..., None], *words: Any) -> None:
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(count)
    processes = [context.Process(target=target, args=(words[0], gate, *words[1:]), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * count


def test_two_processes_that_grow_a_budget_at_once_make_one_budget(any_storage: URL) -> None:
    with opened_ledger(any_storage) as (ledger, _):
        in_processes(2, _grow, any_storage)
        rows = slots(ledger)
    assert [row.slot for row in rows] == list(range(29))
    assert sorted(row.start for row in rows if row.start is not None) == [0, 1, 2, 3, 4]


def test_processes_never_lease_the_same_slot_and_never_fail(any_storage: URL) -> None:
    with opened_ledger(any_storage) as (ledger, _):
        request_budget(ledger, 20)
        took = multiprocessing.get_context("spawn").Queue()
        in_processes(4, _lease_and_finish, any_storage, took)
        taken = [took.get(timeout=10) for _ in range(20)]
        assert sorted(taken) == [(slot, 1) for slot in range(20)]
        check_ended(ledger, 20)


def test_threads_never_lease_the_same_slot_and_take_the_lowest(both: Both) -> None:
    ledger, _ = both
    request_budget(ledger, 40)
    workers = [enter(ledger) for _ in range(8)]

    def take(worker: str) -> list[int]:
        slots = []
        while (taken := lease_slot(ledger, worker)) is not None:
            slots.append(taken.slot)
            close_slot(ledger, taken)
        return slots

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(take, workers))
    assert sorted(slot for slots in taken for slot in slots) == list(range(40))
    assert all(slots == sorted(slots) for slots in taken)
    assert ledger.retry.retries == 0


def test_no_slot_is_leased_when_none_waits(both: Both) -> None:
    ledger, _ = both
    assert lease_slot(ledger, enter(ledger)) is None
    request_budget(ledger, 1)
    assert lease_slot(ledger, enter(ledger)) is not None
    assert lease_slot(ledger, enter(ledger)) is None
    assert open_slots(ledger) == (0, 1)


def test_a_heartbeat_and_the_end_of_a_trial_do_not_wait_for_each_other_in_a_circle(both: Both) -> None:
    ledger, _ = both
    request_budget(ledger, 20)
    worker = enter(ledger)
    holding: list[Any] = [None]
    stop = threading.Event()

    def beats() -> None:
        while not stop.is_set():
            send_heartbeat(ledger, worker, holding[0], None)

    with ThreadPoolExecutor(3) as pool:
        hearts = [pool.submit(beats) for _ in range(2)]
        try:
            while (taken := lease_slot(ledger, worker)) is not None:
                holding[0] = taken
                close_slot(ledger, taken)
        finally:
            stop.set()
        for heart in hearts:
            heart.result()
    assert ledger.retry.retries == 0


# Attempts


def test_a_retried_trial_keeps_its_slot_and_parameters_over_many_attempts(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 2)
    for _ in range(4):
        worker = enter(ledger)
        started(ledger, study, worker)
        mark_dead(ledger, worker, "killed by signal 9")
    work_to_the_end(ledger, study)
    check_ended(ledger, 2)
    trials = study.trials
    assert [trial.user_attrs[SLOT] for trial in trials] == [0] * 5 + [1]
    assert [trial.user_attrs[ATTEMPT] for trial in trials] == [1, 2, 3, 4, 5, 1]
    assert [trial.user_attrs[FAULT] for trial in trials[:4]] == ["killed"] * 4
    assert trials[0].user_attrs[CAUSE].endswith(": killed by signal 9")


def test_parameters_that_were_not_drawn_yet_are_drawn_by_a_later_attempt_and_kept(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 1, starts=1)
    starts = [{"lr": 0.125}]
    first, second = enter(ledger), enter(ledger)
    taken = lease_slot(ledger, first)
    assert taken is not None
    assert begin(ledger, study, taken, starts) is not None  # dies before it draws anything
    mark_dead(ledger, first, "killed")
    taken = lease_slot(ledger, second)
    assert taken is not None
    attempt = begin(ledger, study, taken, starts)
    assert attempt is not None
    draw(attempt)
    assert attempt.trial.params["lr"] == 0.125
    mark_dead(ledger, second, "killed")
    work_to_the_end(ledger, study)
    check_ended(ledger, 1)


def test_what_replaces_a_broken_configuration_keeps_its_parameters_too(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 1, starts=1)
    endings = ["error", "preempted", "error", "preempted", "error", "preempted", "error", "complete"]
    for ending in endings:
        one_attempt(ledger, study, enter(ledger), ending)
    check_ended(ledger, 1, same_params=False)
    drawn = [trial.params["blocks"] for trial in study.trials]
    assert len(set(drawn[:3])) == 1
    assert len(set(drawn[3:7])) == 1
    assert len(set(drawn)) == 3


def test_a_slot_whose_trial_has_ended_is_closed_by_the_next_one_who_leases_it(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 1)
    worker, other = enter(ledger), enter(ledger)
    attempt = started(ledger, study, worker)
    study.tell(attempt.trial, 0.75)
    mark_dead(ledger, worker, "killed")
    taken = lease_slot(ledger, other)
    assert taken is not None
    assert begin(ledger, study, taken) is None
    check_ended(ledger, 1)
    assert study.best_value == 0.75


def test_a_worker_that_lost_its_slot_can_write_nothing(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 1)
    late, other = enter(ledger), enter(ledger)
    attempt = started(ledger, study, late)
    assert send_heartbeat(ledger, late, attempt.lease, None)
    reap_now(ledger)
    reap_now(ledger)
    assert not send_heartbeat(ledger, late, attempt.lease, None)
    again = started(ledger, study, other)
    assert again.trial.params == attempt.trial.params
    assert again.trial.number != attempt.trial.number
    for write in (
        lambda: finish_attempt(ledger, attempt, TrialState.COMPLETE, 0.99),
        lambda: finish_attempt(ledger, attempt, TrialState.PRUNED, None),
        lambda: hand_back(ledger, attempt, "asked to go", "preempted"),
        lambda: hand_back(ledger, attempt, "a bug", "error"),
        lambda: end_attempt(ledger, attempt, "no memory", "out of memory"),
        lambda: mark_infeasible(ledger, attempt, "too large"),
    ):
        with pytest.raises(LeaseLostError):
            write()
    with pytest.raises(UpdateFinishedTrialError):
        attempt.trial.report(0.9, 3)
    assert lease_again(ledger, attempt.lease) is None
    release_lease(ledger, attempt.lease)
    close_slot(ledger, attempt.lease)
    (row,) = slots(ledger)
    assert (row.state, row.worker, row.errors) == ("leased", other, 0)
    finish_attempt(ledger, again, TrialState.COMPLETE, 0.5)
    check_ended(ledger, 1)
    assert study.best_value == 0.5


def test_a_worker_that_lost_its_slot_before_it_began_begins_nothing(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 1)
    late, other = enter(ledger), enter(ledger)
    taken = lease_slot(ledger, late)
    assert taken is not None
    reap_now(ledger)
    reap_now(ledger)
    again = started(ledger, study, other)
    with pytest.raises(LeaseLostError):
        begin(ledger, study, taken)
    finish_attempt(ledger, again, TrialState.COMPLETE, 0.5)
    with pytest.raises(LeaseLostError):
        begin(ledger, study, taken)
    check_ended(ledger, 1)
    assert len(study.trials) == 1


def test_a_result_that_came_before_the_slot_went_to_another_counts(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 1)
    attempt = started(ledger, study, enter(ledger))
    reap_now(ledger)
    reap_now(ledger)
    finish_attempt(ledger, attempt, TrialState.COMPLETE, 0.75)
    work_to_the_end(ledger, study)
    check_ended(ledger, 1)
    assert (len(study.trials), study.best_value) == (1, 0.75)


def test_a_pruned_trial_has_its_last_accuracy_and_an_infeasible_one_has_none(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 2)
    for ending in ("pruned", "infeasible"):
        one_attempt(ledger, study, enter(ledger), ending)
    pruned, infeasible = study.trials
    assert (pruned.state, pruned.value) == (TrialState.PRUNED, 0.5)
    assert (infeasible.state, infeasible.value) == (TrialState.PRUNED, None)
    count = count_budget(ledger)
    assert (count.done, count.infeasible, count.remaining) == (2, 1, 0)
    check_ended(ledger, 2)


def test_what_does_not_fit_is_avoided_by_the_sampler_however_well_it_scored(both: Both) -> None:
    ledger, study = both
    infeasible_above = 0.5
    request_budget(ledger, 40)
    worker = enter(ledger)
    for number in range(40):
        taken = lease_slot(ledger, worker)
        assert taken is not None
        study.sampler = TPESampler(seed=number, n_startup_trials=10)
        attempt = begin_attempt(ledger, study, taken, {}, {WORKER: worker})
        assert attempt is not None
        x = attempt.trial.suggest_float("x", 0.0, 1.0)
        attempt.trial.report(x, 1)
        if x > infeasible_above:
            mark_infeasible(ledger, attempt, "too large")
        else:
            finish_attempt(ledger, attempt, TrialState.COMPLETE, x)
    assert study.best_value <= infeasible_above
    late = [trial.params["x"] for trial in study.trials[20:]]
    assert sum(x > infeasible_above for x in late) < len(late) / 2
    assert all(trial.value is None for trial in study.trials if trial.user_attrs.get(FAULT) == "infeasible")


def test_errors_count_while_they_come_one_after_another(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 20)
    endings = ["error"] * 4 + ["complete"] + ["error", "preempted", "error", "pruned"] + ["error"] * ERRORS_IN_A_ROW
    counts = []
    for ending in endings:
        one_attempt(ledger, study, enter(ledger), ending)
        counts.append(errors_in_a_row(ledger))
    assert counts == [1, 2, 3, 4, 0, 1, 1, 2, 0, 1, 2, 3, 4, 5]
    assert count_budget(ledger).failed_attempts == 12


def test_a_worker_that_goes_with_its_slot_leaves_it_to_the_others_at_once(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 1)
    worker = enter(ledger)
    started(ledger, study, worker)
    unregister_worker(ledger, worker, "an error on the way")
    assert open_slots(ledger) == (1, 0)
    work_to_the_end(ledger, study)
    check_ended(ledger, 1)


def test_a_worker_that_still_has_a_slot_and_does_not_know_it_gets_that_one(both: Both) -> None:
    ledger, study = both
    request_budget(ledger, 3)
    worker = enter(ledger)
    attempt = started(ledger, study, worker)
    again = started(ledger, study, worker)
    assert (again.lease.slot, again.lease.attempt) == (0, 2)
    assert again.trial.params == attempt.trial.params
    work_to_the_end(ledger, study)
    check_ended(ledger, 3)


def test_studies_of_one_database_do_not_touch_each_other(any_storage: URL) -> None:
    with opened_ledger(any_storage, name="a") as (first, a), opened_ledger(any_storage, name="b") as (second, _):
        request_budget(first, 2)
        request_budget(second, 3)
        started(second, optuna.load_study(study_name="b", storage=second.storage), enter(second))
        work_to_the_end(first, a)
        check_ended(first, 2)
        assert [row.state for row in slots(second)] == ["leased", "waiting", "waiting"]
        assert count_budget(second).running == 1


# Crashes


def kill_at_every_commit(url: URL, ending: str, moment: str) -> int:
    """A worker's life, ended at its first commit, at its second and so on; how many commits it has."""
    with opened_ledger(url) as (first, _):
        for last in itertools.count(1):
            ledger, study = new_study(first.database, f"s{last}")
            request_budget(ledger, 2)
            worker = enter(ledger)

            def die(number: int, _: Any, last: int = last) -> None:
                if number == last:
                    raise KilledError

            hooks = (die, nothing) if moment == "before" else (nothing, die)
            try:
                with hooked_commits(ledger.engine, *hooks):
                    one_attempt(ledger, study, worker, ending)
            except KilledError:
                mark_dead(ledger, worker, "killed")
                work_to_the_end(ledger, study)
                check_ended(ledger, 2)
            else:
                return last - 1
    raise AssertionError


def nothing(*_: object) -> None:
    pass


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_worker_may_die_at_any_commit(any_storage: URL, moment: str) -> None:
    assert kill_at_every_commit(any_storage, "memory", moment) > 20


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_worker_may_die_after_any_commit_however_it_would_have_ended(any_storage: URL, ending: str) -> None:
    assert kill_at_every_commit(any_storage, ending, "after") > 10


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Breaks a connection the way a server does that goes away after its last commit."""
    monkeypatch.setattr("optuna.storages._rdb.storage.random", SimpleNamespace(random=lambda: 0.0))
    monkeypatch.setattr("search.storage.retry.FIRST_PAUSE", 0.001)

    def lose(connection: Any) -> None:
        plain = getattr(connection, "driver_connection", connection)
        if isinstance(plain, sqlite3.Connection):
            raise sqlite3.OperationalError("disk I/O error")
        plain.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    return lose


@pytest.mark.parametrize("ending", ["memory", "infeasible", "error"])
@pytest.mark.slow
def test_the_answer_to_any_commit_may_be_lost(any_storage: URL, ending: str, lose: Callable[[Any], None]) -> None:
    with opened_ledger(any_storage) as (first, _):
        for unanswered in itertools.count(1):
            ledger, study = new_study(first.database, f"s{unanswered}")
            request_budget(ledger, 1)
            worker, commits = enter(ledger), []

            def after(number: int, connection: Any, unanswered: int = unanswered, commits: list[int] = commits) -> None:
                commits.append(number)
                if number == unanswered:
                    lose(connection)

            with hooked_commits(ledger.engine, nothing, after):
                one_attempt(ledger, study, worker, ending)
            if ending == "error":
                (row,) = slots(ledger)
                assert (row.state, row.errors, row.deaths) == ("waiting", 1, 0)
                assert TrialState.RUNNING not in [trial.state for trial in study.trials]
            else:
                check_ended(ledger, 1)
                assert slots(ledger)[0].deaths == 0
            if len(commits) < unanswered:
                break
        assert unanswered > 10


# Everything at once


class Workers(RuleBasedStateMachine):
    """Three workers, each with a storage of its own as in processes of their own, in every order of transactions."""

    storages: Sequence[RetryingStorage]
    studies = 0

    @initialize(budget=st.integers(1, 4))
    def open(self, budget: int) -> None:
        type(self).studies += 1
        self.name = f"s{self.studies}"
        self.seats = [new_study(storage, self.name) for storage in self.storages]
        self.ledger, self.study = self.seats[3]
        self.budget = request_budget(self.ledger, budget)
        self.puppets: list[Puppet | None] = [None] * 3
        self.ids = [""] * 3
        self.done: list[int] = []

    @rule(seat=st.integers(0, 2), endings=st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=3))
    def come(self, seat: int, endings: list[str]) -> None:
        if self.puppets[seat] is not None:
            return
        ledger, study = self.seats[seat]
        worker = self.ids[seat] = enter(self.ledger)

        def live() -> None:
            for ending in endings:
                try:
                    attempt = one_attempt(ledger, study, worker, ending)
                except (LeaseLostError, UpdateFinishedTrialError):
                    continue
                if attempt is not None:
                    self.done.append(attempt.trial_id)
            unregister_worker(ledger, worker, "done")

        self.puppets[seat] = Puppet(live)

    @rule(seat=st.integers(0, 2), transactions=st.integers(1, 12))
    def go_on(self, seat: int, transactions: int) -> None:
        if (puppet := self.puppets[seat]) is not None:
            puppet.advance(transactions)
            if puppet.over:
                self.puppets[seat] = None

    @rule(seat=st.integers(0, 2), seen=st.booleans())
    def die(self, seat: int, seen: bool) -> None:
        if (puppet := self.puppets[seat]) is not None:
            puppet.kill()
            self.puppets[seat] = None
            if seen:
                mark_dead(self.ledger, self.ids[seat], "killed by signal 9")
                mark_dead(self.ledger, self.ids[seat], "killed by signal 9")

    @rule(seat=st.integers(0, 2))
    def be_thought_dead(self, seat: int) -> None:
        mark_dead(self.ledger, self.ids[seat], "somebody was wrong")

    @rule(times=st.integers(1, 3))
    def all_stand_still_for_long(self, times: int) -> None:
        for _ in range(times):
            reap(self.ledger)
            pass_time(self.ledger, NEVER.lost_after)

    @rule(more=st.integers(1, 2))
    def grow(self, more: int) -> None:
        if self.budget < 7:
            self.budget = request_budget(self.ledger, self.budget + more)

    @invariant()
    def nothing_is_counted_twice(self) -> None:
        if hasattr(self, "ledger"):
            trials = self.ledger.storage.get_all_trials(self.ledger.study_id, deepcopy=False)
            done = [trial.user_attrs[SLOT] for trial in trials if trial.state in DONE]
            assert len(done) == len(set(done)) <= self.budget

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        try:
            for puppet in self.puppets:
                if puppet is not None:
                    puppet.advance(1000)
                    assert puppet.over
            work_to_the_end(self.ledger, self.study)
            trials = {trial._trial_id: trial for trial in self.study.trials}
            assert all(trials[trial_id].state in DONE for trial_id in self.done)
            check_ended(self.ledger, self.budget, same_params=False)
        finally:
            for puppet in self.puppets:
                if puppet is not None and not puppet.over:
                    puppet.kill()


def run_machine(url: URL, examples: int, steps: int = 30) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, suppress_health_check=quiet
    )
    with ExitStack() as stack:
        storages = [stack.enter_context(storage_opened(url)) for _ in range(4)]
        for storage in storages[:3]:
            hold_up_puppets(storage.engine)
        run_state_machine_as_test(type("Workers", (Workers,), {"storages": storages}), settings=chosen)


def test_workers_in_any_order_with_any_deaths_end_with_the_exact_budget(any_storage: URL) -> None:
    run_machine(any_storage, 25 if any_storage.drivername == "sqlite" else 5)


@pytest.mark.slow
def test_workers_in_any_order_with_any_deaths_many_times(any_storage: URL) -> None:
    run_machine(any_storage, 80, 50)
