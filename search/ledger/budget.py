"""How many configurations a study is to have, and what has become of them."""

import sqlalchemy as sa
from optuna.trial import TrialState

from search.attributes import FAULT, SLOT, Fault
from search.events import Budget
from search.ledger.leases import Ledger, transaction
from search.storage.tables import SLOTS, SlotState


def request_budget(ledger: Ledger, trials: int, starts: int = 0) -> int:
    """Bring the budget to ``trials`` slots; what is done or under way stays.

    Args:
        ledger: whose budget.
        trials: slots to have.
        starts: known good configurations; each one that has no slot yet gets the next untouched slot.

    Returns:
        the budget now: more than ``trials`` if more is done or under way already.
    """

    begun, ended = _begun_and_ended(ledger)

    def work(connection: sa.Connection) -> int:
        if connection.dialect.name == "postgresql":  # one at a time; SQLite's transactions are that by themselves
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ledger.study_id, 1)))
        in_study = SLOTS.c.study_id == ledger.study_id
        query = sa.select(sa.func.count(), sa.func.coalesce(sa.func.max(SLOTS.c.slot) + 1, 0)).where(in_study)
        count, following = connection.execute(query).one()
        following = max([following, *(slot + 1 for slot in begun)])  # attempts of a slot are never those of another
        if trials > count:
            rows = [{"study_id": ledger.study_id, "slot": following + i} for i in range(trials - count)]
            connection.execute(sa.insert(SLOTS), rows)
        elif trials < count:
            surplus = (
                sa.select(SLOTS.c.slot)
                .where(in_study, SLOTS.c.state == SlotState.WAITING, sa.or_(SLOTS.c.attempt == 0, _is_one_of(ended)))
                .order_by(SLOTS.c.slot.desc())
                .limit(count - trials)
                .with_for_update(skip_locked=True)
            )
            numbers = list(connection.scalars(surplus))
            connection.execute(sa.delete(SLOTS).where(in_study, SLOTS.c.slot.in_(numbers)))
        used = set(connection.scalars(sa.select(SLOTS.c.start).where(in_study, SLOTS.c.start.is_not(None))))
        fresh = sa.select(SLOTS.c.slot).where(
            in_study, SLOTS.c.state == SlotState.WAITING, SLOTS.c.attempt == 0, SLOTS.c.start.is_(None)
        )
        unused = [start for start in range(starts) if start not in used]
        fresh = fresh.order_by(SLOTS.c.slot).limit(len(unused)).with_for_update(skip_locked=True)
        untouched = connection.scalars(fresh)
        for start, slot in zip(unused, list(untouched), strict=False):
            connection.execute(sa.update(SLOTS).where(in_study, SLOTS.c.slot == slot).values(start=start))
        return int(connection.scalar(sa.select(sa.func.count()).where(in_study)) or 0)

    return transaction(ledger, work)


def _begun_and_ended(ledger: Ledger) -> tuple[set[int], list[tuple[int, int]]]:
    """Slots that ever had a trial; and slots that wait, with their attempt, whose trials all count for nothing."""

    def work(connection: sa.Connection) -> list[tuple[int, int]]:
        query = sa.select(SLOTS.c.slot, SLOTS.c.attempt)
        query = query.where(
            SLOTS.c.study_id == ledger.study_id, SLOTS.c.state == SlotState.WAITING, SLOTS.c.attempt > 0
        )
        return [(slot, attempt) for slot, attempt in connection.execute(query)]

    waiting = transaction(ledger, work)  # before the trials: a slot that is begun after this has another attempt
    trials = ledger.storage.get_all_trials(ledger.study_id, deepcopy=False)
    counts = {trial.user_attrs.get(SLOT) for trial in trials if trial.state != TrialState.FAIL}
    begun = {trial.user_attrs[SLOT] for trial in trials if SLOT in trial.user_attrs}
    return begun, [(slot, attempt) for slot, attempt in waiting if slot not in counts]


def _is_one_of(ended: list[tuple[int, int]]) -> sa.ColumnElement[bool]:
    return sa.or_(sa.false(), *(sa.and_(SLOTS.c.slot == slot, SLOTS.c.attempt == attempt) for slot, attempt in ended))


def count_budget(ledger: Ledger) -> Budget:
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
        infeasible=sum(trial.user_attrs.get(FAULT) == Fault.INFEASIBLE for trial in trials),
        failed_attempts=states.count(TrialState.FAIL),
        running=states.count(TrialState.RUNNING),
        waiting=slots.get(SlotState.WAITING, 0),
    )


def open_slots(ledger: Ledger) -> tuple[int, int]:
    """Slots that wait for a worker, and slots that are leased."""

    def work(connection: sa.Connection) -> tuple[int, int]:
        query = sa.select(SLOTS.c.state, sa.func.count().label("slots")).where(
            SLOTS.c.study_id == ledger.study_id, SLOTS.c.state.in_([SlotState.WAITING, SlotState.LEASED])
        )
        counts = {row.state: row.slots for row in connection.execute(query.group_by(SLOTS.c.state))}
        return counts.get(SlotState.WAITING, 0), counts.get(SlotState.LEASED, 0)

    return transaction(ledger, work)


def is_open(ledger: Ledger) -> bool:
    """Whether any slot of the budget is still to be done."""
    return any(open_slots(ledger))
