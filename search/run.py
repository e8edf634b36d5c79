"""``search run``: create or resume a study, see that its budget is worked off, then confirm, retrain and test.

The work itself is done by workers, processes of their own (`search.worker`): they go on when this process dies, and
the same command finds them again.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from sqlalchemy.engine import URL

from data import source
from data.folders import data_folder
from data.split import load_split
from model.device import resolve_devices
from search import choice
from search import ledger as ledgers
from search import study as studies
from search.artifacts import check, open_store, store_url
from search.environment import environment, required
from search.errors import UserError
from search.events import Note, Show
from search.finale import Search, alone, confirm_best, publisher_of, retrain_winner, write_outcome
from search.launch import adopt_orphans, dashboard, local_crew
from search.launcher import Assignment, Crew
from search.ledger import Ledger, open_ledger
from search.mirror import mirror_of
from search.objective import Cost, Objective, second_objective
from search.outage import StorageLostError
from search.persistent import PersistentStorage
from search.publish import PUBLISHED
from search.stage import wall_time, work_off
from search.storage import exclusive, network_file_system, opened, shown
from search.study import ARTIFACTS, DIVISION_SEED, FINALE, DatasetRecord, StudyRecord
from search.study_file import StudyConfig, find_study
from search.summary import FALLBACK_WARNING
from search.warm_start import joined, offers, warm_started
from search.worker import NETWORK_WARNING
from search.workers import listed


@dataclass(frozen=True)
class RayOptions:
    """Where workers are tasks of a Ray cluster.

    Attributes:
        address: as `ray.init` takes it.
        cpus: of each worker; None: as its nodes suggest.
        install: whether every node first installs what this project needs, in this machine's versions.
    """

    address: str = "auto"
    cpus: float | None = None
    install: bool = False


@dataclass(frozen=True)
class RunOptions:
    """What the command line asks for; None leaves a thing to the study file, to what is stored or is measured.

    ``limits`` names those that change; None lifts one.
    """

    storage: URL
    study: str | None = None
    name: str | None = None
    trials: int | None = None
    seed: int | None = None
    objective: Objective | None = None
    limits: Mapping[Cost, float | None] = field(default_factory=dict)
    data_dir: Path | None = None
    dataset: str = "auto"
    device: str = "auto"
    out: Path | None = None
    artifacts: str | None = None
    timeout: float | None = None
    finale: bool = True
    warm_start: str | None = None
    workers: int | None = None
    workers_per_gpu: int | None = None
    ray: RayOptions | None = None
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
    torch.set_float32_matmul_precision("high")
    source.check_name(options.dataset)
    with _engine(options) as engine:
        return _run(options, engine, show)


@dataclass(frozen=True)
class _Engine:
    """What a run trains with.

    Attributes:
        kind: ``cuda`` or ``cpu``.
        crew: launches workers.
        retrain: the winner of a search whose confirmation is done.
        keeps_hold: whether ``retrain`` is done by this process, which holds the finale.
    """

    kind: str
    crew: Crew
    retrain: Callable[[Search, Show], object]
    keeps_hold: bool


@contextlib.contextmanager
def _engine(options: RunOptions) -> Iterator[_Engine]:
    """This machine, or a Ray cluster."""
    most = options.max_retrain_epochs
    if options.ray is None:
        devices = resolve_devices(options.device)
        crew = local_crew([str(device) for device in devices], options.workers, options.workers_per_gpu)
        yield _Engine(
            devices[0].type, crew, lambda search, show: retrain_winner(search, devices[0], most, show), keeps_hold=True
        )
        return
    try:
        from search.ray_workers import cluster, retrain_on
    except ModuleNotFoundError as error:
        raise UserError('--launcher ray needs Ray: pip install "block-search[ray]"') from error
    given = options.data_dir or os.environ.get("SEARCH_DATA_DIR")
    shared = None if given is None else Path(given)
    install = required() if options.ray.install else ()
    with cluster(
        options.ray.address,
        options.device,
        options.workers,
        options.workers_per_gpu,
        options.ray.cpus,
        shared,
        options.storage,
        install,
    ) as nodes:
        yield _Engine(nodes.kind, nodes.crew(), lambda search, show: retrain_on(nodes, search, most, show), False)


def _run(options: RunOptions, engine: _Engine, show: Show) -> RunEnd:
    name = studies.check_name(_default_name(options, engine.kind) if options.name is None else options.name)
    out = options.out or Path("studies") / name
    _check_writable(out)
    data_dir = data_folder(options.data_dir)
    with opened(options.storage) as storage:
        if kind := network_file_system(options.storage):
            show(Note(f"warning: {NETWORK_WARNING.format(kind=kind)}"))
        artifacts = store_url(options.artifacts, studies.find(storage, name))
        if artifacts is not None:
            check(open_store(artifacts).below(name))
        options = replace(options, artifacts=artifacts)
        with exclusive(options.storage, f"{name}.creation"):
            record = _created(storage, name, options, engine.kind, data_dir, show)
        ledger, study = open_ledger(storage, name, record.config.workers)
        storage.outage.tell = lambda text: show(Note(text))
        if study.user_attrs.get(FINALE) != options.finale:
            study.set_user_attr(FINALE, options.finale)
        choice.set_limits(study, options.limits)
        show(Note(f"study {name!r}, {record.dataset.name}, {record.dataset.fit:,} fit and "
                  f"{record.dataset.validation:,} validation images; storage {shown(options.storage)}"))  # fmt: skip
        if told := _objective_text(record.config):
            show(Note(told))
        if record.dataset.fallback:
            show(Note(f"warning: {FALLBACK_WARNING}"))
        search = Search(storage, ledger, study, record, data_dir, mirror_of(study, out, show))
        if search.files.store is not None:
            show(Note(f"artifacts and checkpoints: {search.files.store.text}"))
        publisher = publisher_of(search, show)
        assignment = Assignment(options.storage, name, data_dir, out)
        shows = dashboard(options.storage, out, lambda text: show(Note(text)))
        with shows if options.dashboard else contextlib.nullcontext():
            try:
                with wall_time(study, show) as timed_show:
                    finished = work_off(
                        ledger, study, engine.crew, assignment, "search", options.timeout, publisher.publish, timed_show
                    )
                if not finished and not studies.ranked_trials(study):
                    show(Note("the time was up before any trial ran to its end, so there is no finale"))
                elif options.finale:
                    with alone(search, show) as mine:
                        if mine:
                            confirm_best(search, engine.crew, show)
                            if engine.keeps_hold:
                                engine.retrain(search, show)
                    if mine and not engine.keeps_hold:
                        engine.retrain(search, show)
            except BaseException:
                with contextlib.suppress(StorageLostError):
                    write_outcome(search, publisher, show)
                raise
            summary = write_outcome(search, publisher, show)
    return RunEnd(summary, out, finished)


def _objective_text(config: StudyConfig) -> str:
    """What two objectives mean for a search; empty for one."""
    if second_objective(config.objective) is None:
        return ""
    sampler = "random sampling" if config.sampler.kind == "random" else "multi-objective TPE"
    return (
        f"objective {config.objective}: a Pareto search by {sampler}; nothing is pruned, every trial trains its "
        f"{config.trial.epochs} epochs"
    )


def _created(
    storage: PersistentStorage, name: str, options: RunOptions, kind: str, data_dir: Path, show: Show
) -> StudyRecord:
    """The study, created or brought up to date, with its budget, and bound to these very images."""
    found = studies.find(storage, name)
    stored = studies.record_of(found) if found else None
    record = _resumed(stored, options, show) if stored else _new(name, options, kind, show)
    choice.refuse_unmeasured(options.limits, record.config.objective)
    source.prepare(record.dataset.name, data_dir, tell=lambda text: show(Note(text)))
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
    if options.warm_start is not None:
        record = warm_started(storage, record, options.warm_start)
    elif stored is None and (others := offers(storage, record)):
        show(Note(f"these images were searched before: --warm-start {others[-1]} tries its best configurations first"))
    ledger = _requested(storage, record, stored, options.artifacts)
    if stored is not None and (orphans := adopt_orphans(ledger)):
        workers_are = "1 worker of an earlier run is" if orphans == 1 else f"{orphans} workers of an earlier run are"
        show(Note(f"{workers_are} still at work and belong to this one now"))
    return record


def _requested(
    storage: PersistentStorage, record: StudyRecord, stored: StudyRecord | None, artifacts: str | None
) -> Ledger:
    """Store the definition and the store of its artifacts, and make its budget the ledger's.

    Raises:
        UserError: the budget would shrink while workers are at it.
    """
    if stored is None:
        studies.create(storage, record, environment())
        ledger, study = open_ledger(storage, record.name, record.config.workers)
    else:
        ledger, study = open_ledger(storage, record.name, record.config.workers)
        at_work = sum(row.lives for row in listed(ledger))
        if record.config.trials < stored.config.trials and at_work:
            raise UserError(
                f"study {record.name!r} has a budget of {stored.config.trials}, and workers ({at_work}) are working "
                f"it off; it can be lowered to {record.config.trials} once they have stopped"
            )
        studies.update(study, record.config)
    if artifacts is not None and study.user_attrs.get(ARTIFACTS) != artifacts:
        study.set_user_attr(PUBLISHED, None)  # what was published before goes there, too
        study.set_user_attr(ARTIFACTS, artifacts)
    ledgers.request(ledger, record.config.trials, len(record.config.start))
    return ledger


def _default_name(options: RunOptions, kind: str) -> str:
    return find_study(options.study or _shipped_for(kind))[0]


def _shipped_for(kind: str) -> str:
    return "cifar10" if kind == "cuda" else "cpu"


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {out} cannot be written: {error.strerror}; choose one with --out") from error


def _new(name: str, options: RunOptions, kind: str, show: Show) -> StudyRecord:
    """The record of a study that does not exist yet, its images not yet loaded."""
    chosen, config = find_study(options.study or _shipped_for(kind))
    if options.study is None:
        show(Note(f"study definition {chosen!r}, which fits {kind}; another one with --study"))
    data_dir = data_folder(options.data_dir)
    dataset = source.resolve(options.dataset, data_dir, lambda text: show(Note(text)))
    fallback = options.dataset == "auto" and dataset == "digits"
    config = _overridden(config, options)
    return StudyRecord(name, config, DatasetRecord(dataset, "", (), 0, 0, fallback))


def _resumed(stored: StudyRecord, options: RunOptions, show: Show) -> StudyRecord:
    """What is stored, with what may change changed.

    Raises:
        UserError: the command line asks for another space, another trial length or other images.
    """
    asked = options.objective
    if options.study is None:
        base, source_name = stored.config, "this command"
    else:
        _, base = find_study(options.study)
        if asked is None and "objective" in base.model_fields_set:
            asked = base.objective
        kept = {
            "trials": max(base.trials, stored.config.trials),
            "seed": stored.config.seed,
            "objective": stored.config.objective,
            "start": joined(stored.config.start, base.start),
        }
        base = base.model_copy(update=kept)
        source_name = options.study
    studies.refuse_other_objective(stored, asked)
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
    if options.objective is not None:
        changes["objective"] = options.objective
    return config.model_copy(update=changes)
