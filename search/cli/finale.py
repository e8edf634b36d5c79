"""``search confirm``, ``retrain`` and ``report``: each part of the finale by itself."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from search.cli.options import (
    DataDir,
    Device,
    MaxLatency,
    MaxParams,
    MaxRetrainEpochs,
    Name,
    Out,
    Storage,
    Workers,
    WorkersPerGpu,
    count_or_auto,
    database,
    interrupt,
    limits_given,
    refuse_absent,
    terminal,
)

if TYPE_CHECKING:
    from search.run.open_search import OpenSearch


def confirm_command(
    name: Name = None,
    storage: Storage = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    out: Out = None,
    workers: Workers = "auto",
    workers_per_gpu: WorkersPerGpu = "auto",
    max_params: MaxParams = None,
    max_latency: MaxLatency = None,
) -> None:
    """Train a search's best configurations again over fresh seeds, and choose the winner."""
    from model.device import resolve_devices
    from search.console.live import event_view
    from search.launch.local import local_launcher
    from search.run.finale import change_limits, confirm_best, finale_lock

    limits = limits_given(max_params, max_latency)
    launch = local_launcher(
        [str(chosen) for chosen in resolve_devices(device)],
        count_or_auto("--workers", workers, least=0),
        count_or_auto("--workers-per-gpu", workers_per_gpu, least=1),
    )
    with (
        _search(name, storage, data_dir, out) as search,
        event_view(terminal()) as show,
        finale_lock(search, show) as locked,
    ):
        if locked:
            change_limits(search, limits)
            confirm_best(search, launch, show)
    _tell_outcome(search)


def retrain_command(
    name: Name = None,
    storage: Storage = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    out: Out = None,
    max_retrain_epochs: MaxRetrainEpochs = None,
    max_params: MaxParams = None,
    max_latency: MaxLatency = None,
) -> None:
    """Retrain a search's winner to convergence, test it once a seed, and save it."""
    from model.device import resolve_devices
    from search.console.live import event_view
    from search.run.finale import change_limits, finale_lock, retrain_winner

    limits = limits_given(max_params, max_latency)
    chosen = resolve_devices(device)[0]
    with (
        _search(name, storage, data_dir, out) as search,
        event_view(terminal()) as show,
        finale_lock(search, show) as locked,
    ):
        if locked:
            change_limits(search, limits)
            retrain_winner(search, chosen, max_retrain_epochs, show)
    _tell_outcome(search)


def report_command(name: Name = None, storage: Storage = None, out: Out = None) -> None:
    """Write report.html and report.md of a study, also of one that is running."""
    with _search(name, storage, None, out) as search:
        pass
    _tell_outcome(search)


@contextlib.contextmanager
def _search(name: str | None, storage: str | None, data_dir: Path | None, out: Path | None) -> Iterator["OpenSearch"]:
    """Open a study; write its summary and report at the end of the context."""
    from data.paths import data_folder
    from search.run.finale import write_outcome
    from search.run.open_search import find_search
    from search.storage.connect import storage_opened

    signal.signal(signal.SIGTERM, interrupt)
    with database(storage) as url:
        refuse_absent(url)
        with storage_opened(url) as opened_storage:
            search = find_search(opened_storage, name, data_folder(data_dir), out, _echo)
            try:
                yield search
            finally:
                write_outcome(search, _echo)


def _echo(event: object) -> None:
    typer.echo(getattr(event, "text", ""))


def _tell_outcome(search: "OpenSearch") -> None:
    for label, path in (("report", "report.html"), ("summary", "summary.json"), ("model", "best")):
        if (search.out / path).exists():
            typer.echo(f"{label}: {search.out / path}")
