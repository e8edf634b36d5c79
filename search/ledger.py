"""The exact budget: a slot for every configuration, leased to one worker at a time.

A slot is done when one of its attempts, each an Optuna trial of its own, ended COMPLETE or PRUNED. What makes that
exact, whatever dies whenever:

- A lease is taken in one statement and lives by heartbeats (`search.workers`).
- An attempt's trial is created with its slot in the same transaction, so that no trial is ever nobody's.
- Before a slot's next attempt begins, every earlier one is marked FAIL. Optuna refuses to write to a finished trial,
  under a row lock: that fences off a worker which lost its lease and does not know it yet.
- A result is written to Optuna's tables first and then to the slot. A worker that dies in between leaves a slot
  whose trial has ended; the next one to lease it finds that and marks it done.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, TypeVar

import optuna
import sqlalchemy as sa
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, get_storage
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.outage import Outage
from search.persistent import PersistentStorage
from search.study_file import WorkersConfig
from search.tables import SLOTS, WORKERS, now

T = TypeVar("T")

SLOT, ATTEMPT, WORKER, START = "slot", "attempt", "worker", "start"
"""User attributes of a trial: which configuration of the budget it is, the how-manieth try at it, and whose."""

CAUSE, FAULT = "cause", "fault"
"""User attributes of a trial that did not end COMPLETE by itself: why, in words, and which `Fault`."""

Fault = Literal["killed", "lost", "preempted", "out of memory", "infeasible", "non-finite loss", "error"]

MOST_DEATHS = 10
"""So many workers that die one after another in one configuration, none of them an epoch further than the last, are
no accident: it is given up as infeasible."""

MOST_ERRORS = 2
"""So many attempts at one configuration that end in an exception: its slot draws another one."""

ERRORS_IN_A_ROW = 5
"""So many attempts that end in an exception one after another, whatever the configuration, are a bug: all stop."""


class LeaseLostError(Exception):
    """Another worker has this slot now; nothing more of this attempt is written."""


@dataclass(frozen=True)
class Ledger:
    """The budget of one study in one database."""

    study_id: int
    storage: BaseStorage
    database: PersistentStorage
    times: WorkersConfig

    @property
    def engine(self) -> sa.Engine:
        """For the ledger's own tables."""
        return self.database.engine

    @property
    def outage(self) -> Outage:
        """Lets every call live through an outage of the database."""
        return self.database.outage


@dataclass(frozen=True)
class Budget:
    """Configurations asked for and what has become of them.

    Attributes:
        requested: the budget.
        complete, pruned: configurations that are done; infeasible ones are among the pruned.
        infeasible: configurations that do not fit into memory.
        failed_attempts: attempts that count for nothing.
        running: attempts under way.
        waiting: configurations not begun, or to be tried again.
    """

    requested: int
    complete: int
    pruned: int
    infeasible: int
    failed_attempts: int
    running: int
    waiting: int

    @property
    def done(self) -> int:
        """Configurations that count against the budget."""
        return self.complete + self.pruned

    @property
    def remaining(self) -> int:
        """Configurations still to be done."""
        return max(0, self.requested - self.done)


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


@dataclass(frozen=True)
class Attempt:
    """One try at a configuration: its lease and its trial.

    Attributes:
        notes: user attributes that are stored with its end, in one transaction right before it; nothing is stored
            where the lease was lost or the process dies.
    """

    lease: Lease
    trial: optuna.Trial
    trial_id: int
    database: PersistentStorage
    notes: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Parameters and attributes given meanwhile are written in one transaction, and trials are read once."""
        with self.database.gathering(self.trial_id), self.database.one_reading():
            yield

    def should_prune(self) -> bool:
        """Whether the pruner stops this trial, by one reading of the others."""
        with self.database.one_reading():
            return self.trial.should_prune()

    def report(self, epoch: int, accuracy: float) -> None:
        """Store an epoch's accuracy, also where there are two objectives, for which Optuna refuses to.

        Raises:
            UpdateFinishedTrialError: somebody has ended the trial.
        """
        if len(self.trial.study.directions) == 1:
            self.trial.report(accuracy, epoch)  # the pruner looks at what this keeps
        else:
            self.trial.storage.set_trial_intermediate_value(self.trial_id, epoch, accuracy)

    def store_notes(self) -> None:
        """Write the notes.

        Raises:
            LeaseLostError: somebody has ended the trial.
        """
        try:
            with self.gathering():
                for name, value in self.notes.items():
                    self.trial.set_user_attr(name, value)
        except UpdateFinishedTrialError as error:
            raise LeaseLostError from error


def open_ledger(storage: PersistentStorage, name: str, times: WorkersConfig) -> tuple[Ledger, optuna.Study]:
    """A study's ledger, and the study itself on the very storage object that the ledger creates its trials in."""
    cached = get_storage(storage)  # Optuna's cache of finished trials must see each trial's creation
    study = optuna.load_study(study_name=name, storage=cached)
    storage.outage.limit, storage.outage.longest_pause = times.max_outage, min(5.0, times.grace / 4)
    return Ledger(cached.get_study_id_from_name(name), cached, storage, times), study


def transaction(ledger: Ledger, work: Callable[[sa.Connection], T]) -> T:
    """Run ``work`` in one transaction, again where the database was away."""

    def once() -> T:
        with ledger.engine.begin() as connection:
            return work(connection)

    return ledger.outage.persist(once)


def request(ledger: Ledger, trials: int, starts: int = 0) -> int:
    """Bring the budget to ``trials`` slots; what is done or under way stays.

    Args:
        ledger: whose budget.
        trials: asked for.
        starts: known good configurations; each one that no slot has yet gets the next untouched slot.

    Returns:
        the budget now: more than asked for where more is done or under way already.
    """

    begun, ended = _begun_and_ended(ledger)

    def work(connection: sa.Connection) -> int:
        if connection.dialect.name == "postgresql":  # one at a time; SQLite's transactions are that by themselves
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ledger.study_id, 1)))
        mine = SLOTS.c.study_id == ledger.study_id
        query = sa.select(sa.func.count(), sa.func.coalesce(sa.func.max(SLOTS.c.slot) + 1, 0)).where(mine)
        there, following = connection.execute(query).one()
        following = max([following, *(slot + 1 for slot in begun)])  # one slot's attempts are never another's
        if trials > there:
            rows = [{"study_id": ledger.study_id, "slot": following + i} for i in range(trials - there)]
            connection.execute(sa.insert(SLOTS), rows)
        elif trials < there:
            surplus = (
                sa.select(SLOTS.c.slot)
                .where(mine, SLOTS.c.state == "waiting", sa.or_(SLOTS.c.attempt == 0, _is_one_of(ended)))
                .order_by(SLOTS.c.slot.desc())
                .limit(there - trials)
                .with_for_update(skip_locked=True)
            )
            numbers = list(connection.scalars(surplus))
            connection.execute(sa.delete(SLOTS).where(mine, SLOTS.c.slot.in_(numbers)))
        used = set(connection.scalars(sa.select(SLOTS.c.start).where(mine, SLOTS.c.start.is_not(None))))
        fresh = sa.select(SLOTS.c.slot).where(
            mine, SLOTS.c.state == "waiting", SLOTS.c.attempt == 0, SLOTS.c.start.is_(None)
        )
        unused = [start for start in range(starts) if start not in used]
        fresh = fresh.order_by(SLOTS.c.slot).limit(len(unused)).with_for_update(skip_locked=True)
        untouched = connection.scalars(fresh)
        for start, slot in zip(unused, list(untouched), strict=False):
            connection.execute(sa.update(SLOTS).where(mine, SLOTS.c.slot == slot).values(start=start))
        return int(connection.scalar(sa.select(sa.func.count()).where(mine)) or 0)

    return transaction(ledger, work)


def _begun_and_ended(ledger: Ledger) -> tuple[set[int], list[tuple[int, int]]]:
    """Slots that ever had a trial; of those that wait, with their attempt, those whose trials count for nothing."""

    def work(connection: sa.Connection) -> list[tuple[int, int]]:
        query = sa.select(SLOTS.c.slot, SLOTS.c.attempt)
        query = query.where(SLOTS.c.study_id == ledger.study_id, SLOTS.c.state == "waiting", SLOTS.c.attempt > 0)
        return [(slot, attempt) for slot, attempt in connection.execute(query)]

    waiting = transaction(ledger, work)  # before the trials: a slot that is begun after this has another attempt
    trials = ledger.storage.get_all_trials(ledger.study_id, deepcopy=False)
    counts = {trial.user_attrs.get(SLOT) for trial in trials if trial.state != TrialState.FAIL}
    begun = {trial.user_attrs[SLOT] for trial in trials if SLOT in trial.user_attrs}
    return begun, [(slot, attempt) for slot, attempt in waiting if slot not in counts]


def _is_one_of(ended: list[tuple[int, int]]) -> sa.ColumnElement[bool]:
    return sa.or_(sa.false(), *(sa.and_(SLOTS.c.slot == slot, SLOTS.c.attempt == attempt) for slot, attempt in ended))


def budget(ledger: Ledger) -> Budget:
    """Count a study's slots and trials."""

    def work(connection: sa.Connection) -> dict[str, int]:
        query = sa.select(SLOTS.c.state, sa.func.count().label("slots")).where(SLOTS.c.study_id == ledger.study_id)
        return {row.state: row.slots for row in connection.execute(query.group_by(SLOTS.c.state))}

    slots = transaction(ledger, work)
    trials = ledger.storage.get_all_trials(ledger.study_id, deepcopy=False)
    states = [trial.state for trial in trials]
    return Budget(
        requested=sum(slots.values()),
        complete=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED),
        infeasible=sum(trial.user_attrs.get(FAULT) == "infeasible" for trial in trials),
        failed_attempts=states.count(TrialState.FAIL),
        running=states.count(TrialState.RUNNING),
        waiting=slots.get("waiting", 0),
    )


def undone(ledger: Ledger) -> tuple[int, int]:
    """Slots that wait for a worker, and slots that are leased."""

    def work(connection: sa.Connection) -> tuple[int, int]:
        query = sa.select(SLOTS.c.state, sa.func.count().label("slots")).where(
            SLOTS.c.study_id == ledger.study_id, SLOTS.c.state.in_(["waiting", "leased"])
        )
        counts = {row.state: row.slots for row in connection.execute(query.group_by(SLOTS.c.state))}
        return counts.get("waiting", 0), counts.get("leased", 0)

    return transaction(ledger, work)


_LEASED = (
    SLOTS.c.attempt,
    SLOTS.c.start,
    SLOTS.c.errors,
    SLOTS.c.deaths,
    SLOTS.c.memory_kills,
    SLOTS.c.cause,
)


def is_open(ledger: Ledger) -> bool:
    """Whether any slot of the budget is still to be done."""
    return any(undone(ledger))


@dataclass(frozen=True)
class _LeaseStatements:
    """What takes a slot, made once: the two searches for one, the taking, and the worker's own row."""

    own: sa.Select[Any]
    waiting: sa.Select[Any]
    take: sa.UpdateBase
    tell: sa.UpdateBase


@lru_cache(maxsize=4)
def _lease_statements(times: WorkersConfig) -> _LeaseStatements:
    study, slot = sa.bindparam("study", type_=sa.Integer), sa.bindparam("which", type_=sa.Integer)
    worker = sa.bindparam("who", type_=sa.String)
    me, other = WORKERS.alias("me"), WORKERS.alias("other")
    device_is_taken = (
        sa.select(other.c.id)
        .join(me, me.c.device_key == other.c.device_key)
        .where(me.c.id == worker, other.c.id != worker, other.c.alone > 0, living(other, times))
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
        # Leased to this very worker before, where the answer was lost. Asked for by itself: one query for both sorts
        # the whole queue, which with 20,000 slots takes SQLite 2.6 ms; these two take 0.003.
        own=first.where(SLOTS.c.state == "leased", SLOTS.c.worker == worker),
        waiting=first.where(SLOTS.c.state == "waiting"),
        take=sa.update(SLOTS)
        .where(SLOTS.c.study_id == study, SLOTS.c.slot == slot)
        .values(state="leased", worker=worker, attempt=SLOTS.c.attempt + 1, expires=now() + times.lease, suspected=None)
        .returning(*_LEASED),
        tell=sa.update(WORKERS).where(WORKERS.c.id == worker).values(slot=slot, progress=None),
    )


def lease(ledger: Ledger, worker: str) -> Lease | None:
    """Take the first slot that waits; None where none may be taken now.

    None may be taken while another worker has, or waits to have, this worker's device to itself.
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
        connection.execute(statements.tell, {**values, "which": slot})
        return Lease(slot, worker=worker, **row._mapping)

    return transaction(ledger, work)


def living(worker: sa.FromClause, times: WorkersConfig) -> sa.ColumnElement[bool]:
    """The condition that a worker has not left and was not silent for too long."""
    return sa.and_(worker.c.left.is_(None), worker.c.heartbeat > now() - times.lost_after)


def begin(
    ledger: Ledger, study: optuna.Study, taken: Lease, given: Mapping[str, Any], about: Mapping[str, Any]
) -> Attempt | None:
    """Create the trial of an attempt, once every earlier attempt at its slot is over.

    Args:
        ledger: of the study.
        study: with the sampler for this slot.
        taken: the lease.
        given: parameters that the slot's first attempt begins with; later ones have those of the first.
        about: user attributes that the trial has from its first moment.

    Returns:
        the attempt, or None where the slot turned out to be done.
    """
    earlier = end_earlier_attempts(ledger, taken) if taken.attempt > 1 else []
    if any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in earlier):
        close(ledger, taken)
        return None
    fixed = dict(given)
    errors = 0
    for trial in earlier:
        fixed |= trial.system_attrs.get("fixed_params", {}) | trial.params
        errors += trial.user_attrs.get(FAULT) == "error"
        if trial.user_attrs.get(FAULT) == "error" and errors % MOST_ERRORS == 0:
            fixed = {}  # this configuration is broken: another one is drawn, and kept in its turn
    known = {SLOT: taken.slot, ATTEMPT: taken.attempt, **about}
    if taken.start is not None:
        known[START] = taken.start
    system = {"fixed_params": fixed} if fixed else {}
    template = create_trial(state=TrialState.RUNNING, user_attrs=known, system_attrs=system)
    with _fenced(ledger, taken) as tries:
        trial_id = ledger.storage.create_new_trial(ledger.study_id, template)
    if len(tries) > 1:
        _end_twins(ledger, taken, trial_id)
    return Attempt(taken, optuna.Trial(study, trial_id), trial_id, ledger.database)


@contextmanager
def _fenced(ledger: Ledger, taken: Lease) -> Iterator[list[int]]:
    """Let a trial be created only while the lease is held, and the lease not be taken until it is created.

    Without this a worker that was held up between the two would create a trial that nobody ever ends, since the
    slot's next attempt has begun already.

    Yields:
        a list that grows with every try: after the second one the trial may have been created twice.
    """
    held = sa.select(SLOTS.c.slot).where(_held(ledger, taken), SLOTS.c.state == "leased").with_for_update(read=True)

    tries: list[int] = []

    def check(connection: sa.Connection) -> None:
        tries.append(len(tries))
        if connection.scalar(held) is None:
            raise LeaseLostError

    with ledger.database.checking(check):
        yield tries


def attempts(ledger: Ledger, slot: int) -> list[FrozenTrial]:
    """Every attempt at a slot, in their order."""
    trials = ledger.storage.get_all_trials(ledger.study_id, deepcopy=False)
    return [trial for trial in trials if trial.user_attrs.get(SLOT) == slot]


def end_earlier_attempts(ledger: Ledger, taken: Lease) -> list[FrozenTrial]:
    """Mark what is left RUNNING of a slot's earlier attempts FAIL; every earlier attempt, as it ended."""
    for trial in attempts(ledger, taken.slot):
        if trial.state == TrialState.RUNNING and trial.user_attrs[ATTEMPT] < taken.attempt:
            _fail(ledger, trial, f"worker {trial.user_attrs.get(WORKER)}: {taken.cause or 'died'}", "killed")
    return [trial for trial in attempts(ledger, taken.slot) if trial.user_attrs[ATTEMPT] < taken.attempt]


def _end_twins(ledger: Ledger, taken: Lease, trial_id: int) -> None:
    """Mark FAIL what the same attempt created a moment ago, when the connection broke before the answer came."""
    for trial in attempts(ledger, taken.slot):
        own = trial.user_attrs[ATTEMPT] == taken.attempt and trial._trial_id != trial_id
        if own and trial.state == TrialState.RUNNING:
            _fail(ledger, trial, "created twice while the database was away", "lost")


def _fail(ledger: Ledger, trial: FrozenTrial, cause: str, fault: Fault) -> None:
    try:
        with ledger.database.gathering(trial._trial_id):
            ledger.storage.set_trial_user_attr(trial._trial_id, CAUSE, cause)
            ledger.storage.set_trial_user_attr(trial._trial_id, FAULT, fault)
        ledger.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return  # it ended by itself at this very moment


Values = float | Sequence[float] | None
"""Of a COMPLETE trial: one, or one for each objective."""


def finish(ledger: Ledger, attempt: Attempt, state: TrialState, value: Values) -> None:
    """Store a result, COMPLETE with its value or PRUNED, with the attempt's notes, and close the slot.

    Raises:
        LeaseLostError: another worker has the slot.
    """
    attempt.store_notes()
    _tell(ledger, attempt, state, value)
    close(ledger, attempt.lease)


def finish_diverged(ledger: Ledger, attempt: Attempt, cause: str) -> None:
    """Store that a configuration's loss does not stay finite, which is a result: it is PRUNED.

    Raises:
        LeaseLostError, UpdateFinishedTrialError: another worker has the slot.
    """
    attempt.notes.update({CAUSE: cause, FAULT: "non-finite loss"})
    if len(attempt.trial.study.directions) > 1:
        # Optuna 5.0's TPE ranks pruned trials by epoch and accuracy, and raises where there are two objectives. It
        # looks at constraints first.
        attempt.trial.set_constraint("loss stays finite", 1.0)
    finish(ledger, attempt, TrialState.PRUNED, None)


def _tell(ledger: Ledger, attempt: Attempt, state: TrialState, value: Values) -> None:
    try:
        attempt.trial.study.tell(attempt.trial, value, state)
    except (UpdateFinishedTrialError, ValueError) as error:
        # Told before, where the answer was lost with its connection; or somebody else ended this attempt.
        told = ledger.storage.get_trial(attempt.trial_id).state
        if told != state:
            if told == TrialState.RUNNING:
                raise
            raise LeaseLostError from error


def close(ledger: Ledger, taken: Lease) -> None:
    """A slot's result is stored: mark it done."""

    def work(connection: sa.Connection) -> None:
        _forget_slot(connection, taken)
        held = _held(ledger, taken)
        connection.execute(sa.update(SLOTS).where(held).values(state="done", worker=None, expires=None, suspected=None))

    transaction(ledger, work)


def _forget_slot(connection: sa.Connection, taken: Lease) -> None:
    # The worker's row before the slot's, as heartbeats do it: the other way round the two would wait in a circle.
    connection.execute(sa.update(WORKERS).where(WORKERS.c.id == taken.worker).values(slot=None, progress=None))


def _held(ledger: Ledger, taken: Lease) -> sa.ColumnElement[bool]:
    return sa.and_(
        SLOTS.c.study_id == ledger.study_id,
        SLOTS.c.slot == taken.slot,
        SLOTS.c.worker == taken.worker,
        SLOTS.c.attempt == taken.attempt,
    )


def hand_back(ledger: Ledger, attempt: Attempt, cause: str, fault: Fault) -> None:
    """Mark an attempt FAIL and let its slot wait for the next one.

    Raises:
        LeaseLostError: another worker has the slot already.
    """
    end_attempt(ledger, attempt, cause, fault)
    release(ledger, attempt.lease, errors=1 if fault == "error" else 0)


def give_up(ledger: Ledger, attempt: Attempt, cause: str) -> None:
    """Store that a configuration cannot be trained: a broken constraint for the sampler, never a score.

    Raises:
        LeaseLostError: another worker has the slot.
    """
    attempt.notes.update({CAUSE: cause, FAULT: "infeasible"})
    attempt.store_notes()
    try:
        attempt.trial.set_constraint("fits into memory", 1.0)
        # Not `tell`: it would make the last epoch's accuracy, if there was one, the trial's value.
        ledger.storage.set_trial_state_values(attempt.trial_id, TrialState.PRUNED)
    except UpdateFinishedTrialError as error:
        if ledger.storage.get_trial(attempt.trial_id).state != TrialState.PRUNED:
            raise LeaseLostError from error
    close(ledger, attempt.lease)


def end_attempt(ledger: Ledger, attempt: Attempt, cause: str, fault: Fault) -> None:
    """Mark an attempt FAIL and keep the lease.

    Raises:
        LeaseLostError: somebody has ended the trial.
    """
    attempt.notes.update({CAUSE: cause, FAULT: fault})
    attempt.store_notes()
    _tell(ledger, attempt, TrialState.FAIL, None)


def release(ledger: Ledger, taken: Lease, errors: int = 0) -> None:
    """Let a leased slot wait for a worker again."""

    def work(connection: sa.Connection) -> None:
        waits = {"state": "waiting", "worker": None, "expires": None, "suspected": None}
        counted = SLOTS.c.errors + errors
        _forget_slot(connection, taken)
        connection.execute(sa.update(SLOTS).where(_held(ledger, taken)).values(**waits, errors=counted))

    transaction(ledger, work)


def abandon(ledger: Ledger, taken: Lease, cause: str) -> None:
    """Hand a lease back from another thread than the one that trains: its attempt ends here, whatever it is doing."""
    for trial in attempts(ledger, taken.slot):
        if trial.state == TrialState.RUNNING and trial.user_attrs[ATTEMPT] == taken.attempt:
            _fail(ledger, trial, cause, "preempted")
    release(ledger, taken)


def renew(ledger: Ledger, taken: Lease) -> Lease | None:
    """The same slot's next attempt, for the worker that holds it; None where it holds it no more."""

    def work(connection: sa.Connection) -> Lease | None:
        held = _held(ledger, taken)
        renewed = _held(ledger, replace(taken, attempt=taken.attempt + 1))  # before, where the answer was lost
        again = (
            sa.update(SLOTS)
            .where(sa.or_(held, renewed), SLOTS.c.state == "leased")
            .values(attempt=taken.attempt + 1)
            .returning(*_LEASED)
        )
        row = connection.execute(again).one_or_none()
        return None if row is None else Lease(taken.slot, worker=taken.worker, **row._mapping)

    return transaction(ledger, work)


def errors_in_a_row(ledger: Ledger) -> int:
    """How many of the last attempts that ended, by number, ended in an exception one after another."""
    count = 0
    for trial in reversed(ledger.storage.get_all_trials(ledger.study_id, deepcopy=False)):
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            break
        count += trial.state == TrialState.FAIL and trial.user_attrs.get(FAULT) == "error"
    return count
