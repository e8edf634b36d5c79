"""A worker process whose trials sleep: real processes and real storage traffic, without the cost of training.

    python -m benchmarks.service.sleeper ours|optuna --storage URL --name NAME --seconds 0.2 [--epochs 4]
        [--events FILE]

``ours`` is this project's worker (`search.worker.loop.run_worker`) with a runner that sleeps; ``optuna`` is plain
Optuna's `study.optimize` on the same space, with heartbeats, its retry callback and MaxTrialsCallback, as its
documentation describes it. Every event is a JSON line in FILE. With ``--go`` the process waits until that file exists.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage, RetryFailedTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState

from benchmarks.service.studies import sleeping_study
from search.config.space import sample
from search.config.study_file import StudyConfig
from search.events import Event
from search.ledger.attempts import Attempt
from search.ledger.heartbeat import Heartbeat, TrialProgress
from search.ledger.leases import LeaseLostError, Ledger
from search.storage.url import storage_url, with_password
from search.worker import loop as worker
from search.worker.runner import Failure, TrialResult, WorkerOptions
from search.worker.stop import StoppedError, StopRequest

HEARTBEAT, GRACE = 2, 6


def accuracy(lr: float, epoch: int) -> float:
    """An accuracy to report, which the learning rate and the epoch decide."""
    return lr / (1 + lr) * (1 - 0.5**epoch)


Note = Callable[..., None]


@dataclass
class SleepingRunner:
    """Sleeps in place of every epoch."""

    worker_name: str
    seconds: float
    note: Note

    def run(
        self,
        attempt: Attempt,
        config: StudyConfig,
        heartbeat: Heartbeat,
        stop: StopRequest,
        show: Callable[[Event], None],
    ) -> TrialResult:
        del show
        trial, epochs = attempt.trial, config.trial.epochs
        with attempt.batched_writes():
            settings = sample(config.space, trial)
        self.note("asked", trial=trial.number, slot=attempt.lease.slot, params=trial.params)
        heartbeat.progress = TrialProgress(trial.number, 0, epochs)
        for epoch in range(1, epochs + 1):
            with stop.interrupting():
                time.sleep(self.seconds / epochs)
            if heartbeat.lease_lost:
                raise LeaseLostError
            attempt.report(epoch, accuracy(settings.lr, epoch))
        self.note("slept", trial=trial.number)
        return TrialResult(TrialState.COMPLETE, accuracy(settings.lr, epochs), epochs, self.seconds)

    def classify_failure(self, error: Exception) -> Failure:
        del error
        return Failure.ERROR

    def remove_checkpoint(self, slot: int) -> None:
        self.note("told", slot=slot)

    def free_memory(self) -> None:
        return


def ours(arguments: argparse.Namespace, note: Note) -> None:
    """Work as this project's worker does."""
    stop = StopRequest()
    stop.install()

    def open_runner(ledger: Ledger, study: optuna.Study, id_: str, options: WorkerOptions, show: Any) -> SleepingRunner:
        del ledger, study, options, show
        return SleepingRunner(f"sleeper:{id_[:6]}", arguments.seconds, note)

    options = WorkerOptions(
        storage_url(arguments.storage), arguments.name, "cpu", Path("none"), Path("none"), number=arguments.number,
        launcher=arguments.launcher,
    )  # fmt: skip
    try:
        worker.run_worker(options, lambda event: note("event", text=str(event)), stop, open_runner)
    except StoppedError:
        raise SystemExit(130) from None


def plain(arguments: argparse.Namespace, note: Note) -> None:
    """Work as Optuna's documentation describes it for many processes and faults."""
    url = with_password(storage_url(arguments.storage)).render_as_string(hide_password=False)
    beats = not arguments.no_heartbeat
    storage = RDBStorage(
        url,
        engine_kwargs={"pool_pre_ping": arguments.pre_ping},
        heartbeat_interval=HEARTBEAT if beats else None,
        grace_period=GRACE if beats else None,
        heartbeat_stale_trial_callback=RetryFailedTrialCallback() if beats else None,
    )
    study = optuna.load_study(study_name=arguments.name, storage=storage, sampler=optuna.samplers.RandomSampler())
    config = sleeping_study(1, arguments.epochs)

    def objective(trial: optuna.Trial) -> float:
        settings = sample(config.space, trial)
        note("asked", trial=trial.number, params=trial.params)
        for epoch in range(1, arguments.epochs + 1):
            time.sleep(arguments.seconds / arguments.epochs)
            trial.report(accuracy(settings.lr, epoch), epoch)
        note("slept", trial=trial.number)
        return accuracy(settings.lr, arguments.epochs)

    def note_told(_: optuna.Study, trial: FrozenTrial) -> None:
        note("told", trial=trial.number)

    budget = MaxTrialsCallback(arguments.trials, states=(TrialState.COMPLETE, TrialState.PRUNED))
    study.optimize(objective, callbacks=[note_told, budget])


def main() -> None:
    """Run one worker."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service.sleeper", description=__doc__)
    parser.add_argument("kind", choices=["ours", "optuna"])
    parser.add_argument("--storage", default=None)
    parser.add_argument("--name", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--trials", type=int, default=0)
    parser.add_argument("--events", type=Path)
    parser.add_argument("--go", type=Path)
    parser.add_argument("--number", type=int)
    parser.add_argument("--launcher")
    parser.add_argument("--no-heartbeat", action="store_true", help="plain Optuna without its heartbeats")
    parser.add_argument("--pre-ping", action="store_true", help="plain Optuna with an option that is off by default")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = arguments.events.open("a", buffering=1) if arguments.events else None

    def note(what: str, **more: object) -> None:
        if file:
            file.write(json.dumps({"at": time.time(), "what": what, **more}) + "\n")

    note("ready")
    while arguments.go and not arguments.go.exists():
        time.sleep(0.05)
    note("begins")
    (ours if arguments.kind == "ours" else plain)(arguments, note)
    note("ends")


if __name__ == "__main__":
    main()
