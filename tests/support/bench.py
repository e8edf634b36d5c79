"""A ledger to work at, and workers that can be held up and killed between any two transactions."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
from sqlalchemy.engine import URL

from search.attributes import ATTEMPT, SLOT, WORKER
from search.config.study_file import WorkersConfig
from search.host.process import Process
from search.ledger.attempts import Attempt, begin_attempt, end_attempt, finish_attempt, hand_back, mark_infeasible
from search.ledger.budget import count_budget, is_open
from search.ledger.leases import Lease, LeaseLostError, Ledger, lease_again, lease_slot, open_ledger
from search.ledger.registry import register_worker
from search.storage.connect import storage_opened
from search.storage.rdb import RetryingStorage
from search.storage.tables import SLOTS, WORKERS

TIMES = WorkersConfig(heartbeat=0.2, lost_after=1.25)
NEVER = WorkersConfig(heartbeat=300, lost_after=36_000)
"""Nothing expires unless `pass_time` says so."""

DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@contextmanager
def opened_ledger(url: URL, times: WorkersConfig = NEVER, name: str = "s") -> Iterator[tuple[Ledger, optuna.Study]]:
    """The ledger of a study, which is created where it is not there."""
    with storage_opened(url) as storage:
        yield new_study(storage, name, times)


def new_study(storage: RetryingStorage, name: str, times: WorkersConfig = NEVER) -> tuple[Ledger, optuna.Study]:
    """A study and its ledger in a storage that is open already."""
    optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    return open_ledger(storage, name, times)


def enter(ledger: Ledger, pid: int = 1) -> str:
    """A worker on some other machine."""
    return register_worker(ledger, Process("elsewhere", "elsewhere", pid, "1"), None, None)


def begin(
    ledger: Ledger, study: optuna.Study, lease: Lease, starts: Sequence[Mapping[str, Any]] = ()
) -> Attempt | None:
    """Begin an attempt with a sampler that never draws the same again by itself."""
    study.sampler = RandomSampler()
    given = starts[lease.start] if lease.start is not None and lease.start < len(starts) else {}
    return begin_attempt(ledger, study, lease, given, {WORKER: lease.worker})


def started(ledger: Ledger, study: optuna.Study, worker: str) -> Attempt:
    """An attempt at the next slot, its parameters drawn."""
    lease = lease_slot(ledger, worker)
    assert lease is not None
    attempt = begin(ledger, study, lease)
    assert attempt is not None
    draw(attempt)
    return attempt


def draw(attempt: Attempt) -> None:
    """Take the two parameters of these tests."""
    with attempt.batched_writes():
        attempt.trial.suggest_float("lr", 1e-4, 1.0, log=True)
        attempt.trial.suggest_int("blocks", 1, 10_000)


def train(attempt: Attempt, epochs: int = 2, accuracy: float = 0.5) -> None:
    """Two epochs."""
    draw(attempt)
    for epoch in range(1, epochs + 1):
        attempt.trial.report(accuracy, epoch)


ENDINGS = ("complete", "pruned", "infeasible", "preempted", "error", "memory", "memory twice")


def one_attempt(ledger: Ledger, study: optuna.Study, worker: str, ending: str) -> Attempt | None:
    """Take a slot and bring it to some ending, as `search.worker.loop` does; the attempt that is stored as done."""
    lease = lease_slot(ledger, worker)
    if lease is None or (attempt := begin(ledger, study, lease)) is None:
        return None
    train(attempt)
    if ending in ("preempted", "error"):
        hand_back(ledger, attempt, ending, "error" if ending == "error" else "preempted")
        return None
    if ending.startswith("memory"):
        end_attempt(ledger, attempt, "out of memory", "out of memory")
        again = lease_again(ledger, lease)
        if again is None:
            raise LeaseLostError
        second = begin(ledger, study, again)
        if second is None:
            return None
        attempt = second
        train(attempt)
    if ending in ("infeasible", "memory twice"):
        mark_infeasible(ledger, attempt, "too large")
    elif ending == "pruned":
        finish_attempt(ledger, attempt, TrialState.PRUNED, None)
    else:
        finish_attempt(ledger, attempt, TrialState.COMPLETE, 0.5)
    return attempt


def slots(ledger: Ledger) -> list[sa.Row[Any]]:
    """The rows of the budget."""
    with ledger.engine.begin() as connection:
        query = sa.select(SLOTS).where(SLOTS.c.study_id == ledger.study_id)
        return list(connection.execute(query.order_by(SLOTS.c.slot)))


def pass_time(ledger: Ledger, seconds: float) -> None:
    """Let the clock go on, as all of this study see it."""
    with ledger.engine.begin() as connection:
        for table, columns in ((SLOTS, ("expires", "suspected")), (WORKERS, ("heartbeat",))):
            later = {column: table.c[column] - seconds for column in columns}
            connection.execute(sa.update(table).where(table.c.study_id == ledger.study_id).values(later))


def check_ended(ledger: Ledger, budget: int, same_params: bool = True) -> None:
    """What must hold of a study that has come to its end, whatever happened on the way."""
    trials = ledger.storage.get_all_trials(ledger.study_id)
    rows = slots(ledger)
    assert [row.state for row in rows] == ["done"] * budget
    assert {trial.state for trial in trials} <= {*DONE, TrialState.FAIL}
    for row in rows:
        attempts = [trial for trial in trials if trial.user_attrs[SLOT] == row.slot]
        assert sum(trial.state in DONE for trial in attempts) == 1
        assert all(1 <= trial.user_attrs[ATTEMPT] <= row.attempt for trial in attempts)
        if same_params:
            for name in ("lr", "blocks"):
                assert len({trial.params[name] for trial in attempts if name in trial.params}) == 1
    count = count_budget(ledger)
    assert (count.requested, count.done, count.running, count.waiting) == (budget, budget, 0, 0)


def work_to_the_end(ledger: Ledger, study: optuna.Study) -> None:
    """One worker that nothing happens to; whoever else is silent now has lost his slot."""
    for _ in range(2):
        pass_time(ledger, ledger.times.lost_after)
        reap_now(ledger)
    worker = enter(ledger)
    while is_open(ledger):
        one_attempt(ledger, study, worker, "complete")


def reap_now(ledger: Ledger) -> tuple[int, ...]:
    """Look twice with a grace in between."""
    from search.ledger.heartbeat import reap

    slots = reap(ledger).slots
    pass_time(ledger, ledger.times.lost_after)
    return slots + reap(ledger).slots


class KilledError(BaseException):
    """The process is no more."""


_HERE = threading.local()


class Puppet:
    """A worker that stands still before each of its transactions, until it is told to go on or killed."""

    def __init__(self, body: Callable[[], None]) -> None:
        self.over = self._doomed = False
        self._error: BaseException | None = None
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._run, args=(body,), daemon=True).start()

    def advance(self, transactions: int = 1) -> None:
        """Let it do so many transactions."""
        for _ in range(transactions):
            if not self.over:
                self._go.release()
                assert self._stands.acquire(timeout=60)
        if self._error is not None:
            raise self._error

    def kill(self) -> None:
        """It does nothing more."""
        self._doomed = True
        self.advance()

    def stand(self) -> None:
        """In its own thread: wait for the next word."""
        if not self._doomed:
            self._stands.release()
            self._go.acquire()
        if self._doomed:
            raise KilledError

    def _run(self, body: Callable[[], None]) -> None:
        _HERE.puppet = self
        self._go.acquire()
        try:
            if not self._doomed:
                body()
        except KilledError:
            pass
        except BaseException as error:  # noqa: BLE001  (told to the test)
            self._error = error
        finally:
            self.over = True
            self._stands.release()


def hold_up_puppets(engine: sa.Engine) -> None:
    """Puppets that use this engine stand still before each transaction."""

    def checked_out(*_: object) -> None:
        puppet = getattr(_HERE, "puppet", None)
        if puppet is not None:
            puppet.stand()

    sa.event.listen(engine, "checkout", checked_out)


@contextmanager
def hooked_commits(
    engine: sa.Engine, before: Callable[[int, Any], None], after: Callable[[int, Any], None]
) -> Iterator[None]:
    """Call something right before and right after each commit of this engine, with its number from 1."""
    dialect = engine.dialect
    plain = dialect.do_commit
    count = 0

    def commit(connection: Any) -> None:
        nonlocal count
        count += 1
        number = count
        before(number, connection)
        plain(connection)
        after(number, connection)

    dialect.do_commit = commit
    try:
        yield
    finally:
        dialect.do_commit = plain
