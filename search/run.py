"""``search run``: create or resume a study, see that its budget is worked off, retrain and test the winner.

The work itself is done by workers, processes of their own (`search.worker`): they go on when this process dies, and
the same command finds them again.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from sqlalchemy.engine import URL

from data import source
from data.folders import data_folder
from data.split import load_split
from model.device import describe_device, keep_freed_pages, resolve_devices
from model.saved import write_json
from search import ledger as ledgers
from search import study as studies
from search.environment import environment
from search.errors import UserError
from search.events import Note, Show, TrialFinished
from search.launch import LocalWorkers, Team, adopt_orphans, available_cores, dashboard, plan_devices, threads_each
from search.ledger import Budget, Ledger, open_ledger
from search.outage import StorageLostError
from search.publish import publish
from search.retrain import retrain
from search.storage import PersistentStorage, exclusive, network_file_system, opened, shown
from search.study import DIVISION_SEED, DatasetRecord, StudyRecord
from search.study_file import StudyConfig, find_study
from search.summary import FALLBACK_WARNING, summarise
from search.watch import Watcher
from search.worker import NETWORK_WARNING
from search.workers import listed

POLL_SECONDS = 1.0
"""How often `run` looks at its workers and at the study."""

PUBLISH_SECONDS = 10.0
"""How often the study's notes, pictures and graphs are brought up to date."""


@dataclass(frozen=True)
class RunOptions:
    """What the command line asks for; None leaves a thing to the study file, to what is stored or is measured."""

    storage: URL
    study: str | None = None
    name: str | None = None
    trials: int | None = None
    seed: int | None = None
    data_dir: Path | None = None
    dataset: str = "auto"
    device: str = "auto"
    out: Path | None = None
    timeout: float | None = None
    finale: bool = True
    workers: int | None = None
    workers_per_gpu: int | None = None
    dashboard: bool = False
    max_epochs: int | None = None
    train_images: int | None = None
    max_retrain_epochs: int | None = None


@dataclass(frozen=True)
class RunEnd:
    """How a run ended: its summary, the folder that holds the outputs, and whether the budget is done."""

    summary: dict[str, Any]
    out: Path
    finished: bool


def run(options: RunOptions, show: Show) -> RunEnd:
    """Run a study from wherever it stands to its end.

    Raises:
        UserError, DataError, ConfigError: wrong input; nothing stored is lost.
        RunError: the run failed.
        KeyboardInterrupt: interrupted; the trials of this machine's workers are back in the queue.
    """
    devices = resolve_devices(options.device)
    torch.set_float32_matmul_precision("high")
    source.check_name(options.dataset)
    name = studies.check_name(_default_name(options, devices[0]) if options.name is None else options.name)
    out = options.out or Path("studies") / name
    _check_writable(out)
    data_dir = data_folder(options.data_dir)
    with opened(options.storage) as storage:
        if kind := network_file_system(options.storage):
            show(Note(f"warning: {NETWORK_WARNING.format(kind=kind)}"))
        with exclusive(options.storage, f"{name}.creation"):
            record = _created(storage, name, options, devices[0], data_dir, show)
        ledger, study = open_ledger(storage, name, record.config.workers)
        storage.outage.tell = lambda text: show(Note(text))
        show(Note(f"study {name!r}, {record.dataset.name}, {record.dataset.fit:,} fit and "
                  f"{record.dataset.validation:,} validation images; storage {shown(options.storage)}"))  # fmt: skip
        if record.dataset.fallback:
            show(Note(f"warning: {FALLBACK_WARNING}"))
        publisher = _Publisher(study, record, ledger, out / "artifacts", shown(options.storage), show)
        shows = dashboard(options.storage, out, lambda text: show(Note(text)))
        with shows if options.dashboard else contextlib.nullcontext():
            try:
                with _wall_time(study, show) as timed_show:
                    team = _team(options, devices, name, data_dir, out)
                    finished = _search(ledger, study, team, options.timeout, publisher.publish, timed_show)
                if not finished and studies.best_trial(study) is None:
                    show(Note("the time was up before any trial ran to its end, so there is no finale"))
                elif options.finale:
                    with exclusive(options.storage, f"{name}.finale", wait=False) as mine:
                        if mine:
                            _finale(study, record, devices[0], data_dir, out, options.max_retrain_epochs, show)
                        else:
                            show(Note("another run of this study is at its finale; this one leaves it to that"))
            except BaseException:
                with contextlib.suppress(StorageLostError):
                    _write_summary(study, record, ledger, options.storage, out, publisher)
                raise
            summary = _write_summary(study, record, ledger, options.storage, out, publisher)
    return RunEnd(summary, out, finished)


def _write_summary(
    study: optuna.Study, record: StudyRecord, ledger: Ledger, storage: URL, out: Path, publisher: "_Publisher"
) -> dict[str, Any]:
    publisher.publish()
    summary = summarise(study, record, ledger, shown(storage))
    write_json(out / "summary.json", summary)
    return summary


def _created(
    storage: PersistentStorage, name: str, options: RunOptions, device: torch.device, data_dir: Path, show: Show
) -> StudyRecord:
    """The study, created or brought up to date, with its budget, and bound to these very images."""
    found = studies.find(storage, name)
    stored = studies.record_of(found) if found else None
    record = _resumed(stored, options, show) if stored else _new(name, options, device, show)
    source.prepare(record.dataset.name, data_dir)
    split = load_split(record.dataset.name, data_dir, DIVISION_SEED, torch.device("cpu"))
    if found is None or stored is None:
        dataset = DatasetRecord(
            name=record.dataset.name,
            fingerprint=split.fingerprint,
            classes=split.classes,
            fit=len(split.fit_labels),
            validation=len(split.validation_labels),
            fallback=record.dataset.fallback,
        )
        record = StudyRecord(record.name, record.config, dataset)
    else:
        studies.refuse_other_data(record, split.fingerprint)
        studies.refuse_other_reading(found)
    ledger = _requested(storage, record, stored)
    if stored is not None and (orphans := adopt_orphans(ledger)):
        workers_are = "1 worker of an earlier run is" if orphans == 1 else f"{orphans} workers of an earlier run are"
        show(Note(f"{workers_are} still at work and belong to this one now"))
    return record


def _requested(storage: PersistentStorage, record: StudyRecord, stored: StudyRecord | None) -> Ledger:
    """Store the definition and make its budget the ledger's.

    Raises:
        UserError: the budget would shrink while workers are at it.
    """
    if stored is None:
        studies.create(storage, record, environment())
        ledger, _ = open_ledger(storage, record.name, record.config.workers)
    else:
        ledger, study = open_ledger(storage, record.name, record.config.workers)
        at_work = sum(row.lives for row in listed(ledger))
        if record.config.trials < stored.config.trials and at_work:
            raise UserError(
                f"study {record.name!r} has a budget of {stored.config.trials}, and workers ({at_work}) are working "
                f"it off; it can be lowered to {record.config.trials} once they have stopped"
            )
        studies.update(study, record.config)
    ledgers.request(ledger, record.config.trials, len(record.config.start))
    return ledger


def _team(options: RunOptions, devices: list[torch.device], name: str, data_dir: Path, out: Path) -> Team:
    """The workers that this machine shall have."""
    gpus = [str(device) for device in devices if device.type == "cuda"]
    chosen = plan_devices(options.workers, gpus, options.workers_per_gpu or 1, available_cores())
    shares_gpus = bool(gpus) and options.workers is None and options.workers_per_gpu is None
    words = ("--name", name, "--data-dir", str(data_dir.resolve()), "--out", str(out.resolve()))
    return Team(chosen, threads_each(len(chosen)), words, options.storage, out / "workers", shares_gpus)


def _search(
    ledger: Ledger,
    study: optuna.Study,
    team: Team,
    timeout: float | None,
    publish_now: Callable[[], None],
    show: Show,
) -> bool:
    """Keep the workers at work until the budget is done (then True) or the time is up."""
    deadline = time.monotonic() + timeout if timeout is not None else None
    local = LocalWorkers(ledger, team, lambda text: show(Note(text)))
    watcher = Watcher(ledger, study)
    published = -math.inf
    try:
        while True:
            count, rows, events = watcher.look()
            for event in events:
                show(event)
            if not ledgers.is_open(ledger):
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False
            local.tend(rows, count.done, count.remaining)
            if time.monotonic() - published > PUBLISH_SECONDS:
                publish_now()
                published = time.monotonic()
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        ledger.outage.leave()  # whoever wants to go does not wait for a database that is away
        raise
    finally:
        local.stop()
        with contextlib.suppress(StorageLostError):
            for event in watcher.look()[2]:
                show(event)


def _finale(
    study: optuna.Study,
    record: StudyRecord,
    device: torch.device,
    data_dir: Path,
    out: Path,
    max_epochs: int | None,
    show: Show,
) -> None:
    if device.type == "cpu":
        keep_freed_pages()
    show(Note(f"finale on {describe_device(device)}"))
    split = load_split(record.dataset.name, data_dir, DIVISION_SEED, device)
    with _wall_time(study, show):
        retrain(study, record, split, data_dir, out, max_epochs, show)


class _Publisher:
    """Brings notes, pictures and graphs up to date, and says once what stands in the way."""

    def __init__(
        self, study: optuna.Study, record: StudyRecord, ledger: Ledger, folder: Path, storage_shown: str, show: Show
    ) -> None:
        self._study, self._record, self._ledger = study, record, ledger
        self._folder, self._storage_shown, self._show = folder, storage_shown, show
        self._told: set[str] = set()

    def publish(self) -> None:
        count: Budget = ledgers.budget(self._ledger)
        warnings = publish(self._study, self._record, count.requested, count.waiting, self._folder, self._storage_shown)
        for warning in warnings:
            if warning not in self._told:
                self._told.add(warning)
                self._show(Note(f"warning: {warning}"))


def _default_name(options: RunOptions, device: torch.device) -> str:
    return find_study(options.study or _shipped_for(device))[0]


def _shipped_for(device: torch.device) -> str:
    return "cifar10" if device.type == "cuda" else "cpu"


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {out} cannot be written: {error.strerror}; choose one with --out") from error


def _new(name: str, options: RunOptions, device: torch.device, show: Show) -> StudyRecord:
    """The record of a study that does not exist yet, its images not yet loaded."""
    chosen, config = find_study(options.study or _shipped_for(device))
    if options.study is None:
        show(Note(f"study definition {chosen!r}, which fits {device.type}; another one with --study"))
    data_dir = data_folder(options.data_dir)
    dataset = source.resolve(options.dataset, data_dir)
    fallback = options.dataset == "auto" and dataset == "digits"
    config = _overridden(config, options)
    return StudyRecord(name, config, DatasetRecord(dataset, "", (), 0, 0, fallback))


def _resumed(stored: StudyRecord, options: RunOptions, show: Show) -> StudyRecord:
    """What is stored, with what may change changed.

    Raises:
        UserError: the command line asks for another space, another trial length or other images.
    """
    if options.study is None:
        base, source_name = stored.config, "this command"
    else:
        _, base = find_study(options.study)
        kept = {"trials": max(base.trials, stored.config.trials), "seed": stored.config.seed}
        base = base.model_copy(update=kept)
        source_name = options.study
    config = _overridden(base, options)
    studies.refuse_other_space(stored, config, source_name)
    if options.dataset not in ("auto", stored.dataset.name):
        raise UserError(
            f"study {stored.name!r} was begun on {stored.dataset.name}, not on {options.dataset}; "
            "give the other images another --name"
        )
    show(Note(f"study {stored.name!r} goes on where it stopped"))
    return StudyRecord(stored.name, config, stored.dataset)


def _overridden(config: StudyConfig, options: RunOptions) -> StudyConfig:
    """The study file's definition with the command line's wishes."""
    trial = config.trial
    if options.max_epochs is not None:
        trial = trial.model_copy(update={"epochs": min(trial.epochs, options.max_epochs)})
    if options.train_images is not None:
        trial = trial.model_copy(
            update={"train_images": min(trial.train_images or options.train_images, options.train_images)}
        )
    changes: dict[str, Any] = {"trial": trial}
    if options.trials is not None:
        changes["trials"] = options.trials
    if options.seed is not None:
        changes["seed"] = options.seed
    return config.model_copy(update=changes)


@contextmanager
def _wall_time(study: optuna.Study, show: Show) -> Iterator[Show]:
    """Add the time spent in here to the study's total, after every trial, so that a crash loses one at most."""
    before, start = study.user_attrs.get("seconds", 0.0), time.monotonic()

    def store() -> None:
        study.set_user_attr("seconds", before + time.monotonic() - start)

    def storing_show(event: Any) -> None:
        if isinstance(event, TrialFinished):
            store()
        show(event)

    try:
        yield storing_show
    finally:
        with contextlib.suppress(StorageLostError):
            store()
