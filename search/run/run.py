"""``search run``: create or resume a study, see that its budget is worked off, then confirm, retrain and test.

The work itself is done by workers, processes of their own (`search.worker.loop`): they go on when this process dies,
and the same command finds them again.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data import source
from data.errors import UserError
from data.paths import data_folder
from model.device import resolve_devices
from search import study as studies
from search.analysis import selection as choice
from search.artifacts.mirror import mirror_of
from search.artifacts.store import check, open_store, store_url
from search.attributes import FINALE
from search.dashboard.process import dashboard_process
from search.events import Note, Show
from search.host.environment import required
from search.launch.base import LauncherFactory, StudyLocation
from search.launch.local import local_launcher
from search.ledger.leases import open_ledger
from search.run.finale import (
    OpenSearch,
    build_publisher,
    confirm_best,
    finale_lock,
    location_of,
    retrain_progress,
    retrain_winner,
    write_outcome,
)
from search.run.open_study import check_writable, default_name, objective_text, open_or_create
from search.run.options import RunEnd, RunOptions
from search.run.stage import complete_budget, wall_time
from search.storage.connect import exclusive_lock, storage_opened
from search.storage.retry import StorageLostError
from search.storage.url import NETWORK_WARNING, network_file_system, without_password
from search.study import FALLBACK_WARNING


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
    crew: LauncherFactory
    retrain: Callable[[OpenSearch, Show], object]
    keeps_hold: bool


@contextlib.contextmanager
def _engine(options: RunOptions) -> Iterator[_Engine]:
    """This machine, or a Ray cluster."""
    most = options.max_retrain_epochs
    if options.ray is None:
        devices = resolve_devices(options.device)
        crew = local_launcher([str(device) for device in devices], options.workers, options.workers_per_gpu)
        yield _Engine(
            devices[0].type, crew, lambda search, show: retrain_winner(search, devices[0], most, show), keeps_hold=True
        )
        return
    try:
        from search.launch.ray_cluster import cluster, retrain_on
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

        def retrain(search: OpenSearch, show: Show) -> None:
            retrain_on(nodes, location_of(search), most, lambda: retrain_progress(search), show)

        yield _Engine(nodes.kind, nodes.crew(), retrain, keeps_hold=False)


def _run(options: RunOptions, engine: _Engine, show: Show) -> RunEnd:
    name = studies.check_name(default_name(options, engine.kind) if options.name is None else options.name)
    out = options.out or Path("studies") / name
    check_writable(out)
    data_dir = data_folder(options.data_dir)
    with storage_opened(options.storage) as storage:
        if kind := network_file_system(options.storage):
            show(Note(f"warning: {NETWORK_WARNING.format(kind=kind)}"))
        artifacts = store_url(options.artifacts, studies.find(storage, name))
        if artifacts is not None:
            check(open_store(artifacts).below(name))
        options = replace(options, artifacts=artifacts)
        with exclusive_lock(options.storage, f"{name}.creation"):
            record = open_or_create(storage, name, options, engine.kind, data_dir, show)
        ledger, study = open_ledger(storage, name, record.config.workers)
        storage.outage.tell = lambda text: show(Note(text))
        if study.user_attrs.get(FINALE) != options.finale:
            study.set_user_attr(FINALE, options.finale)
        choice.set_limits(study, options.limits)
        images = f"{record.dataset.fit:,} fit and {record.dataset.validation:,} validation images"
        place = without_password(options.storage)
        show(Note(f"study {name!r}, {record.dataset.name}, {images}; storage {place}"))
        if told := objective_text(record.config):
            show(Note(told))
        if record.dataset.fallback:
            show(Note(f"warning: {FALLBACK_WARNING}"))
        search = OpenSearch(storage, ledger, study, record, data_dir, mirror_of(study, out, show))
        if search.files.store is not None:
            show(Note(f"artifacts and checkpoints: {search.files.store.text}"))
        publisher = build_publisher(search, show)
        assignment = StudyLocation(options.storage, name, data_dir, out)
        shows = dashboard_process(options.storage, out, lambda text: show(Note(text)))
        with shows if options.dashboard else contextlib.nullcontext():
            try:
                with wall_time(study, show) as timed_show:
                    finished = complete_budget(
                        ledger, study, engine.crew, assignment, "search", options.timeout, publisher.publish, timed_show
                    )
                if not finished and not studies.ranked_trials(study):
                    show(Note("the time was up before any trial ran to its end, so there is no finale"))
                elif options.finale:
                    with finale_lock(search, show) as mine:
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
