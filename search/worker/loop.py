"""A worker's loop: it takes slots of a study's budget, one after another, and trains them.

torch and the images are loaded only once there is something to train; until then a worker is small.
"""

import contextlib
import datetime
from collections import deque
from dataclasses import replace

import optuna
from optuna.exceptions import UpdateFinishedTrialError

from data.errors import RunError, first_line
from search import study as studies
from search.attributes import ENVIRONMENT, FINALE
from search.console.live import Eta, log_line
from search.events import Event, Note, Show
from search.finale import confirm
from search.host.environment import differences, environment
from search.host.process import this_process
from search.ledger.attempts import abandon_lease
from search.ledger.budget import open_slots
from search.ledger.heartbeat import Heartbeat
from search.ledger.leases import Lease, LeaseLostError, Ledger, lease_slot, open_ledger
from search.ledger.registry import BUDGET_DONE, register_worker, unregister_worker
from search.storage.connect import storage_opened
from search.storage.rdb import RetryingStorage
from search.storage.retry import StorageLostError
from search.storage.url import NETWORK_WARNING, network_file_system
from search.worker.overhead import OverheadTimer
from search.worker.runner import OpenRunner, TrialRunner, WorkerOptions
from search.worker.slot import WorkerContext, run_slot
from search.worker.stop import StopRequest

POLL_SECONDS = 1.0
"""How often a worker that has nothing to do looks for a slot."""

OPENING_SECONDS = 60.0
"""How long a starting worker tries to reach the database: workers start in crowds, and while servers restart."""


def open_training_runner(
    ledger: Ledger, study: optuna.Study, worker: str, options: WorkerOptions, show: Show
) -> TrialRunner:
    """`search.worker.torch_runner.open_torch_runner`, which imports torch, imported only when it is needed."""
    from search.worker.torch_runner import open_torch_runner

    return open_torch_runner(ledger, study, worker, options, show)


def run_worker(
    options: WorkerOptions, show: Show, stop: StopRequest, open_runner: OpenRunner = open_training_runner
) -> int:
    """Work until the budget or ``max_trials`` configurations are done, or this process is asked to stop.

    A worker that no `run` started goes on with the study's confirmation, if the study has one; `run` starts
    workers of its own for that.

    Returns:
        the number of configurations that this worker finished.

    Raises:
        UserError, DataError, ConfigError: no such study, other images, or code that reads the study differently.
        StoppedError: this process was asked to stop; its trial waits for another worker.
        RunError: a bug that ended several trials in a row, a broken GPU, or a database that stayed away.
    """
    with storage_opened(options.storage, 1, OPENING_SECONDS, lambda text: show(Note(text))) as storage:
        study = studies.load(storage, options.name)
        done = _work_at(storage, study, options, show, stop, open_runner)
        if done == options.max_trials or options.number is not None or not study.user_attrs.get(FINALE):
            return done
        confirming = confirm.prepare(storage, study)
        if confirming is None:
            return done
        left = None if options.max_trials is None else options.max_trials - done
        options = replace(options, name=confirming.name, out=options.out / "confirm", max_trials=left)
        study = studies.load(storage, confirming.name)
        return done + _work_at(storage, study, options, show, stop, open_runner)


def _work_at(
    storage: RetryingStorage,
    loaded: optuna.Study,
    options: WorkerOptions,
    show: Show,
    stop: StopRequest,
    open_runner: OpenRunner,
) -> int:
    """Register at one study and work there; how many configurations were finished."""
    record = studies.record_of(loaded)
    assert record is not None  # load refuses a study without one
    _check_code(loaded, show)
    if kind := network_file_system(options.storage):
        show(Note(f"warning: {NETWORK_WARNING.format(kind=kind)}"))
    ledger, study = open_ledger(storage, record.name, record.config.workers)
    ledger.retry.tell = lambda text: show(Note(text))
    stop.also_ends(ledger.retry)
    worker = register_worker(ledger, this_process(), options.number, options.launcher, options.log)
    exit_reason = BUDGET_DONE
    try:
        with Heartbeat(ledger, worker, lambda slots: show(Note(_reaped_text(slots)))) as heartbeat:
            show = _also_kept(show, heartbeat.lines)
            stop.last_resort = lambda cause: _abandon(ledger, worker, heartbeat.lease, cause)
            context = WorkerContext(ledger, study, worker, OverheadTimer(), heartbeat, stop, show)
            return _work(context, options, open_runner)
    except BaseException as error:
        exit_reason = first_line(error)
        raise
    finally:
        _leave(ledger, worker, exit_reason)


def _also_kept(show: Show, lines: deque[str]) -> Show:
    """Show events and keep their lines."""
    eta = Eta()

    def show_and_keep(event: Event) -> None:
        clock = datetime.datetime.now().astimezone().strftime("%H:%M:%S")
        lines.append(f"{clock}  {log_line(event, eta)}")
        show(event)

    return show_and_keep


def _reaped_text(slots: list[int]) -> str:
    if len(slots) == 1:
        return f"slot {slots[0]} waits again: its worker died"
    return f"slots {', '.join(map(str, slots))} wait again: their workers died"


def _abandon(ledger: Ledger, worker: str, lease: Lease | None, cause: str) -> None:
    with contextlib.suppress(StorageLostError):  # then the others notice its silence
        if lease is not None:
            abandon_lease(ledger, lease, cause)
        unregister_worker(ledger, worker, cause)


def _leave(ledger: Ledger, worker: str, exit_reason: str) -> None:
    with contextlib.suppress(StorageLostError):  # then the others notice its silence
        unregister_worker(ledger, worker, exit_reason)


def _work(context: WorkerContext, options: WorkerOptions, open_runner: OpenRunner) -> int:
    """Run slots until none is left; how many were done."""
    if not _wait_for_slot(context):
        return 0
    runner = open_runner(context.ledger, context.study, context.worker, options, context.show)
    done = 0
    while done != options.max_trials:
        _check(context)
        context.timer.start_trial()
        lease = lease_slot(context.ledger, context.worker)
        if lease is None:
            if not _wait_for_slot(context):
                break
            context.timer.wait_idle(POLL_SECONDS / 10)  # a slot waits, but another worker has the device to itself
            continue
        context.heartbeat.set_lease(lease)
        try:
            done += run_slot(context, runner, lease)
        except (LeaseLostError, UpdateFinishedTrialError):
            text = f"slot {lease.slot} went to another worker while this one was cut off; its result is dropped"
            context.show(Note(text))
        finally:
            context.heartbeat.set_lease(None)
    return done


def _check(context: WorkerContext) -> None:
    """Raise if the worker was asked to stop, or its heartbeat has failed."""
    context.stop.check()
    failure = context.heartbeat.failure
    if failure is not None:
        raise RunError(f"no sign of life can be given: {first_line(failure)}") from failure


def _wait_for_slot(context: WorkerContext) -> bool:
    """Wait until a slot waits for a worker; False if the whole budget is done."""
    while True:
        _check(context)
        waiting, leased = open_slots(context.ledger)
        if waiting:
            return True
        if not leased:
            return False
        context.timer.wait_idle(POLL_SECONDS)


def _check_code(study: optuna.Study, show: Show) -> None:
    """Warn of other versions than the study began with; refuse code that reads its space differently.

    Raises:
        UserError: the study's definition means something else to this code.
    """
    studies.refuse_other_reading(study)
    if other := differences(study.user_attrs[ENVIRONMENT], environment()):
        show(Note(f"warning: the study began with {other}; scores may differ a little"))
