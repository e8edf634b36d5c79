"""The ledger's own tables, next to Optuna's in the study's database.

Times are seconds by the database's clock (`now`): the clocks of workers may differ.
"""

from enum import IntEnum, StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

TABLES = sa.MetaData()


class SlotState(StrEnum):
    """What has become of a slot; DONE: its trial is COMPLETE or PRUNED."""

    WAITING = "waiting"
    LEASED = "leased"
    DONE = "done"


class DeviceClaim(IntEnum):
    """How a worker claims its device: it shares it, waits for its other workers to pause, or has it to itself."""

    NONE = 0
    WAITING = 1
    EXCLUSIVE = 2


SLOTS = sa.Table(
    "search_slots",
    TABLES,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", sa.String(8), nullable=False, default=SlotState.WAITING),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("start", sa.Integer),
    sa.Column("worker", sa.String(32)),
    sa.Column("expires", sa.Double),
    sa.Column("suspected", sa.Double),
    sa.Column("errors", sa.Integer, nullable=False, default=0),
    sa.Column("deaths", sa.Integer, nullable=False, default=0),
    sa.Column("memory_kills", sa.Integer, nullable=False, default=0),
    sa.Column("epochs", sa.Integer, nullable=False, default=0),
    sa.Column("cause", sa.Text),
    sa.Index("search_slots_by_state", "study_id", "state", "slot"),
)
"""One row for each configuration of the budget.

state: a `SlotState`.
attempt: counts the leases; with ``worker`` it is what fences off a worker that lost its lease.
start: index of the known good configuration that this slot begins with.
worker, expires: who holds the lease, and until when unless renewed.
suspected: when the lease was first seen expired. It is revoked only a grace later, so that after an outage
    of the database every worker that lives can renew first.
errors, deaths: attempts that ended in an exception; workers that died in mid-attempt without one more epoch.
memory_kills: workers that the kernel killed because memory ran out.
epochs: the most epochs that any attempt has finished.
cause: why the last lease was revoked.
"""

WORKERS = sa.Table(
    "search_workers",
    TABLES,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("study_id", sa.Integer, nullable=False, index=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("place", sa.String(255), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("process", sa.String(64), nullable=False),
    sa.Column("number", sa.Integer),
    sa.Column("launcher", sa.String(64)),
    sa.Column("device", sa.String(255), nullable=False),
    sa.Column("device_key", sa.String(255), nullable=False, index=True),
    sa.Column("alone", sa.Integer, nullable=False, default=DeviceClaim.NONE),
    sa.Column("began", sa.Double, nullable=False),
    sa.Column("start_up", sa.Double),
    sa.Column("heartbeat", sa.Double, nullable=False),
    sa.Column("slot", sa.Integer),
    sa.Column("progress", sa.JSON),
    sa.Column("left", sa.Double),
    sa.Column("farewell", sa.Text),
)
"""One row for each worker process.

place, pid, process: which process it is (`search.host.process`), so that a neighbour can tell whether it lives;
    the place is the pid namespace.
number, launcher: of a worker that `run` started.
device_key: equal for workers that share a device.
alone: its `DeviceClaim`.
start_up: seconds from its process's creation until it began its first trial.
progress: of its trial: number, epoch, epochs, accuracy, images_per_second.
left, farewell: when and why it left; a worker that died without leaving never sets them.
"""

LOGS = sa.Table(
    "search_logs",
    TABLES,
    sa.Column("worker", sa.String(32), primary_key=True),
    sa.Column("study_id", sa.Integer, nullable=False, index=True),
    sa.Column("place", sa.Text),
    sa.Column("lines", sa.Text, nullable=False, default=""),
)
"""One row for each worker process. Not in ``search_workers``, whose rows every heartbeat writes.

place: where everything it prints is, as its launcher says; null if no launcher said.
lines: the last ones, which outlive the worker's machine.
"""


class now(FunctionElement[float]):  # noqa: N801  (a SQL function)
    """Seconds since 1970 by the database's own clock."""

    inherit_cache = True
    type = sa.Double()


@compiles(now, "postgresql")
def _postgresql(*_: Any, **__: Any) -> str:
    return "extract(epoch from clock_timestamp())"


@compiles(now, "sqlite")
def _sqlite(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"
