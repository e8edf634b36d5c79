"""A connection to a Ray cluster (extra ``ray``), what a worker takes of it, and commands run on its nodes.

Ray chooses the nodes, restarts tasks elsewhere if a node is lost, and adds nodes if it can scale. It has no part in
losing no configuration and doing none twice: study and ledger stay in the database. A cluster that is lost, its head
included, costs the epochs that were under way.

Source of the terms: https://docs.ray.io/en/latest/ray-core/scheduling/resources.html
"""

import contextlib
import functools
import logging
import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError, TaskCancelledError
from sqlalchemy.engine import URL

import data
import model
import search
import studies
from data.errors import RunError, UserError, first_line
from search.host.environment import commit
from search.launch.base import LEAVE_SECONDS, StudyLocation
from search.launch.ray_task import CommandResult, NodeCommand, run_command
from search.storage.url import with_password

CODE = (data, model, search, studies)
"""Shipped to every node, so that all of them run this very code."""

MOST_CPUS = 4
"""Of a worker that trains on the CPU, if the nodes have as many: as on one machine (`search.launch.local`)."""


@dataclass(frozen=True)
class WorkerResources:
    """What one worker takes of a node; a fraction of a GPU lets several share one."""

    cpus: float
    gpus: float


def worker_resources(
    nodes: Sequence[Mapping[str, float]], device: str, per_gpu: int | None, cpus: float | None
) -> WorkerResources:
    """What each worker takes.

    Args:
        nodes: resources of each node that is alive, as Ray counts them.
        device: ``auto`` (GPUs if any node has one), ``cpu`` or ``cuda``.
        per_gpu: workers that share a GPU; None: one.
        cpus: of each worker; None: one with a GPU, else four, or all that the largest node has.

    Raises:
        UserError: the device has a number, but Ray chooses the GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"with --launcher ray, Ray chooses the GPU: --device takes auto, cpu or cuda, not {device!r}")
    if device == "cuda" or (device == "auto" and any(node.get("GPU", 0) for node in nodes)):
        # Ray counts in ten-thousandths: a third rounded up would leave no room for the third worker.
        return WorkerResources(cpus or 1.0, math.floor(10_000 / (per_gpu or 1)) / 10_000)
    largest = max((node.get("CPU", 0.0) for node in nodes), default=1.0)
    return WorkerResources(cpus or max(1.0, min(float(MOST_CPUS), largest)), 0.0)


def worker_capacity(nodes: Sequence[Mapping[str, float]], share: WorkerResources) -> int:
    """How many workers the cluster has room for, if nothing else uses it."""

    def room(node: Mapping[str, float]) -> int:
        cpus = math.floor(node.get("CPU", 0.0) / share.cpus + 1e-9)
        return cpus if not share.gpus else min(cpus, math.floor(node.get("GPU", 0.0) / share.gpus + 1e-9))

    return sum(room(node) for node in nodes)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to.

    Attributes:
        share: what each worker takes.
        workers: their number; None: as many as there is room for, now and when nodes come or go.
        shared_data: folder of images that the user named, so that every node has it; None: each node's own.
        head: host and port of its head; None if this process speaks to it through Ray's client alone.
    """

    share: WorkerResources
    workers: int | None
    shared_data: Path | None
    head: tuple[str, int] | None = None

    @property
    def kind(self) -> str:
        """``cuda`` or ``cpu``: what workers train on."""
        return "cuda" if self.share.gpus else "cpu"

    @functools.cached_property
    def commit(self) -> str:
        """Of the code that every node gets. Asks git once, not for each worker."""
        return commit()

    def is_there(self) -> bool:
        """Whether the head can be reached at this moment."""
        if self.head is None:
            return True
        try:
            socket.create_connection(self.head, timeout=5).close()
        except OSError:
            return False
        return True

    def node_command(
        self, command: str, study: StudyLocation, more_words: Sequence[str], more: Mapping[str, str]
    ) -> NodeCommand:
        """A command for a node that works at a study, with more words and a larger environment."""
        words = [command, "--name", study.name, "--device", self.kind, "--out", str(study.out.resolve()), *more_words]
        if self.shared_data is not None:
            words += ["--data-dir", str(self.shared_data.resolve())]
        url = with_password(study.storage).render_as_string(hide_password=False)
        environment = {"SEARCH_STORAGE": url, "SEARCH_COMMIT": self.commit, **more}
        return NodeCommand(tuple(words), environment, LEAVE_SECONDS - 3)


@dataclass(frozen=True)
class ClusterOptions:
    """The cluster that the command line asks for, and its workers.

    Attributes:
        address: ``auto`` (the one that this machine is part of), ``local`` (a new one of this machine alone),
            ``HOST:PORT`` or ``ray://HOST:PORT``.
        storage: of the study, which every node must reach.
        device, per_gpu, cpus: see `worker_resources`.
        workers, shared_data: see `Cluster`.
        install: requirements that every node installs first.
    """

    address: str
    storage: URL
    device: str = "auto"
    workers: int | None = None
    per_gpu: int | None = None
    cpus: float | None = None
    shared_data: Path | None = None
    install: Sequence[str] = ()


@contextlib.contextmanager
def connected_cluster(options: ClusterOptions) -> Iterator[Cluster]:
    """Connect to a Ray cluster for as long as the context lasts.

    Raises:
        UserError: there is no such cluster, or its nodes cannot reach the storage.
    """
    # By their folders: Ray's client does not accept modules themselves.
    environment: dict[str, Any] = {"py_modules": [str(Path(str(module.__file__)).parent) for module in CODE]}
    if options.install:
        environment["pip"] = list(options.install)
    try:
        ray.init(
            address=options.address,
            namespace="block-search",
            runtime_env=environment,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
        )
    except (ConnectionError, RuntimeError, ValueError, AssertionError, OSError, RayError) as error:
        way_out = "start one with `ray start --head`, or take --ray-address local for one of this machine alone"
        if options.address.startswith("ray://"):  # its client says only "timeout" if a token is missing
            way_out = (
                "if it asks for a token (`ray start` does where ~/.ray/auth_token exists), set RAY_AUTH_MODE=token"
            )
        raise UserError(f"no Ray cluster at --ray-address {options.address}: {first_line(error)}; {way_out}") from error
    try:
        nodes = alive_nodes()
        if options.storage.drivername == "sqlite" and len({node.address for node in nodes}) > 1:
            raise UserError(
                "a Ray cluster of several machines cannot share a SQLite file; give a PostgreSQL with --storage"
            )
        share = worker_resources([node.resources for node in nodes], options.device, options.per_gpu, options.cpus)
        head = None if options.address.startswith("ray://") else _head()
        yield Cluster(share, options.workers, options.shared_data, head)
    finally:
        ray.shutdown()


def _head() -> tuple[str, int]:
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return host, int(port)


@dataclass(frozen=True)
class Node:
    """A node of a cluster.

    Attributes:
        address: of its node manager.
        resources: what Ray counts there: ``CPU``, ``GPU``, ...
    """

    address: str
    resources: Mapping[str, float]


def alive_nodes() -> list[Node]:
    """The cluster's nodes that are alive.

    Raises:
        RunError: the cluster is gone.
    """
    try:
        nodes = [Node(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    except Exception as error:
        raise cluster_lost(error) from error
    if not nodes:
        raise cluster_lost("no node lives")
    return nodes


def cluster_lost(why: object) -> RunError:
    """The error that says that the cluster is gone."""
    text = first_line(why) if isinstance(why, BaseException) else str(why)
    return RunError(f"the Ray cluster is gone ({text}); nothing stored is lost, and the same command goes on")


def submit(command: NodeCommand, share: WorkerResources, name: str) -> Any:
    """Run a command on any node that has room; Ray starts it again if that node is lost."""
    task = ray.remote(run_command).options(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=-1, name=name)
    return task.remote(command)


def task_result(ref: Any) -> CommandResult | None:
    """How a task ended; None while it runs or waits for room.

    Raises:
        RunError: the cluster is gone.
    """
    try:
        return ray.get(ref, timeout=0)  # type: ignore[no-any-return]
    except GetTimeoutError:
        return None
    except TaskCancelledError:
        return CommandResult(0, "cancelled", {})
    except RayTaskError as error:  # our own few lines failed, such as for a missing module
        return CommandResult(1, first_line(error.cause if isinstance(error.cause, Exception) else error), {})
    except RayError as error:  # such as a runtime environment that cannot be set up
        return CommandResult(1, f"{type(error).__name__}: {first_line(error)}", {})
    except Exception as error:
        raise cluster_lost(error) from error
