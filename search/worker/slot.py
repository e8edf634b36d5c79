"""One slot of the budget: its configuration is tried, tried again with the device to itself, or given up."""

import gc
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from data.errors import RunError, first_line
from search import study as studies
from search.attributes import OVERHEAD, SECONDS, TRACEBACK, WORKER, Fault
from search.config.study_file import StudyConfig
from search.events import AttemptOutcome, Show, TrialFinished
from search.ledger.attempts import (
    ERRORS_IN_A_ROW,
    MOST_DEATHS,
    MOST_ERRORS,
    Attempt,
    Values,
    begin_attempt,
    end_attempt,
    errors_in_a_row,
    finish_attempt,
    finish_diverged,
    hand_back,
    mark_infeasible,
)
from search.ledger.heartbeat import Heartbeat
from search.ledger.leases import Lease, LeaseLostError, Ledger, lease_again
from search.ledger.registry import claim_device, others_using_device, store_start_up
from search.samplers.pruner import build_pruner
from search.samplers.slots import build_sampler, given_parameters
from search.storage.retry import StorageLostError
from search.storage.tables import DeviceClaim
from search.worker.overhead import OverheadTimer
from search.worker.runner import Failure, TrialResult, TrialRunner
from search.worker.stop import StoppedError, StopRequest

DEVICE_POLL_SECONDS = 0.25
"""How often a worker that waits for its device looks whether the others have paused."""


@dataclass(frozen=True)
class WorkerContext:
    """What a worker has from its first slot to its last.

    Attributes:
        ledger, study: that it works at.
        worker: its id.
        timer: of its trials' overhead.
        heartbeat: renews its lease.
        stop: whether its process was asked to stop.
        show: gets events.
    """

    ledger: Ledger
    study: optuna.Study
    worker: str
    timer: OverheadTimer
    heartbeat: Heartbeat
    stop: StopRequest
    show: Show


@dataclass(frozen=True)
class _TryResult:
    """How one try at a slot went.

    Attributes:
        done: whether the slot is done.
        out_of_memory: what the error said if memory ran out; the attempt's end is then not stored yet.
    """

    done: bool
    out_of_memory: str | None = None


def run_slot(context: WorkerContext, runner: TrialRunner, lease: Lease) -> bool:
    """Try a slot's configuration, with the device to itself if it ran out of memory before.

    Returns:
        whether the slot is done.

    Raises:
        StoppedError: the process was asked to stop; the slot waits for another worker.
        LeaseLostError, UpdateFinishedTrialError: the slot went to another worker.
        RunError: the GPU is broken, or several trials in a row ended in an exception.
    """
    config = studies.definition_now(context.ledger.database, context.study)
    if lease.memory_kills == 1:
        with _exclusive_device(context):
            return _last_try(context, runner, config, lease)
    attempt = _begin(context, runner, config, lease)
    if attempt is None:
        return False
    if lease.memory_kills:
        return _give_up(context, runner, attempt, "the kernel killed its worker for want of memory, also alone")
    if lease.deaths >= MOST_DEATHS:
        return _give_up(context, runner, attempt, f"{lease.deaths} workers died in it, none an epoch further")
    result = _train(context, runner, attempt, config)
    if result.out_of_memory is None:
        return result.done
    cause = f"out of memory: {result.out_of_memory}"
    end_attempt(context.ledger, attempt, cause, Fault.OUT_OF_MEMORY)
    context.show(_finished(attempt, "failed", f"{cause}; once more, alone on the device"))
    with _exclusive_device(context):
        next_lease = lease_again(context.ledger, lease)
        if next_lease is None:
            raise LeaseLostError
        context.heartbeat.set_lease(next_lease)
        return _last_try(context, runner, config, next_lease)


def _last_try(context: WorkerContext, runner: TrialRunner, config: StudyConfig, lease: Lease) -> bool:
    """Try a configuration that ran out of memory next to others: it fits now or is infeasible."""
    runner.free_memory()
    context.timer.start_trial()  # neither the try before nor the wait for the device is this one's overhead
    attempt = _begin(context, runner, config, lease)
    if attempt is None:
        return False
    result = _train(context, runner, attempt, config)
    if result.out_of_memory is None:
        return result.done
    cause = f"out of memory, also alone on the device: {result.out_of_memory}"
    return _give_up(context, runner, attempt, cause)


def _begin(context: WorkerContext, runner: TrialRunner, config: StudyConfig, lease: Lease) -> Attempt | None:
    # If a broken configuration must give way, the slot's own seed would draw it again.
    number = lease.slot + lease.errors // MOST_ERRORS * 1_000_000
    context.study.sampler = build_sampler(config, number)
    context.study.pruner = build_pruner(config)
    trials = partial(context.study.get_trials, deepcopy=False)
    given = given_parameters(config, lease.slot, lease.start, trials)
    attempt = begin_attempt(context.ledger, context.study, lease, given, {WORKER: runner.worker_name})
    if attempt is not None and (seconds := context.timer.start_up()) is not None:
        store_start_up(context.ledger, lease.worker, seconds)
    return attempt


def _train(context: WorkerContext, runner: TrialRunner, attempt: Attempt, config: StudyConfig) -> _TryResult:
    """Train an attempt and store how it ended, unless memory ran out."""
    try:
        result = runner.run(attempt, config, context.heartbeat, context.stop, context.show)
    except StoppedError as error:
        hand_back(context.ledger, attempt, str(error), Fault.PREEMPTED)
        context.show(_finished(attempt, "handed back", str(error)))
        raise
    except (LeaseLostError, UpdateFinishedTrialError, StorageLostError):
        raise
    except Exception as error:  # noqa: BLE001  (one configuration that fails must not end the worker)
        match runner.classify_failure(error):
            case Failure.OUT_OF_MEMORY:
                return _TryResult(False, first_line(error))  # its text alone: the traceback keeps the network alive
            case Failure.NON_FINITE_LOSS:
                # A result, not a fault: this configuration diverges, and would again.
                finish_diverged(context.ledger, attempt, f"non-finite loss: {error}")
                context.show(_finished(attempt, "pruned", "non-finite loss"))
                runner.remove_checkpoint(attempt.lease.slot)
                return _TryResult(True)
            case failure:
                _store_error(context, attempt, error, failure)
                return _TryResult(False)
    _store_result(context, attempt, result)
    runner.remove_checkpoint(attempt.lease.slot)
    context.timer.end_trial()
    return _TryResult(True)


def _store_error(context: WorkerContext, attempt: Attempt, error: Exception, failure: Failure) -> None:
    """Hand a slot back after an exception that is being handled.

    Raises:
        RunError: the GPU is broken, or several trials in a row ended in an exception.
    """
    cause = f"{type(error).__name__}: {first_line(error)}"
    attempt.notes[TRACEBACK] = traceback.format_exc()
    hand_back(context.ledger, attempt, cause, Fault.ERROR)
    context.show(_finished(attempt, "failed", cause))
    if failure is Failure.BROKEN_DEVICE:
        raise RunError(f"the GPU cannot be used by this process any more: {first_line(error)}") from error
    if errors_in_a_row(context.ledger) >= ERRORS_IN_A_ROW:
        raise RunError(
            f"{ERRORS_IN_A_ROW} attempts in a row failed, the last one with: {cause}; "
            "the tracebacks are in the trials' attributes, and the same command goes on where this stopped"
        ) from error


def _store_result(context: WorkerContext, attempt: Attempt, result: TrialResult) -> None:
    values: Values = None
    if result.state == TrialState.COMPLETE:
        values = result.accuracy if result.cost is None else [result.accuracy, result.cost]
    attempt.notes[OVERHEAD] = round(context.timer.overhead(result.trained), 4)
    finish_attempt(context.ledger, attempt, result.state, values)
    outcome: AttemptOutcome = "complete" if result.state == TrialState.COMPLETE else "pruned"
    number, seconds = attempt.trial.number, _seconds(attempt)
    context.show(TrialFinished(number, outcome, result.accuracy, result.epochs, seconds, None))


def _give_up(context: WorkerContext, runner: TrialRunner, attempt: Attempt, cause: str) -> bool:
    """Mark a slot's configuration infeasible; True: the slot is done."""
    mark_infeasible(context.ledger, attempt, cause)
    runner.remove_checkpoint(attempt.lease.slot)
    context.show(_finished(attempt, "infeasible", cause))
    return True


def _finished(attempt: Attempt, outcome: AttemptOutcome, cause: str) -> TrialFinished:
    return TrialFinished(attempt.trial.number, outcome, None, 0, _seconds(attempt), cause)


def _seconds(attempt: Attempt) -> float:
    return float(attempt.notes.get(SECONDS, 0.0))


@contextmanager
def _exclusive_device(context: WorkerContext) -> Iterator[None]:
    """Have the device to oneself: its other workers finish their trials and take no new ones."""
    ledger, worker = context.ledger, context.worker
    claim_device(ledger, worker, DeviceClaim.WAITING)
    try:
        free_looks = 0
        while free_looks < 2:  # twice: another worker may have looked just before this claim was written
            context.stop.check()
            free_looks = 0 if others_using_device(ledger, worker) else free_looks + 1
            time.sleep(DEVICE_POLL_SECONDS)
        claim_device(ledger, worker, DeviceClaim.EXCLUSIVE)
        gc.collect()
        yield
    finally:
        claim_device(ledger, worker, DeviceClaim.NONE)
