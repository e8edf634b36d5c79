"""Heartbeats that keep leases alive, and the end of leases whose workers have died.

A lease expires when its worker has been silent for half of ``lost_after``. It is revoked when the worker stays silent
for the other half, counted from the moment at which it was first seen expired. The second half is for outages: when the
database comes back every lease may have expired, and every worker that lives has that long to renew its own.

A neighbour on the same machine need not wait: it sees that the process is gone.
"""

import contextlib
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from search.host.process import is_dead, pid_namespace
from search.host.resources import oom_kills
from search.ledger.leases import Lease, Ledger, transaction
from search.ledger.registry import store_last_lines
from search.storage.retry import StorageLostError
from search.storage.tables import SLOTS, WORKERS, DeviceClaim, SlotState, now


@dataclass
class TrialProgress:
    """What a worker's heartbeats store of its trial; written by the trial, read by the heartbeats."""

    trial: int
    epoch: int = 0
    epochs: int = 0
    accuracy: float | None = None
    images_per_second: float | None = None


def send_heartbeat(ledger: Ledger, worker: str, lease: Lease | None, progress: TrialProgress | None) -> bool:
    """Send one heartbeat: store that this worker lives, and renew its lease.

    Returns:
        False if another worker has the slot by now.
    """

    def work(connection: sa.Connection) -> bool:
        stored = asdict(progress) if progress else None
        connection.execute(sa.update(WORKERS).where(WORKERS.c.id == worker).values(heartbeat=now(), progress=stored))
        if lease is None:
            return True
        epoch = progress.epoch if progress else 0
        further = SLOTS.c.epochs < epoch
        renewed = (
            sa.update(SLOTS)
            .where(
                SLOTS.c.study_id == ledger.study_id,
                SLOTS.c.slot == lease.slot,
                SLOTS.c.worker == worker,
                SLOTS.c.state == SlotState.LEASED,
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
    """What a look for dead workers found.

    Attributes:
        slots: that wait again.
        leased: number of slots that are leased.
    """

    slots: tuple[int, ...]
    leased: int


def reap(ledger: Ledger, restart_grace: bool = False, for_memory: bool = False) -> Reaped:
    """Revoke the leases of dead workers, on any machine.

    Args:
        ledger: of the study.
        restart_grace: give suspected workers the whole grace again. For a process that did not see the database for
            a while: these workers may not have seen it either.
        for_memory: the kernel has killed a process because memory ran out, since the last look.
    """
    neighbours = reap_local(ledger, for_memory)
    leased = SLOTS.c.study_id == ledger.study_id, SLOTS.c.state == SlotState.LEASED
    late = SLOTS.c.expires < now()
    count = sa.select(sa.func.count().label("leased"), sa.func.count(sa.case((late, 1))).label("late")).where(*leased)
    (counts,) = ledger.retry.call(lambda: ledger.database.rows(count))
    if not counts.late:
        return Reaped(tuple(neighbours), counts.leased)

    def work(connection: sa.Connection) -> list[int]:
        unseen = sa.true() if restart_grace else SLOTS.c.suspected.is_(None)
        connection.execute(sa.update(SLOTS).where(*leased, late, unseen).values(suspected=now()))
        gone = sa.and_(*leased, late, SLOTS.c.suspected < now() - ledger.times.grace)
        cause = f"its worker gave no sign of life for {ledger.times.lost_after:g} s"
        revoked = sa.update(SLOTS).where(gone).values(_revoked(cause)).returning(SLOTS.c.slot)
        return list(connection.scalars(revoked))

    return Reaped((*neighbours, *transaction(ledger, work)), counts.leased)


def reap_local(ledger: Ledger, for_memory: bool = False) -> list[int]:
    """Revoke the leases of this machine's workers whose processes are gone; the slots that wait again."""
    query = sa.select(WORKERS.c.process, WORKERS.c.id).where(
        WORKERS.c.study_id == ledger.study_id, WORKERS.c.left.is_(None), WORKERS.c.place == pid_namespace()
    )
    here = ledger.retry.call(lambda: ledger.database.rows(query))
    dead = {process for process in {row.process for row in here} if is_dead(pid_namespace(), process)}
    why = "its process ended without a word" + (", while the kernel was out of memory" if for_memory else "")
    return [slot for row in here if row.process in dead for slot in mark_dead(ledger, row.id, why, for_memory)]


def mark_dead(ledger: Ledger, worker: str, exit_reason: str, for_memory: bool = False) -> list[int]:
    """Store that a worker's process has ended for certain, and let its slot wait again.

    Args:
        ledger: of the study.
        worker: its id.
        exit_reason: how it ended.
        for_memory: the kernel killed it because memory ran out.

    Returns:
        the slot that it leased, if any.
    """

    def work(connection: sa.Connection) -> list[int]:
        leave = sa.update(WORKERS).where(WORKERS.c.id == worker, WORKERS.c.left.is_(None))
        left = connection.execute(
            leave.values(left=now(), farewell=exit_reason, slot=None, alone=DeviceClaim.NONE)
        ).rowcount
        revoked = (
            sa.update(SLOTS)
            .where(SLOTS.c.study_id == ledger.study_id, SLOTS.c.worker == worker, SLOTS.c.state == SlotState.LEASED)
            .values(**_revoked(exit_reason), memory_kills=SLOTS.c.memory_kills + int(for_memory))
            .returning(SLOTS.c.slot)
        )
        return list(connection.scalars(revoked)) if left else []

    return transaction(ledger, work)


def _revoked(cause: str) -> dict[str, Any]:
    free = {"state": SlotState.WAITING, "worker": None, "expires": None, "suspected": None}
    return {**free, "deaths": SLOTS.c.deaths + 1, "cause": cause}


REAPERS = 4
"""On average this many workers of a study look at every heartbeat whether others have died."""

LAST_LINES = 20
"""This many of the last lines that a worker printed are stored with the study."""


class Heartbeat:
    """Sends heartbeats from a thread of its own for as long as the context lasts."""

    def __init__(self, ledger: Ledger, worker: str, reaped: Callable[[list[int]], None]) -> None:
        self.lease: Lease | None = None
        self.lines: deque[str] = deque(maxlen=LAST_LINES)
        """What the worker printed last."""
        self.progress: TrialProgress | None = None
        self.lease_lost = False
        """Whether another worker turned out to have the slot. The trial reads this after every epoch."""
        self.failure: Exception | None = None
        """What ended the heartbeats, such as an outage that lasted too long."""
        self._ledger, self._worker, self._reaped = ledger, worker, reaped
        self._stored_lines = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(timeout=5)
        with contextlib.suppress(StorageLostError):
            self._store_lines()

    def set_lease(self, lease: Lease | None) -> None:
        """Keep this lease alive from now on; None: there is none."""
        self.lease, self.progress, self.lease_lost = lease, None, False

    def _store_lines(self) -> None:
        lines = "\n".join(self.lines.copy())
        if lines != self._stored_lines:
            store_last_lines(self._ledger, self._worker, lines)
            self._stored_lines = lines

    def _beat(self) -> None:
        seen, kills = -math.inf, oom_kills()
        restart_grace, leased = False, 0
        try:
            while not self._stopping.wait(self._ledger.times.heartbeat):
                lease = self.lease
                renewed = send_heartbeat(self._ledger, self._worker, lease, self.progress)
                self._store_lines()
                if not renewed and lease is not None and lease is self.lease:
                    self.lease_lost = True
                restart_grace = restart_grace or time.monotonic() - seen > self._ledger.times.lease
                seen = time.monotonic()
                before, kills = kills, oom_kills()
                # Only a few of many look: if each looked at all others, a thousand workers would look a million times.
                if random.random() * leased < REAPERS:
                    reaped = reap(self._ledger, restart_grace=restart_grace, for_memory=kills > before)
                    restart_grace, slots, leased = False, list(reaped.slots), reaped.leased
                else:
                    slots = reap_local(self._ledger, for_memory=kills > before)
                if slots:
                    self._reaped(slots)
        except StorageLostError as error:
            self.failure = error
        except Exception as error:  # noqa: BLE001  (the worker must see that its heartbeats have ended)
            self.failure = error
