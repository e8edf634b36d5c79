"""A machine's team of workers, with children that do what a test says."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from data.errors import RunError, UserError
from search.host.process import Process, pid_namespace, this_process
from search.host.resources import available_cores
from search.launch import local as launch
from search.launch.local import LocalWorkers, WorkerPlan, plan_devices
from search.ledger.budget import count_budget, request_budget
from search.ledger.leases import Ledger
from search.ledger.registry import DeviceOption, list_workers, register_worker, take_device, unregister_worker
from search.storage.url import storage_url
from support.bench import TIMES, one_attempt, opened_ledger, slots, started


class FakeChild:
    pid = 4_000_000  # beyond what the kernel gives out

    def __init__(self) -> None:
        FakeChild.pid += 1
        self.pid = FakeChild.pid
        self.status: int | None = None
        self.asked: list[str] = []

    def poll(self) -> int | None:
        return self.status

    def terminate(self) -> None:
        self.asked.append("terminate")

    def kill(self) -> None:
        self.asked.append("kill")
        self.status = -signal.SIGKILL


@pytest.fixture
def ledger(home: Path) -> Iterator[Ledger]:
    with opened_ledger(storage_url(f"sqlite:///{home / 'launch.db'}"), TIMES) as (ledger, _):
        request_budget(ledger, 3)
        yield ledger


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[FakeChild]:
    """All children, in the order in which they were started."""
    started: list[FakeChild] = []

    def spawn(plan: WorkerPlan, number: int) -> FakeChild:
        plan.logs.mkdir(exist_ok=True)
        started.append(FakeChild())
        return started[-1]

    monkeypatch.setattr(launch, "spawn_worker", spawn)
    return started


def make_local(ledger: Ledger, devices: tuple[str, ...] = ("cpu",)) -> tuple[LocalWorkers, list[str]]:
    told: list[str] = []
    plan = WorkerPlan(devices, 1, (), storage_url("sqlite:///launch.db"), Path("logs"))
    return LocalWorkers(ledger, plan, told.append), told


def tend(local: LocalWorkers, done: int = 0, remaining: int = 3) -> None:
    local.maintain(list_workers(local.ledger), done, remaining)


def enter_child(ledger: Ledger, child: FakeChild, launcher: str | None = None) -> str:
    return register_worker(ledger, Process("here", pid_namespace(), child.pid, "1"), 0, launcher or this_process().key)


def test_devices_are_shared_out_in_turn() -> None:
    assert plan_devices(None, (), 2, cores=7) == ("cpu",)
    assert plan_devices(None, (), 1, cores=16) == ("cpu",) * 4
    assert plan_devices(3, (), 1, cores=2) == ("cpu",) * 3
    assert plan_devices(None, ("cuda:0", "cuda:2"), 2, cores=2) == ("cuda:0", "cuda:2", "cuda:0", "cuda:2")
    assert plan_devices(3, ("cuda:0", "cuda:2"), 1, cores=2) == ("cuda:0", "cuda:2", "cuda:0")
    assert plan_devices(0, ("cuda:0",), 1, cores=2) == ()


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("nonsense", 8)],
)
def test_cores_are_held_to_the_containers_share(monkeypatch: pytest.MonkeyPatch, text: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert available_cores() == cores


def test_a_worker_that_crashes_comes_back_ever_later_and_at_last_stays_away(
    ledger: Ledger, children: list[FakeChild], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(launch.time, "monotonic", lambda: clock[0])
    local, told = make_local(ledger)
    waits = []
    tend(local)
    for crash in range(1, 5):
        children[-1].status = -signal.SIGSEGV
        begun = clock[0]
        while len(children) == crash:
            tend(local)
            clock[0] += 0.25
        waits.append(clock[0] - begun)
    assert waits == sorted(waits)
    assert waits[0] <= 0.25 < 3 < waits[-1] < 5
    children[-1].status = -signal.SIGSEGV
    with pytest.raises(RunError, match=r"worker 0 ended by signal 11 5 times in a row; what it printed: logs"):
        tend(local)
    assert len(children) == 5
    assert "its trial waits for another, and a new worker starts" in told[0]


def test_progress_forgives_crashes(ledger: Ledger, children: list[FakeChild], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(launch.time, "monotonic", lambda: clock[0])
    local, _ = make_local(ledger)
    for done in range(8):
        clock[0] += 100
        tend(local, done)
        clock[0] += 100
        children[-1].status = 1
    assert len(children) == 8


def test_wrong_input_is_told_with_the_workers_complaint(ledger: Ledger, children: list[FakeChild]) -> None:
    local, told = make_local(ledger)
    tend(local)
    local.plan.log(0).write_text("some warning\nsearch: no such device: cuda:7\n\n")
    children[0].status = 2
    with pytest.raises(UserError, match=r"^no such device: cuda:7$"):
        tend(local)
    assert told == [f"worker 0 (pid {children[0].pid}) has left: no such device: cuda:7"]


def test_a_bug_that_met_many_trials_ends_the_run(home: Path, children: list[FakeChild]) -> None:
    with opened_ledger(storage_url("sqlite:///bug.db"), TIMES) as (ledger, study):
        request_budget(ledger, 3)
        local, _ = make_local(ledger)
        tend(local)
        worker = enter_child(ledger, children[0])
        for _ in range(5):
            one_attempt(ledger, study, worker, "error")
        local.plan.log(0).write_text("search: 5 attempts in a row failed\n")
        children[0].status = 1
        with pytest.raises(RunError, match="5 attempts in a row failed"):
            tend(local)


@pytest.mark.parametrize(("kills", "counted"), [(1, 1), (0, 0)])
def test_a_kill_for_memory_is_counted(
    home: Path, children: list[FakeChild], monkeypatch: pytest.MonkeyPatch, kills: int, counted: int
) -> None:
    counter = [7]
    monkeypatch.setattr(launch, "oom_kills", lambda: counter[0])
    with opened_ledger(storage_url("sqlite:///memory.db"), TIMES) as (ledger, study):
        request_budget(ledger, 1)
        local, _ = make_local(ledger)
        local._memory_kills = 7
        tend(local)
        worker = enter_child(ledger, children[0])
        started(ledger, study, worker)
        counter[0] += kills
        children[0].status = -signal.SIGKILL
        tend(local)
        (row,) = slots(ledger)
        assert (row.state, row.memory_kills, row.deaths) == ("waiting", counted, 1)
        assert len(children) == 2


def test_a_slot_whose_worker_died_before_it_closed_it_gets_another_worker(
    home: Path, children: list[FakeChild]
) -> None:
    with opened_ledger(storage_url("sqlite:///last.db"), TIMES) as (ledger, study):
        request_budget(ledger, 1)
        local, _ = make_local(ledger)
        tend(local)
        study.tell(started(ledger, study, enter_child(ledger, children[0])).trial, 0.5)
        children[0].status = -signal.SIGKILL
        count = count_budget(ledger)
        assert count.remaining == 0
        tend(local, count.done, count.remaining)
        assert len(children) == 2


def test_a_second_launcher_starts_nobody_where_a_number_is_taken(ledger: Ledger, children: list[FakeChild]) -> None:
    me = this_process()
    register_worker(ledger, me, 0, me.key)
    local, _ = make_local(ledger, ("cpu", "cpu"))
    tend(local)
    tend(local)
    assert len(children) == 1


def test_orphans_are_adopted_once(ledger: Ledger) -> None:
    me = this_process()
    register_worker(ledger, me, 0, f"{me.pid}@1")  # of a launcher that is no more
    register_worker(ledger, me, 1, me.key)
    register_worker(ledger, me, None, None)
    assert launch.adopt_orphans(ledger) == 1
    assert launch.adopt_orphans(ledger) == 0
    assert [row.launcher for row in list_workers(ledger)] == [me.key, me.key, None]


def test_stopping_asks_then_waits_then_kills(
    ledger: Ledger, children: list[FakeChild], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "LEAVE_SECONDS", 0.3)
    local, _ = make_local(ledger, ("cpu", "cpu"))
    tend(local)
    willing, deaf = children
    willing.terminate = lambda: setattr(willing, "status", 130)  # type: ignore[method-assign]
    begun = time.monotonic()
    local.stop()
    assert time.monotonic() - begun >= 0.3
    assert (willing.asked, deaf.asked) == ([], ["terminate", "kill"])


GPUS = [DeviceOption(f"cuda:{index}", f"GPU {index}", f"gpu-{index}") for index in range(3)]


def test_workers_spread_over_devices_and_ignore_the_dead(any_storage: URL) -> None:
    with opened_ledger(any_storage, TIMES) as (ledger, _):

        def come(where: str = "elsewhere", key: str = "1") -> tuple[str, str]:
            worker = register_worker(ledger, Process("h", where, 1, key), None, None)
            return worker, take_device(ledger, worker, GPUS).name

        assert come(pid_namespace())[1] == "cuda:0"  # of a process of this machine that is no more
        first, second, third = come(), come(), come()
        assert [first[1], second[1], third[1]] == ["cuda:0", "cuda:1", "cuda:2"]
        unregister_worker(ledger, second[0], "done")
        assert come()[1] == "cuda:1"


def test_workers_that_choose_at_once_choose_different_devices(any_storage: URL) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with opened_ledger(any_storage, TIMES) as (ledger, _), ThreadPoolExecutor(3) as pool:

        def come(number: int) -> str:
            worker = register_worker(ledger, Process("h", "elsewhere", number, "1"), None, None)
            return take_device(ledger, worker, GPUS).name

        assert sorted(pool.map(come, range(3))) == ["cuda:0", "cuda:1", "cuda:2"]
