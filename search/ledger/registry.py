"""The registry of workers: who works at a study, on which device, and how each of them ended."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from search.config.study_file import WorkersConfig
from search.host.process import Process, is_dead
from search.ledger.leases import Ledger, is_alive, transaction
from search.storage.tables import LOGS, SLOTS, WORKERS, DeviceClaim, SlotState, now


@dataclass(frozen=True)
class DeviceOption:
    """A device that a worker may take.

    Attributes:
        name: as ``--device`` takes it.
        text: for people.
        key: equal for workers that share the device, in any container.
    """

    name: str
    text: str
    key: str


class WorkerState(StrEnum):
    """What a worker does; SILENT: it sent no heartbeat for longer than a lease, DEAD: it ended without leaving."""

    IDLE = "idle"
    WORKING = "working"
    SILENT = "silent"
    LEFT = "left"
    DEAD = "dead"


@dataclass(frozen=True)
class WorkerRow:
    """A worker as the others see it.

    Attributes:
        id: of the row.
        host, device: for people; the device is empty until the worker has chosen one.
        device_key: equal for workers that share the device: a GPU's UUID.
        pid_namespace, pid, process: of its process (`search.host.process`); ``process`` is its key.
        number, launcher: of a worker that `run` started.
        start_up: seconds from its process's creation until it began its first trial, without the wait for one.
        slot: that it leases.
        progress: of its trial.
        silent: seconds since its last heartbeat.
        state: as it can be known from here.
        exit_reason: why it left.
    """

    id: str
    host: str
    device: str
    device_key: str
    pid_namespace: str
    pid: int
    process: str
    number: int | None
    launcher: str | None
    start_up: float | None
    slot: int | None
    progress: dict[str, Any] | None
    silent: float
    state: WorkerState
    exit_reason: str | None

    @property
    def lives(self) -> bool:
        """Whether it has neither left nor died, as far as can be known from here."""
        return self.state in (WorkerState.IDLE, WorkerState.WORKING, WorkerState.SILENT)

    @property
    def name(self) -> str:
        """What a person calls the worker."""
        return f"{self.host}:{self.pid}"


def register_worker(
    ledger: Ledger, process: Process, number: int | None, launcher: str | None, log: str | None = None
) -> str:
    """Enter a worker that has no device yet.

    Args:
        ledger: of the study.
        process: its process.
        number, launcher: of a worker that `run` started.
        log: where everything it prints is, for people.

    Returns:
        its id.
    """
    worker = uuid.uuid4().hex

    def work(connection: sa.Connection) -> None:
        row = {
            "id": worker,
            "study_id": ledger.study_id,
            "host": process.host,
            "place": process.pid_namespace,
            "pid": process.pid,
            "process": process.key,
            "number": number,
            "launcher": launcher,
            "device": "",
            "device_key": worker,
            "began": now(),
            "heartbeat": now(),
        }
        connection.execute(sa.delete(WORKERS).where(WORKERS.c.id == worker))  # a try whose answer was lost
        connection.execute(sa.insert(WORKERS).values(row))
        connection.execute(sa.delete(LOGS).where(LOGS.c.worker == worker))
        connection.execute(sa.insert(LOGS).values(worker=worker, study_id=ledger.study_id, place=log, lines=""))

    transaction(ledger, work)
    return worker


def take_device(ledger: Ledger, worker: str, devices: Sequence[DeviceOption]) -> DeviceOption:
    """Give a worker the device, of those that it may use, that has the fewest workers."""

    def work(connection: sa.Connection) -> DeviceOption:
        if connection.dialect.name == "postgresql":  # two that choose at once must not choose the same GPU
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ledger.study_id, 2)))
        # Of all studies: they share the machine's devices.
        query = sa.select(WORKERS.c.device_key, WORKERS.c.place, WORKERS.c.process)
        query = query.where(is_alive(WORKERS, ledger.times), WORKERS.c.id != worker)
        used = [key for key, namespace, process in connection.execute(query) if not is_dead(namespace, process)]
        device = min(devices, key=lambda device: used.count(device.key))
        chosen = sa.update(WORKERS).where(WORKERS.c.id == worker).values(device=device.text, device_key=device.key)
        connection.execute(chosen)
        return device

    return transaction(ledger, work)


def store_start_up(ledger: Ledger, worker: str, seconds: float) -> None:
    """Store how long a worker took to its first trial."""

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.update(WORKERS).where(WORKERS.c.id == worker).values(start_up=seconds))

    transaction(ledger, work)


def store_last_lines(ledger: Ledger, worker: str, lines: str) -> None:
    """Store what a worker printed last."""

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.update(LOGS).where(LOGS.c.worker == worker).values(lines=lines))

    transaction(ledger, work)


@dataclass(frozen=True)
class WorkerLog:
    """What a worker has printed.

    Attributes:
        location: where all of it is, for people; None if its launcher did not say.
        lines: the last ones.
    """

    location: str | None
    lines: tuple[str, ...]


def read_logs(ledger: Ledger) -> dict[str, WorkerLog]:
    """What every worker of the study, past or present, has printed, by its id."""

    def work(connection: sa.Connection) -> dict[str, WorkerLog]:
        query = sa.select(LOGS.c.worker, LOGS.c.place, LOGS.c.lines).where(LOGS.c.study_id == ledger.study_id)
        return {
            worker: WorkerLog(location, tuple(lines.splitlines()))
            for worker, location, lines in connection.execute(query)
        }

    return transaction(ledger, work)


def unregister_worker(ledger: Ledger, worker: str, exit_reason: str) -> None:
    """Store that a worker leaves; a slot that it still leases waits again."""

    def work(connection: sa.Connection) -> None:
        free = {"state": SlotState.WAITING, "worker": None, "expires": None, "suspected": None, "cause": exit_reason}
        held = sa.and_(SLOTS.c.study_id == ledger.study_id, SLOTS.c.worker == worker, SLOTS.c.state == SlotState.LEASED)
        connection.execute(sa.update(SLOTS).where(held).values(free))
        gone = {"left": now(), "farewell": exit_reason, "slot": None, "alone": DeviceClaim.NONE}
        connection.execute(sa.update(WORKERS).where(WORKERS.c.id == worker, WORKERS.c.left.is_(None)).values(gone))

    transaction(ledger, work)


def adopt_workers(ledger: Ledger, workers: Sequence[str], launcher: str) -> None:
    """Give workers whose `run` has died to a new one."""

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.update(WORKERS).where(WORKERS.c.id.in_(workers)).values(launcher=launcher))

    if workers:
        transaction(ledger, work)


def list_workers(ledger: Ledger) -> list[WorkerRow]:
    """All workers of the study, past and present, in the order in which they came."""

    def work(connection: sa.Connection) -> list[WorkerRow]:
        query = sa.select(WORKERS, (now() - WORKERS.c.heartbeat).label("silent"))
        query = query.where(WORKERS.c.study_id == ledger.study_id).order_by(WORKERS.c.began)
        return [_row(row, ledger.times) for row in connection.execute(query).mappings()]

    return transaction(ledger, work)


def _row(row: sa.RowMapping, times: WorkersConfig) -> WorkerRow:
    if row["left"] is not None:
        state = WorkerState.LEFT
    elif is_dead(row["place"], row["process"]) or row["silent"] > times.lost_after:
        state = WorkerState.DEAD
    elif row["silent"] > times.lease:
        state = WorkerState.SILENT
    else:
        state = WorkerState.IDLE if row["slot"] is None else WorkerState.WORKING
    return WorkerRow(
        id=row["id"],
        host=row["host"],
        device=row["device"],
        device_key=row["device_key"],
        pid_namespace=row["place"],
        pid=row["pid"],
        process=row["process"],
        number=row["number"],
        launcher=row["launcher"],
        start_up=row["start_up"],
        slot=row["slot"],
        progress=row["progress"],
        silent=max(0.0, float(row["silent"])),
        state=state,
        exit_reason=row["farewell"],
    )


def claim_device(ledger: Ledger, worker: str, claim: DeviceClaim) -> None:
    """Store how a worker claims its device from now on."""

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.update(WORKERS).where(WORKERS.c.id == worker).values(alone=claim))

    transaction(ledger, work)


def others_using_device(ledger: Ledger, worker: str) -> int:
    """How many other workers must pause before this one, which waits for its device, has it to itself.

    Of several that wait, the one with the smallest id goes first. A worker that waits does not train.
    """

    def work(connection: sa.Connection) -> int:
        me, other = WORKERS.alias("me"), WORKERS.alias("other")
        trains = sa.and_(other.c.slot.is_not(None), other.c.alone == DeviceClaim.NONE)
        goes_first = sa.and_(other.c.alone == DeviceClaim.WAITING, other.c.id < worker)
        query = (
            sa.select(other.c.place, other.c.process)
            .join(me, me.c.device_key == other.c.device_key)
            .where(
                me.c.id == worker,
                other.c.id != worker,
                is_alive(other, ledger.times),
                sa.or_(trains, goes_first, other.c.alone == DeviceClaim.EXCLUSIVE),
            )
        )
        return sum(not is_dead(namespace, process) for namespace, process in connection.execute(query))

    return transaction(ledger, work)


BUDGET_DONE = "the budget is done"
"""Exit reason of a worker that was not needed any more."""
