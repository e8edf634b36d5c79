"""A worker: takes slots of a study's budget, one after another, and trains them.

torch and the images are loaded only once there is something to train; until then a worker is small.
"""

import contextlib
import datetime
import gc
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from data.errors import RunError, first_line
from search import study as studies
from search.attributes import ENVIRONMENT, FINALE, OVERHEAD, SECONDS, TRACEBACK, WORKER, Fault
from search.config.study_file import StudyConfig
from search.console.live import Eta, log_line
from search.events import Event, Note, Outcome, Show, TrialFinished
from search.finale import confirm
from search.host.environment import differences, environment
from search.host.process import this_process
from search.ledger.attempts import (
    ERRORS_IN_A_ROW,
    MOST_DEATHS,
    MOST_ERRORS,
    Attempt,
    Values,
    abandon_lease,
    begin_attempt,
    end_attempt,
    errors_in_a_row,
    finish_attempt,
    finish_diverged,
    hand_back,
    mark_infeasible,
)
from search.ledger.budget import open_slots
from search.ledger.heartbeat import Heartbeat
from search.ledger.leases import Lease, LeaseLostError, Ledger, lease_again, lease_slot, open_ledger
from search.ledger.registry import (
    BUDGET_DONE,
    claim_device,
    others_using_device,
    register_worker,
    store_start_up,
    unregister_worker,
)
from search.samplers.pruner import build_pruner
from search.samplers.slots import build_sampler, given_parameters
from search.storage.connect import storage_opened
from search.storage.rdb import RetryingStorage
from search.storage.retry import StorageLostError
from search.storage.tables import DeviceClaim
from search.storage.url import NETWORK_WARNING, network_file_system
from search.worker.overhead import OverheadTimer
from search.worker.runner import OpenRunner, TrialRunner, WorkerOptions
from search.worker.stop import StoppedError, StopRequest

POLL_SECONDS = 1.0
"""How often a worker that has nothing to do looks for something."""

OPENING_SECONDS = 60.0
"""How long a worker that starts tries to reach the database: workers come in crowds, and while servers restart."""


def open_training_runner(
    ledger: Ledger, study: optuna.Study, worker: str, options: "WorkerOptions", show: Show
) -> TrialRunner:
    """`search.worker.torch_runner.open_torch_runner`, which brings torch, imported at the moment when it is needed."""
    from search.worker.torch_runner import open_torch_runner

    return open_torch_runner(ledger, study, worker, options, show)


def run_worker(
    options: WorkerOptions, show: Show, stop: StopRequest, take_seat: OpenRunner = open_training_runner
) -> int:
    """Work until the budget is done, or ``max_trials`` are, or somebody wants this process to go.

    A worker that comes from elsewhere goes on with the study's confirmation where the study has one; `run` starts
    workers of its own for that.

    Returns:
        the number of configurations that this worker finished.

    Raises:
        UserError, DataError, ConfigError: no such study, other images, or code that reads the study differently.
        StoppedError: somebody wants this process to go; its trial waits for another worker.
        RunError: a bug that met several trials in a row, a broken GPU, or a database that stayed away.
    """
    with storage_opened(options.storage, 1, OPENING_SECONDS, lambda text: show(Note(text))) as storage:
        found = studies.load(storage, options.name)
        done = _work_at(storage, found, options, show, stop, take_seat)
        if done == options.max_trials or options.number is not None or not found.user_attrs.get(FINALE):
            return done
        confirming = confirm.prepare(storage, found)
        if confirming is None:
            return done
        left = None if options.max_trials is None else options.max_trials - done
        options = replace(options, name=confirming.name, out=options.out / "confirm", max_trials=left)
        found = studies.load(storage, confirming.name)
        return done + _work_at(storage, found, options, show, stop, take_seat)


def _work_at(
    storage: RetryingStorage,
    found: optuna.Study,
    options: WorkerOptions,
    show: Show,
    stop: StopRequest,
    take_seat: OpenRunner,
) -> int:
    """Work one study's budget off."""
    record = studies.record_of(found)
    assert record is not None  # load refuses a study without one
    _check_code(found, show)
    if kind := network_file_system(options.storage):
        show(Note(f"warning: {NETWORK_WARNING.format(kind=kind)}"))
    ledger, study = open_ledger(storage, record.name, record.config.workers)
    ledger.retry.tell = lambda text: show(Note(text))
    stop.hurry(ledger.retry)
    worker = register_worker(ledger, this_process(), options.number, options.launcher, options.log)
    exit_reason = BUDGET_DONE
    try:
        with Heartbeat(ledger, worker, lambda slots: show(Note(_wait_again(slots)))) as heart:
            show = _kept(show, heart.lines)
            stop.last_resort = lambda cause: _abandon(ledger, worker, heart.lease, cause)
            return _work(ledger, study, worker, heart, options, show, stop, take_seat)
    except BaseException as error:
        exit_reason = first_line(error)
        raise
    finally:
        _leave(ledger, worker, exit_reason)


def _kept(show: Show, lines: deque[str]) -> Show:
    """Show events and keep their lines."""
    eta = Eta()

    def both(event: Event) -> None:
        now = datetime.datetime.now().astimezone().strftime("%H:%M:%S")
        lines.append(f"{now}  {log_line(event, eta)}")
        show(event)

    return both


def _wait_again(slots: list[int]) -> str:
    if len(slots) == 1:
        return f"slot {slots[0]} waits again: its worker died"
    return f"slots {', '.join(map(str, slots))} wait again: their workers died"


def _abandon(ledger: Ledger, worker: str, taken: Lease | None, cause: str) -> None:
    with contextlib.suppress(StorageLostError):  # then the others see by its silence that it is gone
        if taken is not None:
            abandon_lease(ledger, taken, cause)
        unregister_worker(ledger, worker, cause)


def _leave(ledger: Ledger, worker: str, exit_reason: str) -> None:
    with contextlib.suppress(StorageLostError):  # then the others see by its silence that it is gone
        unregister_worker(ledger, worker, exit_reason)


@dataclass(frozen=True)
class WorkerContext:
    """What a worker has at hand from its first configuration to its last."""

    ledger: Ledger
    study: optuna.Study
    seat: TrialRunner
    watch: OverheadTimer
    heart: Heartbeat
    stop: StopRequest
    show: Show


def _work(
    ledger: Ledger,
    study: optuna.Study,
    worker: str,
    heart: Heartbeat,
    options: WorkerOptions,
    show: Show,
    stop: StopRequest,
    take_seat: OpenRunner,
) -> int:
    watch = OverheadTimer()
    if not _wait_for_a_slot(ledger, watch, heart, stop):
        return 0
    desk = WorkerContext(ledger, study, take_seat(ledger, study, worker, options, show), watch, heart, stop, show)
    done = 0
    while done != options.max_trials:
        _check(heart, stop)
        watch.take()
        taken = lease_slot(ledger, worker)
        if taken is None:
            if not _wait_for_a_slot(ledger, watch, heart, stop):
                break
            watch.nap(POLL_SECONDS / 10)  # it waits, but for others: they have the device to themselves
            continue
        heart.set_lease(taken)
        try:
            done += _one_configuration(desk, taken)
        except (LeaseLostError, UpdateFinishedTrialError):
            show(Note(f"slot {taken.slot} went to another worker while this one was cut off; its result is dropped"))
        finally:
            heart.set_lease(None)
    return done


def _check(heart: Heartbeat, stop: StopRequest) -> None:
    stop.check()
    if heart.failure is not None:
        raise RunError(f"no sign of life can be given: {first_line(heart.failure)}") from heart.failure


def _wait_for_a_slot(ledger: Ledger, watch: OverheadTimer, heart: Heartbeat, stop: StopRequest) -> bool:
    """Wait until a slot waits for a worker; False where the whole budget is done."""
    while True:
        _check(heart, stop)
        waiting, leased = open_slots(ledger)
        if waiting:
            return True
        if not leased:
            return False
        watch.nap(POLL_SECONDS)


def _one_configuration(desk: WorkerContext, taken: Lease) -> bool:
    """Try one configuration, alone on its device where it did not fit beside others; whether it is done."""
    config = studies.definition_now(desk.ledger.database, desk.study)
    if taken.memory_kills == 1:
        with _exclusive_device(desk):
            return _last_try_alone(desk, config, taken)
    attempt = _begin(desk, config, taken)
    if attempt is None:
        return False
    if taken.memory_kills:
        return _give_up(desk, attempt, "the kernel killed its worker for want of memory, also alone")
    if taken.deaths >= MOST_DEATHS:
        return _give_up(desk, attempt, f"{taken.deaths} workers died in it, none an epoch further")
    error = _try(desk, attempt, config)
    if isinstance(error, bool):
        return error
    cause = f"out of memory: {first_line(error)}"
    end_attempt(desk.ledger, attempt, cause, Fault.OUT_OF_MEMORY)
    desk.show(_finished(attempt, "failed", f"{cause}; once more, alone on the device"))
    del error, attempt
    with _exclusive_device(desk):
        again = lease_again(desk.ledger, taken)
        if again is None:
            raise LeaseLostError
        desk.heart.set_lease(again)
        return _last_try_alone(desk, config, again)


def _last_try_alone(desk: WorkerContext, config: StudyConfig, taken: Lease) -> bool:
    """The last try of a configuration that did not fit beside others: it fits now or is infeasible."""
    desk.seat.free_memory()
    desk.watch.take()  # neither the try before nor the waiting for the device is this one's overhead
    attempt = _begin(desk, config, taken)
    if attempt is None:
        return False
    error = _try(desk, attempt, config)
    if isinstance(error, bool):
        return error
    return _give_up(desk, attempt, f"out of memory, also alone on the device: {first_line(error)}")


def _begin(desk: WorkerContext, config: StudyConfig, taken: Lease) -> Attempt | None:
    # Where a broken configuration has to give way, the slot's own seed would draw it again.
    number = taken.slot + taken.errors // MOST_ERRORS * 1_000_000
    desk.study.sampler = build_sampler(config, number)
    desk.study.pruner = build_pruner(config)
    trials = partial(desk.study.get_trials, deepcopy=False)
    given = given_parameters(config, taken.slot, taken.start, trials)
    attempt = begin_attempt(desk.ledger, desk.study, taken, given, {WORKER: desk.seat.worker_name})
    if attempt is not None and (seconds := desk.watch.start_up()) is not None:
        store_start_up(desk.ledger, taken.worker, seconds)
    return attempt


def _try(desk: WorkerContext, attempt: Attempt, config: StudyConfig) -> bool | Exception:
    """Train an attempt and store how it ended: whether its slot is done; or the error, where memory did not suffice."""
    try:
        result = desk.seat.run(attempt, config, desk.heart, desk.stop, desk.show)
    except StoppedError as error:
        hand_back(desk.ledger, attempt, str(error), Fault.PREEMPTED)
        desk.show(_finished(attempt, "handed back", str(error)))
        raise
    except (LeaseLostError, UpdateFinishedTrialError, StorageLostError):
        raise
    except Exception as error:
        trouble = desk.seat.trouble(error)
        if trouble == "out of memory":
            return error.with_traceback(None)  # the traceback holds on to the network
        if trouble == "non-finite loss":
            # A result, not a fault: this configuration diverges, and would again.
            finish_diverged(desk.ledger, attempt, f"non-finite loss: {error}")
            desk.show(_finished(attempt, "pruned", "non-finite loss"))
            desk.seat.forget(attempt.lease.slot)
            return True
        cause = f"{type(error).__name__}: {first_line(error)}"
        attempt.notes[TRACEBACK] = traceback.format_exc()
        hand_back(desk.ledger, attempt, cause, Fault.ERROR)
        desk.show(_finished(attempt, "failed", cause))
        if trouble == "broken device":
            raise RunError(f"the GPU cannot be used by this process any more: {first_line(error)}") from error
        if errors_in_a_row(desk.ledger) >= ERRORS_IN_A_ROW:
            raise RunError(bug_text(cause)) from error
        return False
    value: Values = None
    if result.state == TrialState.COMPLETE:
        value = result.accuracy if result.cost is None else [result.accuracy, result.cost]
    attempt.notes[OVERHEAD] = round(desk.watch.store(result.trained), 4)
    finish_attempt(desk.ledger, attempt, result.state, value)
    outcome: Outcome = "complete" if result.state == TrialState.COMPLETE else "pruned"
    number = attempt.trial.number
    desk.show(TrialFinished(number, outcome, result.accuracy, result.epochs, _seconds(attempt), None))
    desk.seat.forget(attempt.lease.slot)
    desk.watch.stored()
    return True


def bug_text(cause: str) -> str:
    """What to say where so many attempts in a row ended in an exception that all stop."""
    return (
        f"{ERRORS_IN_A_ROW} attempts in a row failed, the last one with: {cause}; "
        "the tracebacks are in the trials' attributes, and the same command goes on where this stopped"
    )


def _give_up(desk: WorkerContext, attempt: Attempt, cause: str) -> bool:
    mark_infeasible(desk.ledger, attempt, cause)
    desk.seat.forget(attempt.lease.slot)
    desk.show(_finished(attempt, "infeasible", cause))
    return True


def _finished(attempt: Attempt, outcome: Outcome, cause: str) -> TrialFinished:
    return TrialFinished(attempt.trial.number, outcome, None, 0, _seconds(attempt), cause)


def _seconds(attempt: Attempt) -> float:
    return float(attempt.notes.get(SECONDS, 0.0))


@contextmanager
def _exclusive_device(desk: WorkerContext) -> Iterator[None]:
    """Have the device to oneself: its other workers finish what they have and take nothing new."""
    ledger, worker = desk.ledger, desk.seat.worker
    claim_device(ledger, worker, DeviceClaim.WAITING)
    try:
        clear = 0
        while clear < 2:  # twice: a neighbour may have looked just before this wish was written
            desk.stop.check()
            clear = 0 if others_using_device(ledger, worker) else clear + 1
            time.sleep(POLL_SECONDS / 4)
        claim_device(ledger, worker, DeviceClaim.EXCLUSIVE)
        gc.collect()
        yield
    finally:
        claim_device(ledger, worker, DeviceClaim.NONE)


def _check_code(study: optuna.Study, show: Show) -> None:
    """Warn of other versions than the study began with; refuse code that reads its space differently.

    Raises:
        UserError: the study's definition means something else to this code.
    """
    studies.refuse_other_reading(study)
    if other := differences(study.user_attrs[ENVIRONMENT], environment()):
        show(Note(f"warning: the study began with {other}; scores may differ a little"))
