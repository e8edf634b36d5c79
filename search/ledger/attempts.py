"""Attempts at a slot: each is an Optuna trial of its own, begun, ended and fenced here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.attributes import ATTEMPT, CAUSE, FAULT, SLOT, START, WORKER, Fault
from search.ledger.leases import Lease, LeaseLostError, Ledger, close_slot, is_held, release_lease
from search.storage.rdb import RetryingStorage
from search.storage.tables import SLOTS, SlotState

MOST_DEATHS = 10
"""After this many workers died in one configuration, none an epoch further than the last, it is infeasible."""

MOST_ERRORS = 2
"""After this many attempts at one configuration ended in an exception, its slot draws another one."""

ERRORS_IN_A_ROW = 5
"""This many exceptions in a row, in any configurations, are a bug: all workers stop."""


@dataclass(frozen=True)
class Attempt:
    """One try at a configuration: its lease and its trial.

    Attributes:
        notes: user attributes that are stored in one transaction right before its end; nothing is stored if the lease
            was lost or the process dies.
    """

    lease: Lease
    trial: optuna.Trial
    trial_id: int
    database: RetryingStorage
    notes: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def batched_writes(self) -> Iterator[None]:
        """Write parameters and attributes that the context gives in one transaction, and read trials once."""
        with self.database.batched_writes(self.trial_id), self.database.cached_reads():
            yield

    def should_prune(self) -> bool:
        """Whether the pruner stops this trial; the others are read once."""
        with self.database.cached_reads():
            return self.trial.should_prune()

    def report(self, epoch: int, accuracy: float) -> None:
        """Store an epoch's accuracy, also with two objectives, for which Optuna refuses to.

        Raises:
            UpdateFinishedTrialError: the trial has been ended already.
        """
        if len(self.trial.study.directions) == 1:
            self.trial.report(accuracy, epoch)  # the pruner reads what this stores
        else:
            self.trial.storage.set_trial_intermediate_value(self.trial_id, epoch, accuracy)

    def store_notes(self) -> None:
        """Write the notes.

        Raises:
            LeaseLostError: the trial has been ended already.
        """
        try:
            with self.batched_writes():
                for name, value in self.notes.items():
                    self.trial.set_user_attr(name, value)
        except UpdateFinishedTrialError as error:
            raise LeaseLostError from error


def begin_attempt(
    ledger: Ledger, study: optuna.Study, lease: Lease, given: Mapping[str, Any], about: Mapping[str, Any]
) -> Attempt | None:
    """Create the trial of an attempt, once every earlier attempt at its slot is over.

    Args:
        ledger: of the study.
        study: with the sampler for this slot.
        lease: of the slot.
        given: parameters that the slot's first attempt begins with; later attempts repeat the first.
        about: user attributes that the trial has from its first moment.

    Returns:
        the attempt, or None if the slot turned out to be done.
    """
    earlier = end_earlier_attempts(ledger, lease) if lease.attempt > 1 else []
    if any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in earlier):
        close_slot(ledger, lease)
        return None
    fixed = dict(given)
    errors = 0
    for trial in earlier:
        fixed |= trial.system_attrs.get("fixed_params", {}) | trial.params
        errors += trial.user_attrs.get(FAULT) == Fault.ERROR
        if trial.user_attrs.get(FAULT) == Fault.ERROR and errors % MOST_ERRORS == 0:
            fixed = {}  # this configuration is broken: another one is drawn, which later attempts repeat
    known = {SLOT: lease.slot, ATTEMPT: lease.attempt, **about}
    if lease.start is not None:
        known[START] = lease.start
    system = {"fixed_params": fixed} if fixed else {}
    template = create_trial(state=TrialState.RUNNING, user_attrs=known, system_attrs=system)
    with _fenced(ledger, lease) as tries:
        trial_id = ledger.storage.create_new_trial(ledger.study_id, template)
    if len(tries) > 1:
        _end_twins(ledger, lease, trial_id)
    return Attempt(lease, optuna.Trial(study, trial_id), trial_id, ledger.database)


@contextmanager
def _fenced(ledger: Ledger, lease: Lease) -> Iterator[list[int]]:
    """Create a trial only while the lease is held, and keep others from leasing the slot until it is created.

    Without this a worker that was delayed between the two would create a trial that never ends, since the
    slot's next attempt has begun already.

    Yields:
        a list that grows with every try: after a second try the trial may have been created twice.
    """
    held = (
        sa.select(SLOTS.c.slot)
        .where(is_held(ledger, lease), SLOTS.c.state == SlotState.LEASED)
        .with_for_update(read=True)
    )

    tries: list[int] = []

    def check(connection: sa.Connection) -> None:
        tries.append(len(tries))
        if connection.scalar(held) is None:
            raise LeaseLostError

    with ledger.database.checked_creation(check):
        yield tries


def attempts_at(ledger: Ledger, slot: int) -> list[FrozenTrial]:
    """Every attempt at a slot, in order."""
    trials = ledger.storage.get_all_trials(ledger.study_id, deepcopy=False)
    return [trial for trial in trials if trial.user_attrs.get(SLOT) == slot]


def end_earlier_attempts(ledger: Ledger, lease: Lease) -> list[FrozenTrial]:
    """Mark a slot's earlier attempts that are still RUNNING as FAIL; every earlier attempt, as it ended."""
    for trial in attempts_at(ledger, lease.slot):
        if trial.state == TrialState.RUNNING and trial.user_attrs[ATTEMPT] < lease.attempt:
            fail_trial(ledger, trial, f"worker {trial.user_attrs.get(WORKER)}: {lease.cause or 'died'}", Fault.KILLED)
    return [trial for trial in attempts_at(ledger, lease.slot) if trial.user_attrs[ATTEMPT] < lease.attempt]


def _end_twins(ledger: Ledger, lease: Lease, trial_id: int) -> None:
    """Mark as FAIL the trials that earlier tries of this attempt created, whose connection broke before the answer."""
    for trial in attempts_at(ledger, lease.slot):
        own = trial.user_attrs[ATTEMPT] == lease.attempt and trial._trial_id != trial_id
        if own and trial.state == TrialState.RUNNING:
            fail_trial(ledger, trial, "created twice while the database was away", Fault.LOST)


def fail_trial(ledger: Ledger, trial: FrozenTrial, cause: str, fault: Fault) -> None:
    """Mark a RUNNING trial as FAIL, with cause and fault; one that has just ended stays as it is."""
    try:
        with ledger.database.batched_writes(trial._trial_id):
            ledger.storage.set_trial_user_attr(trial._trial_id, CAUSE, cause)
            ledger.storage.set_trial_user_attr(trial._trial_id, FAULT, fault)
        ledger.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return  # it has just ended by itself


Values = float | Sequence[float] | None
"""Of a COMPLETE trial: one value, or one for each objective."""


def finish_attempt(ledger: Ledger, attempt: Attempt, state: TrialState, value: Values) -> None:
    """Store a result, COMPLETE with its value or PRUNED, with the attempt's notes, and close the slot.

    Raises:
        LeaseLostError: another worker has the slot.
    """
    attempt.store_notes()
    _tell_optuna(ledger, attempt, state, value)
    close_slot(ledger, attempt.lease)


def finish_diverged(ledger: Ledger, attempt: Attempt, cause: str) -> None:
    """Store that a configuration's loss does not stay finite, which is a result: it is PRUNED.

    Raises:
        LeaseLostError, UpdateFinishedTrialError: another worker has the slot.
    """
    attempt.notes.update({CAUSE: cause, FAULT: Fault.NON_FINITE_LOSS})
    if len(attempt.trial.study.directions) > 1:
        # Optuna 5.0's TPE ranks pruned trials by epoch and accuracy, and raises if there are two objectives. It
        # looks at constraints first.
        attempt.trial.set_constraint("loss stays finite", 1.0)
    finish_attempt(ledger, attempt, TrialState.PRUNED, None)


def _tell_optuna(ledger: Ledger, attempt: Attempt, state: TrialState, value: Values) -> None:
    try:
        attempt.trial.study.tell(attempt.trial, value, state)
    except (UpdateFinishedTrialError, ValueError) as error:
        # Either an earlier try stored it and its answer was lost, or this attempt was ended elsewhere.
        stored = ledger.storage.get_trial(attempt.trial_id).state
        if stored != state:
            if stored == TrialState.RUNNING:
                raise
            raise LeaseLostError from error


def hand_back(ledger: Ledger, attempt: Attempt, cause: str, fault: Fault) -> None:
    """Mark an attempt as FAIL and let its slot wait for the next one.

    Raises:
        LeaseLostError: another worker has the slot already.
    """
    end_attempt(ledger, attempt, cause, fault)
    release_lease(ledger, attempt.lease, errors=1 if fault == Fault.ERROR else 0)


def mark_infeasible(ledger: Ledger, attempt: Attempt, cause: str) -> None:
    """Store that a configuration cannot be trained: a broken constraint for the sampler, never a score.

    Raises:
        LeaseLostError: another worker has the slot.
    """
    attempt.notes.update({CAUSE: cause, FAULT: Fault.INFEASIBLE})
    attempt.store_notes()
    try:
        attempt.trial.set_constraint("fits into memory", 1.0)
        # Not `tell`: it would make the last epoch's accuracy, if there was one, the trial's value.
        ledger.storage.set_trial_state_values(attempt.trial_id, TrialState.PRUNED)
    except UpdateFinishedTrialError as error:
        if ledger.storage.get_trial(attempt.trial_id).state != TrialState.PRUNED:
            raise LeaseLostError from error
    close_slot(ledger, attempt.lease)


def end_attempt(ledger: Ledger, attempt: Attempt, cause: str, fault: Fault) -> None:
    """Mark an attempt as FAIL and keep the lease.

    Raises:
        LeaseLostError: the trial has been ended already.
    """
    attempt.notes.update({CAUSE: cause, FAULT: fault})
    attempt.store_notes()
    _tell_optuna(ledger, attempt, TrialState.FAIL, None)


def abandon_lease(ledger: Ledger, lease: Lease, cause: str) -> None:
    """Hand a lease back from a thread that does not train; its attempt ends no matter how far it is."""
    for trial in attempts_at(ledger, lease.slot):
        if trial.state == TrialState.RUNNING and trial.user_attrs[ATTEMPT] == lease.attempt:
            fail_trial(ledger, trial, cause, Fault.PREEMPTED)
    release_lease(ledger, lease)


def errors_in_a_row(ledger: Ledger) -> int:
    """How many attempts, from the last one back to the last result, ended in an exception."""
    count = 0
    for trial in reversed(ledger.storage.get_all_trials(ledger.study_id, deepcopy=False)):
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            break
        count += trial.state == TrialState.FAIL and trial.user_attrs.get(FAULT) == Fault.ERROR
    return count
