"""What a run trains on: this machine, or a Ray cluster."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from model.device import resolve_devices
from search.events import Show
from search.host.environment import required
from search.launch.base import LauncherFactory
from search.launch.local import local_launcher
from search.run.finale import retrain_progress, retrain_winner
from search.run.open_search import OpenSearch
from search.run.options import RayOptions, RunOptions


@dataclass(frozen=True)
class Backend:
    """What a run trains with.

    Attributes:
        kind: ``cuda`` or ``cpu``.
        launcher: launches workers.
        retrain: retrains a search's winner after its confirmation.
        retrains_here: whether ``retrain`` trains in this process, which then holds the finale's lock.
    """

    kind: str
    launcher: LauncherFactory
    retrain: Callable[[OpenSearch, Show], object]
    retrains_here: bool


@contextlib.contextmanager
def chosen_backend(options: RunOptions) -> Iterator[Backend]:
    """This machine, or the Ray cluster that the options name.

    Raises:
        UserError: there is no such device, Ray is not installed, or its cluster cannot be reached.
    """
    if options.ray is None:
        yield _this_machine(options)
    else:
        with _ray_cluster(options, options.ray) as backend:
            yield backend


def _this_machine(options: RunOptions) -> Backend:
    devices = resolve_devices(options.device)
    launcher = local_launcher([str(device) for device in devices], options.workers, options.workers_per_gpu)

    def retrain(search: OpenSearch, show: Show) -> object:
        return retrain_winner(search, devices[0], options.max_retrain_epochs, show)

    return Backend(devices[0].type, launcher, retrain, retrains_here=True)


@contextlib.contextmanager
def _ray_cluster(options: RunOptions, ray: RayOptions) -> Iterator[Backend]:
    try:
        from search.launch.ray_cluster import ClusterOptions, connected_cluster
        from search.launch.ray_launcher import ray_launcher
        from search.launch.ray_retrain import retrain_on
    except ModuleNotFoundError as error:
        raise UserError('--launcher ray needs Ray: pip install "block-search[ray]"') from error
    data_dir = options.data_dir or os.environ.get("SEARCH_DATA_DIR")
    shared = None if data_dir is None else Path(data_dir)
    cluster_options = ClusterOptions(
        address=ray.address,
        storage=options.storage,
        device=options.device,
        workers=options.workers,
        per_gpu=options.workers_per_gpu,
        cpus=ray.cpus,
        shared_data=shared,
        install=required() if ray.install else (),
    )
    with connected_cluster(cluster_options) as cluster:

        def retrain(search: OpenSearch, show: Show) -> None:
            retrain_on(cluster, search.location, options.max_retrain_epochs, lambda: retrain_progress(search), show)

        yield Backend(cluster.kind, ray_launcher(cluster), retrain, retrains_here=False)
