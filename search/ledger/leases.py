"""The exact budget: a slot for every configuration, leased to one worker at a time.

A slot is done when one of its attempts, each an Optuna trial of its own, ended COMPLETE or PRUNED. The order of
writes makes the budget exact, whichever process dies at whichever moment:

- A lease is taken in one statement and kept alive by heartbeats (`search.ledger.heartbeat`); who may hold one is
  in the registry of workers (`search.ledger.registry`).
- An attempt's trial is created in one transaction with a check of its lease (`search.ledger.attempts`), so every
  trial belongs to a lease.
- Before a slot's next attempt begins, every earlier one is marked FAIL. Optuna refuses to write to a finished trial,
  under a row lock: that fences off a worker which lost its lease and does not know it yet.
- A result is written to Optuna's tables first and then to the slot. A worker that dies in between leaves a slot
  whose trial has ended; the next worker that leases it finds that and marks it done.

How many slots there are, and what has become of them, is in `search.ledger.budget`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa
from optuna.storages import BaseStorage, get_storage

from search.config.study_file import WorkersConfig
from search.storage.rdb import RetryingStorage
from search.storage.retry import Retry
from search.storage.tables import SLOTS, WORKERS, DeviceClaim, SlotState, now

T = TypeVar("T")


class LeaseLostError(Exception):
    """Another worker has this slot now, so nothing more of this attempt is written."""


@dataclass(frozen=True)
class Ledger:
    """The budget of one study in one database."""

    study_id: int
    storage: BaseStorage
    database: RetryingStorage
    times: WorkersConfig

    @property
    def engine(self) -> sa.Engine:
        """For the ledger's own tables."""
        return self.database.engine

    @property
    def retry(self) -> Retry:
        """Repeats every call while the database is away."""
        return self.database.retry


@dataclass(frozen=True)
class Lease:
    """The right of one worker to try one configuration."""

    slot: int
    attempt: int
    worker: str
    start: int | None
    errors: int
    deaths: int
    memory_kills: int
    cause: str | None


def open_ledger(storage: RetryingStorage, name: str, times: WorkersConfig) -> tuple[Ledger, optuna.Study]:
    """A study's ledger, and the study itself on the very storage object that the ledger creates its trials in."""
    cached = get_storage(storage)  # Optuna's cache of finished trials must see each trial's creation
    study = optuna.load_study(study_name=name, storage=cached)
    storage.retry.limit, storage.retry.longest_pause = times.max_outage, min(5.0, times.grace / 4)
    return Ledger(cached.get_study_id_from_name(name), cached, storage, times), study


def transaction(ledger: Ledger, work: Callable[[sa.Connection], T]) -> T:
    """Run ``work`` in one transaction; if the database is away, run it again."""

    def once() -> T:
        with ledger.engine.begin() as connection:
            return work(connection)

    return ledger.retry.call(once)


LEASED_COLUMNS = (
    SLOTS.c.attempt,
    SLOTS.c.start,
    SLOTS.c.errors,
    SLOTS.c.deaths,
    SLOTS.c.memory_kills,
    SLOTS.c.cause,
)


@dataclass(frozen=True)
class _LeaseStatements:
    """The statements that lease a slot, made once: two searches for one, the lease, and the worker's own row."""

    own: sa.Select[Any]
    waiting: sa.Select[Any]
    take: sa.UpdateBase
    mark: sa.UpdateBase


@lru_cache(maxsize=4)
def _lease_statements(times: WorkersConfig) -> _LeaseStatements:
    study, slot = sa.bindparam("study", type_=sa.Integer), sa.bindparam("which", type_=sa.Integer)
    worker = sa.bindparam("who", type_=sa.String)
    me, other = WORKERS.alias("me"), WORKERS.alias("other")
    device_is_taken = (
        sa.select(other.c.id)
        .join(me, me.c.device_key == other.c.device_key)
        .where(me.c.id == worker, other.c.id != worker, other.c.alone > DeviceClaim.NONE, is_alive(other, times))
        .exists()
    )
    first = (
        sa.select(SLOTS.c.slot)
        .where(SLOTS.c.study_id == study, ~device_is_taken)
        .order_by(SLOTS.c.slot)
        .limit(1)
        .with_for_update(skip_locked=True, of=SLOTS)
    )
    return _LeaseStatements(
        # Leased to this worker already, when the answer was lost. A query of its own: one query for both sorts
        # the whole queue, which with 20,000 slots takes SQLite 2.6 ms; these two take 0.003.
        own=first.where(SLOTS.c.state == SlotState.LEASED, SLOTS.c.worker == worker),
        waiting=first.where(SLOTS.c.state == SlotState.WAITING),
        take=sa.update(SLOTS)
        .where(SLOTS.c.study_id == study, SLOTS.c.slot == slot)
        .values(
            state=SlotState.LEASED,
            worker=worker,
            attempt=SLOTS.c.attempt + 1,
            expires=now() + times.lease,
            suspected=None,
        )
        .returning(*LEASED_COLUMNS),
        mark=sa.update(WORKERS).where(WORKERS.c.id == worker).values(slot=slot, progress=None),
    )


def lease_slot(ledger: Ledger, worker: str) -> Lease | None:
    """Lease the first slot that waits; None if none may be leased now.

    None may be leased while another worker claims this worker's device for itself.
    """

    statements = _lease_statements(ledger.times)
    values = {"study": ledger.study_id, "who": worker}

    def work(connection: sa.Connection) -> Lease | None:
        # Not "slot = (select ...)": PostgreSQL may run such a subquery more than once in one statement.
        slot = connection.scalar(statements.own, values)
        if slot is None:
            slot = connection.scalar(statements.waiting, values)
        if slot is None:
            return None
        row = connection.execute(statements.take, {**values, "which": slot}).one()
        connection.execute(statements.mark, {**values, "which": slot})
        return Lease(slot, worker=worker, **row._mapping)

    return transaction(ledger, work)


def is_alive(worker: sa.FromClause, times: WorkersConfig) -> sa.ColumnElement[bool]:
    """The condition that a worker has not left and has not been silent for too long."""
    return sa.and_(worker.c.left.is_(None), worker.c.heartbeat > now() - times.lost_after)


def close_slot(ledger: Ledger, lease: Lease) -> None:
    """Mark a slot done, once its result is stored."""

    def work(connection: sa.Connection) -> None:
        clear_worker_slot(connection, lease)
        held = is_held(ledger, lease)
        connection.execute(
            sa.update(SLOTS).where(held).values(state=SlotState.DONE, worker=None, expires=None, suspected=None)
        )

    transaction(ledger, work)


def clear_worker_slot(connection: sa.Connection, lease: Lease) -> None:
    """Within a transaction: remove the slot from its worker's row."""
    # The worker's row before the slot's, as heartbeats do: in the other order the two could deadlock.
    connection.execute(sa.update(WORKERS).where(WORKERS.c.id == lease.worker).values(slot=None, progress=None))


def is_held(ledger: Ledger, lease: Lease) -> sa.ColumnElement[bool]:
    """The condition that this lease still holds its slot."""
    return sa.and_(
        SLOTS.c.study_id == ledger.study_id,
        SLOTS.c.slot == lease.slot,
        SLOTS.c.worker == lease.worker,
        SLOTS.c.attempt == lease.attempt,
    )


def release_lease(ledger: Ledger, lease: Lease, errors: int = 0) -> None:
    """Let a leased slot wait for a worker again."""

    def work(connection: sa.Connection) -> None:
        waits = {"state": SlotState.WAITING, "worker": None, "expires": None, "suspected": None}
        counted = SLOTS.c.errors + errors
        clear_worker_slot(connection, lease)
        connection.execute(sa.update(SLOTS).where(is_held(ledger, lease)).values(**waits, errors=counted))

    transaction(ledger, work)


def lease_again(ledger: Ledger, lease: Lease) -> Lease | None:
    """The same slot's next attempt, for the worker that holds it; None if it does not hold it any more."""

    def work(connection: sa.Connection) -> Lease | None:
        held = is_held(ledger, lease)
        renewed = is_held(ledger, replace(lease, attempt=lease.attempt + 1))  # by an earlier try whose answer was lost
        statement = (
            sa.update(SLOTS)
            .where(sa.or_(held, renewed), SLOTS.c.state == SlotState.LEASED)
            .values(attempt=lease.attempt + 1)
            .returning(*LEASED_COLUMNS)
        )
        row = connection.execute(statement).one_or_none()
        return None if row is None else Lease(lease.slot, worker=lease.worker, **row._mapping)

    return transaction(ledger, work)
