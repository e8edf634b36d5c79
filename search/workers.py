"""Who works at a study: registration, heartbeats that keep leases alive, and taking leases from the dead.

A lease ends by itself when its worker was silent for half of ``lost_after``; it is taken away when it stayed so for
the other half, counted from the moment when somebody saw it expired. The second half is what an outage needs: when
the database comes back every lease may have expired, and every worker that lives has that long to renew.

A neighbour in the same machine need not wait: it sees that the process is gone.
"""

import contextlib
import math
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import sqlalchemy as sa

from search.ledger import Lease, Ledger, living, transaction
from search.memory_kills import memory_kills
from search.outage import StorageLostError
from search.process import Process, is_dead, place
from search.study_file import WorkersConfig
from search.tables import LOGS, SLOTS, WORKERS, now


@dataclass(frozen=True)
class Place:
    """A device that a worker may take.

    Attributes:
        name: as ``--device`` takes it.
        text: for people.
        key: equal for workers that share the device, in whatever container they run.
    """

    name: str
    text: str
    key: str


@dataclass(frozen=True)
class WorkerRow:
    """A worker as the others see it.

    Attributes:
        id: of the row.
        host, device: for people; the device is empty until one is taken.
        device_key: equal for workers that share the device: a GPU's UUID.
        process: place and key of its process.
        number, launcher: of a worker that `run` started.
        start_up: seconds from its process's creation until it began its first trial, without waiting for one.
        slot: that it has leased.
        progress: of its trial.
        silent: seconds since its last heartbeat.
        state: ``idle``, ``working``, ``silent`` (no heartbeat for longer than a lease), ``left`` or ``dead``.
        farewell: why it left.
    """

    id: str
    host: str
    device: str
    device_key: str
    place: str
    pid: int
    process: str
    number: int | None
    launcher: str | None
    start_up: float | None
    slot: int | None
    progress: dict[str, Any] | None
    silent: float
    state: str
    farewell: str | None

    @property
    def lives(self) -> bool:
        """Whether it has neither left nor died, as far as is known."""
        return self.state in ("idle", "working", "silent")


@dataclass
class Progress:
    """What a worker's heartbeats tell of its trial; written by the trial, read by the heartbeats."""

    trial: int
    epoch: int = 0
    epochs: int = 0
    accuracy: float | None = None
    images_per_second: float | None = None


def register(ledger: Ledger, process: Process, number: int | None, launcher: str | None, log: str | None = None) -> str:
    """Enter a worker that has no device yet.

    Args:
        ledger: of the study.
        process: its process.
        number, launcher: of a worker that `run` started.
        log: where all that it prints is, for people.

    Returns:
        its id.
    """
    worker = uuid.uuid4().hex

    def work(connection: sa.Connection) -> None:
        row = {
            "id": worker,
            "study_id": ledger.study_id,
            "host": process.host,
            "place": process.place,
            "pid": process.pid,
            "process": process.key,
            "number": number,
            "launcher": launcher,
            "device": "",
            "device_key": worker,
            "began": now(),
            "heartbeat": now(),
        }
        connection.execute(sa.delete(WORKERS).where(WORKERS.c.id == worker))  # entered, but the answer was lost
        connection.execute(sa.insert(WORKERS).values(row))
        connection.execute(sa.delete(LOGS).where(LOGS.c.worker == worker))
        connection.execute(sa.insert(LOGS).values(worker=worker, study_id=ledger.study_id, place=log, lines=""))

    transaction(ledger, work)
    return worker


def take_device(ledger: Ledger, worker: str, devices: Sequence[Place]) -> Place:
    """Of the devices that a worker may have, the one that has the fewest workers."""

    def work(connection: sa.Connection) -> Place:
        if connection.dialect.name == "postgresql":  # two that choose at once must not choose the same GPU
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ledger.study_id, 2)))
        # Of all studies: they share the machine's devices.
        query = sa.select(WORKERS.c.device_key, WORKERS.c.place, WORKERS.c.process)
        query = query.where(living(WORKERS, ledger.times), WORKERS.c.id != worker)
        taken = [key for key, place, process in connection.execute(query) if not is_dead(place, process)]
        device = min(devices, key=lambda one: taken.count(one.key))
        chosen = sa.update(WORKERS).where(WORKERS.c.id == worker).values(device=device.text, device_key=device.key)
        connection.execute(chosen)
        return device

    return transaction(ledger, work)


def tell_start_up(ledger: Ledger, worker: str, seconds: float) -> None:
    """Store how long a worker took to its first trial."""

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.update(WORKERS).where(WORKERS.c.id == worker).values(start_up=seconds))

    transaction(ledger, work)


def tell_lines(ledger: Ledger, worker: str, lines: str) -> None:
    """Store what a worker printed last."""

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.update(LOGS).where(LOGS.c.worker == worker).values(lines=lines))

    transaction(ledger, work)


@dataclass(frozen=True)
class WorkerLog:
    """What a worker has printed.

    Attributes:
        place: where all of it is, for people; None where its launcher did not say.
        lines: the last ones.
    """

    place: str | None
    lines: tuple[str, ...]


def logs(ledger: Ledger) -> dict[str, WorkerLog]:
    """What every worker that ever was has printed, by its id."""

    def work(connection: sa.Connection) -> dict[str, WorkerLog]:
        query = sa.select(LOGS.c.worker, LOGS.c.place, LOGS.c.lines).where(LOGS.c.study_id == ledger.study_id)
        return {
            worker: WorkerLog(place, tuple(lines.splitlines())) for worker, place, lines in connection.execute(query)
        }

    return transaction(ledger, work)


def beat(ledger: Ledger, worker: str, taken: Lease | None, progress: Progress | None) -> bool:
    """One heartbeat: say that this worker lives and renew its lease.

    Returns:
        False where the lease is another's by now.
    """

    def work(connection: sa.Connection) -> bool:
        told = asdict(progress) if progress else None
        connection.execute(sa.update(WORKERS).where(WORKERS.c.id == worker).values(heartbeat=now(), progress=told))
        if taken is None:
            return True
        epoch = progress.epoch if progress else 0
        further = SLOTS.c.epochs < epoch
        renewed = (
            sa.update(SLOTS)
            .where(
                SLOTS.c.study_id == ledger.study_id,
                SLOTS.c.slot == taken.slot,
                SLOTS.c.worker == worker,
                SLOTS.c.state == "leased",
            )
            .values(
                expires=now() + ledger.times.lease,
                suspected=None,
                deaths=sa.case((further, 0), else_=SLOTS.c.deaths),
                epochs=sa.case((further, epoch), else_=SLOTS.c.epochs),
            )
        )
        return connection.execute(renewed).rowcount == 1

    return transaction(ledger, work)


@dataclass(frozen=True)
class Reaped:
    """What a look for the dead found.

    Attributes:
        slots: that wait again.
        leased: slots that somebody has.
    """

    slots: tuple[int, ...]
    leased: int


def reap(ledger: Ledger, anew: bool = False, for_memory: bool = False) -> Reaped:
    """Take leases from the dead, wherever they were.

    Args:
        ledger: of the study.
        anew: this process did not see the database for a while; the workers that were suspected before may not have
            seen it either, so they get the whole grace once more.
        for_memory: the kernel has killed a process for want of memory since the last look.
    """
    neighbours = reap_neighbours(ledger, for_memory)
    leased = SLOTS.c.study_id == ledger.study_id, SLOTS.c.state == "leased"
    late = SLOTS.c.expires < now()
    count = sa.select(sa.func.count().label("leased"), sa.func.count(sa.case((late, 1))).label("late")).where(*leased)
    (found,) = ledger.outage.persist(lambda: ledger.database.rows(count))
    if not found.late:
        return Reaped(tuple(neighbours), found.leased)

    def work(connection: sa.Connection) -> list[int]:
        unseen = sa.true() if anew else SLOTS.c.suspected.is_(None)
        connection.execute(sa.update(SLOTS).where(*leased, late, unseen).values(suspected=now()))
        gone = sa.and_(*leased, late, SLOTS.c.suspected < now() - ledger.times.grace)
        cause = f"its worker gave no sign of life for {ledger.times.lost_after:g} s"
        taken = sa.update(SLOTS).where(gone).values(_taken_away(cause)).returning(SLOTS.c.slot)
        return list(connection.scalars(taken))

    return Reaped((*neighbours, *transaction(ledger, work)), found.leased)


def reap_neighbours(ledger: Ledger, for_memory: bool = False) -> list[int]:
    """Take leases from workers of this machine whose processes are gone; slots that wait again."""
    query = sa.select(WORKERS.c.process, WORKERS.c.id).where(
        WORKERS.c.study_id == ledger.study_id, WORKERS.c.left.is_(None), WORKERS.c.place == place()
    )
    here = ledger.outage.persist(lambda: ledger.database.rows(query))
    dead = {process for process in {row.process for row in here} if is_dead(place(), process)}
    why = "its process ended without a word" + (", while the kernel was out of memory" if for_memory else "")
    return [slot for row in here if row.process in dead for slot in bury(ledger, row.id, why, for_memory)]


def bury(ledger: Ledger, worker: str, farewell: str, for_memory: bool = False) -> list[int]:
    """Note that a worker's process is known to have ended, and let its slot wait again.

    Args:
        ledger: of the study.
        worker: its id.
        farewell: how it ended.
        for_memory: the kernel killed it for want of memory.

    Returns:
        the slot that it had, if any.
    """

    def work(connection: sa.Connection) -> list[int]:
        leave = sa.update(WORKERS).where(WORKERS.c.id == worker, WORKERS.c.left.is_(None))
        left = connection.execute(leave.values(left=now(), farewell=farewell, slot=None, alone=0)).rowcount
        taken = (
            sa.update(SLOTS)
            .where(SLOTS.c.study_id == ledger.study_id, SLOTS.c.worker == worker, SLOTS.c.state == "leased")
            .values(**_taken_away(farewell), memory_kills=SLOTS.c.memory_kills + int(for_memory))
            .returning(SLOTS.c.slot)
        )
        return list(connection.scalars(taken)) if left else []

    return transaction(ledger, work)


def _taken_away(cause: str) -> dict[str, Any]:
    free = {"state": "waiting", "worker": None, "expires": None, "suspected": None}
    return {**free, "deaths": SLOTS.c.deaths + 1, "cause": cause}


def leave(ledger: Ledger, worker: str, farewell: str) -> None:
    """A worker goes; a slot that it still holds waits again."""

    def work(connection: sa.Connection) -> None:
        free = {"state": "waiting", "worker": None, "expires": None, "suspected": None, "cause": farewell}
        held = sa.and_(SLOTS.c.study_id == ledger.study_id, SLOTS.c.worker == worker, SLOTS.c.state == "leased")
        connection.execute(sa.update(SLOTS).where(held).values(free))
        gone = {"left": now(), "farewell": farewell, "slot": None, "alone": 0}
        connection.execute(sa.update(WORKERS).where(WORKERS.c.id == worker, WORKERS.c.left.is_(None)).values(gone))

    transaction(ledger, work)


def adopt(ledger: Ledger, workers: Sequence[str], launcher: str) -> None:
    """A new `run` takes over workers whose own has died."""

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.update(WORKERS).where(WORKERS.c.id.in_(workers)).values(launcher=launcher))

    if workers:
        transaction(ledger, work)


def listed(ledger: Ledger) -> list[WorkerRow]:
    """All workers that ever were, in the order in which they came."""

    def work(connection: sa.Connection) -> list[WorkerRow]:
        query = sa.select(WORKERS, (now() - WORKERS.c.heartbeat).label("silent"))
        query = query.where(WORKERS.c.study_id == ledger.study_id).order_by(WORKERS.c.began)
        return [_row(row, ledger.times) for row in connection.execute(query).mappings()]

    return transaction(ledger, work)


def _row(row: sa.RowMapping, times: WorkersConfig) -> WorkerRow:
    if row["left"] is not None:
        state = "left"
    elif is_dead(row["place"], row["process"]) or row["silent"] > times.lost_after:
        state = "dead"
    elif row["silent"] > times.lease:
        state = "silent"
    else:
        state = "idle" if row["slot"] is None else "working"
    stored = [one.name for one in fields(WorkerRow) if one.name not in ("silent", "state")]
    silent = max(0.0, float(row["silent"]))
    return WorkerRow(**{name: row[name] for name in stored}, silent=silent, state=state)


def want_alone(ledger: Ledger, worker: str, wanted: int) -> None:
    """Say that a worker waits for its device (1), has it to itself (2), or shares it again (0)."""

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.update(WORKERS).where(WORKERS.c.id == worker).values(alone=wanted))

    transaction(ledger, work)


def others_on_device(ledger: Ledger, worker: str) -> int:
    """How many other workers must pause before this one, which waits for its device, has it to itself.

    Of several that wait, the one with the smallest id goes first; what waits does not train.
    """

    def work(connection: sa.Connection) -> int:
        me, other = WORKERS.alias("me"), WORKERS.alias("other")
        trains = sa.and_(other.c.slot.is_not(None), other.c.alone == 0)
        goes_first = sa.and_(other.c.alone == 1, other.c.id < worker)
        query = (
            sa.select(other.c.place, other.c.process)
            .join(me, me.c.device_key == other.c.device_key)
            .where(
                me.c.id == worker,
                other.c.id != worker,
                living(other, ledger.times),
                sa.or_(trains, goes_first, other.c.alone == 2),
            )
        )
        return sum(not is_dead(place, process) for place, process in connection.execute(query))

    return transaction(ledger, work)


DONE = "the budget is done"
"""Farewell of a worker that was not needed any more."""

REAPERS = 4
"""So many workers of a study, by chance, look in every heartbeat whether others have died."""

LINES = 20
"""So many of the last lines that a worker printed are kept with the study."""


class Heart:
    """Beats in a thread of its own for as long as the context lasts."""

    def __init__(self, ledger: Ledger, worker: str, reaped: Callable[[list[int]], None]) -> None:
        self.taken: Lease | None = None
        self.lines: deque[str] = deque(maxlen=LINES)
        """What the worker printed last."""
        self.progress: Progress | None = None
        self.lost = False
        """Whether the lease turned out to be another's. The trial asks for it after every epoch."""
        self.failure: Exception | None = None
        """What ended the beating, such as an outage that lasted too long."""
        self._ledger, self._worker, self._reaped = ledger, worker, reaped
        self._told_lines = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)

    def __enter__(self) -> "Heart":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(timeout=5)
        with contextlib.suppress(StorageLostError):
            self._tell_lines()

    def hold(self, taken: Lease | None) -> None:
        """Keep this lease alive from now on; None where there is none."""
        self.taken, self.progress, self.lost = taken, None, False

    def _tell_lines(self) -> None:
        lines = "\n".join(self.lines.copy())
        if lines != self._told_lines:
            tell_lines(self._ledger, self._worker, lines)
            self._told_lines = lines

    def _beat(self) -> None:
        seen, kills = -math.inf, memory_kills()
        anew, leased = False, 0
        try:
            while not self._stopping.wait(self._ledger.times.heartbeat):
                taken = self.taken
                renewed = beat(self._ledger, self._worker, taken, self.progress)
                self._tell_lines()
                if not renewed and taken is not None and taken is self.taken:
                    self.lost = True
                anew = anew or time.monotonic() - seen > self._ledger.times.lease
                seen = time.monotonic()
                before, kills = kills, memory_kills()
                # By a few of many: if each looked at all the others, a thousand workers would look a million times.
                if random.random() * leased < REAPERS:
                    reaped = reap(self._ledger, anew=anew, for_memory=kills > before)
                    anew, slots, leased = False, list(reaped.slots), reaped.leased
                else:
                    slots = reap_neighbours(self._ledger, for_memory=kills > before)
                if slots:
                    self._reaped(slots)
        except StorageLostError as error:
            self.failure = error
        except Exception as error:  # noqa: BLE001  (a dead heart must not go unnoticed)
            self.failure = error
