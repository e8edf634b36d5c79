"""Workers as tasks of a Ray cluster (extra ``ray``): what `search.launch.local` is on one machine.

Ray places them, restarts them elsewhere where a node is lost, and makes room for them where it can scale. That no
configuration is lost or done twice is none of its business: study and ledger stay in the database. A cluster that is
lost, its head included, costs the epochs that were under way.

Source of the terms: https://docs.ray.io/en/latest/ray-core/scheduling/resources.html
"""

import contextlib
import functools
import logging
import math
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from search.events import Note, Show
from search.host.environment import commit
from search.host.exit_status import ExitStatus
from search.launch.base import (
    LEAVE_SECONDS,
    Launcher,
    LauncherFactory,
    RestartPolicy,
    StudyLocation,
    last_line,
)
from search.launch.ray_task import CommandResult, NodeCommand, read_files, run_command
from search.ledger.budget import is_open
from search.ledger.heartbeat import mark_dead, reap
from search.ledger.leases import Ledger
from search.ledger.registry import WorkerRow
from search.storage.retry import StorageLostError
from search.storage.url import with_password

CODE = (data, model, search, studies)
"""Shipped to every node, so that all of them run this very code."""

MOST_CPUS = 4
"""Of a worker that trains on the CPU, where the nodes have so many: as on one machine (`search.launch.local`)."""

GONE_SECONDS = 20.0
"""After so many seconds without its head a cluster is taken for lost. Ray itself would end this process after 60."""

RETRAIN_POLL_SECONDS = 2.0
"""How often the study is asked how its retrain stands."""


@dataclass(frozen=True)
class WorkerResources:
    """What one worker takes of a node; a fraction of a GPU lets several share one."""

    cpus: float
    gpus: float


def worker_resources(
    nodes: Sequence[Mapping[str, float]], device: str, per_gpu: int | None, cpus: float | None
) -> WorkerResources:
    """What each worker shall take.

    Args:
        nodes: resources of each node that lives, as Ray counts them.
        device: ``auto`` (GPUs where any node has one), ``cpu`` or ``cuda``.
        per_gpu: workers that share a GPU; None: one.
        cpus: of each worker; None: one beside a GPU, else four, or all that the largest node has.

    Raises:
        UserError: on a device by its number, which is Ray's to choose.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"with --launcher ray, Ray chooses the GPU: --device takes auto, cpu or cuda, not {device!r}")
    if device == "cuda" or (device == "auto" and any(node.get("GPU", 0) for node in nodes)):
        # Ray counts in ten-thousandths: a third rounded up would leave no room for the third worker.
        return WorkerResources(cpus or 1.0, math.floor(10_000 / (per_gpu or 1)) / 10_000)
    largest = max((node.get("CPU", 0.0) for node in nodes), default=1.0)
    return WorkerResources(cpus or max(1.0, min(float(MOST_CPUS), largest)), 0.0)


def worker_capacity(nodes: Sequence[Mapping[str, float]], share: WorkerResources) -> int:
    """How many workers the cluster has room for, where nobody else uses it."""

    def room(node: Mapping[str, float]) -> int:
        cpus = math.floor(node.get("CPU", 0.0) / share.cpus + 1e-9)
        return cpus if not share.gpus else min(cpus, math.floor(node.get("GPU", 0.0) / share.gpus + 1e-9))

    return sum(room(node) for node in nodes)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to.

    Attributes:
        share: what each worker takes.
        workers: their number; None: as many as there is room for, now and whenever nodes come or go.
        shared_data: folder of images that was asked for by name and so is taken for one of every node; None: each
            node's own.
        head: host and port of its head; None where this process speaks to it through Ray's client alone.
    """

    share: WorkerResources
    workers: int | None
    shared_data: Path | None
    head: tuple[str, int] | None = None

    @property
    def kind(self) -> str:
        """``cuda`` or ``cpu``: what is trained on."""
        return "cuda" if self.share.gpus else "cpu"

    @functools.cached_property
    def commit(self) -> str:
        """Of the code that every node gets; git is asked once, not for each worker."""
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

    def launcher_factory(self) -> LauncherFactory:
        """Launches workers on this cluster."""

        def launch(ledger: Ledger, study: StudyLocation, tell: Callable[[str], None]) -> Launcher:
            return RayWorkers(ledger, self, study, tell)

        return launch

    def order(
        self, command: str, study: StudyLocation, more_words: Sequence[str], more: Mapping[str, str]
    ) -> NodeCommand:
        """A command at a study for a node, with further words and a further environment."""
        words = [command, "--name", study.name, "--device", self.kind, "--out", str(study.out.resolve()), *more_words]
        if self.shared_data is not None:
            words += ["--data-dir", str(self.shared_data.resolve())]
        url = with_password(study.storage).render_as_string(hide_password=False)
        environment = {"SEARCH_STORAGE": url, "SEARCH_COMMIT": self.commit, **more}
        return NodeCommand(tuple(words), environment, LEAVE_SECONDS - 3)


@contextlib.contextmanager
def cluster(
    address: str,
    device: str,
    workers: int | None,
    per_gpu: int | None,
    cpus: float | None,
    shared_data: Path | None,
    storage: URL,
    install: Sequence[str] = (),
) -> Iterator[Cluster]:
    """Connect to a Ray cluster for as long as the context lasts.

    Args:
        address: ``auto`` (the one that this machine is part of), ``local`` (a new one of this machine alone),
            ``HOST:PORT`` or ``ray://HOST:PORT``.
        device, per_gpu, cpus: see `share_of`.
        workers: see `Cluster`.
        shared_data: see `Cluster`.
        storage: of the study, which every node must reach.
        install: requirements that every node installs first.

    Raises:
        UserError: there is no such cluster, or its nodes cannot reach the storage.
    """
    # By their folders: modules themselves do not pass through Ray's client.
    environment: dict[str, Any] = {"py_modules": [str(Path(str(module.__file__)).parent) for module in CODE]}
    if install:
        environment["pip"] = list(install)
    try:
        ray.init(
            address=address,
            namespace="block-search",
            runtime_env=environment,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
        )
    except (ConnectionError, RuntimeError, ValueError, AssertionError, OSError, RayError) as error:
        way_out = "start one with `ray start --head`, or take --ray-address local for one of this machine alone"
        if address.startswith("ray://"):  # its client says no more than "timeout" where a token is missing
            way_out = (
                "if it asks for a token (`ray start` does where ~/.ray/auth_token exists), set RAY_AUTH_MODE=token"
            )
        raise UserError(f"no Ray cluster at --ray-address {address}: {first_line(error)}; {way_out}") from error
    try:
        nodes = alive_nodes()
        if storage.drivername == "sqlite" and len({node["NodeManagerAddress"] for node in nodes}) > 1:
            raise UserError(
                "a Ray cluster of several machines cannot share a SQLite file; give a PostgreSQL with --storage"
            )
        share = worker_resources([node["Resources"] for node in nodes], device, per_gpu, cpus)
        yield Cluster(share, workers, shared_data, None if address.startswith("ray://") else _head())
    finally:
        ray.shutdown()


def _head() -> tuple[str, int]:
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return host, int(port)


def alive_nodes() -> list[dict[str, Any]]:
    """Nodes of the cluster that live, as Ray describes them.

    Raises:
        RunError: the cluster is gone.
    """
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
    except Exception as error:
        raise _gone(error) from error
    if not nodes:
        raise _gone("no node lives")
    return nodes


def _gone(why: object) -> RunError:
    text = first_line(why) if isinstance(why, BaseException) else str(why)
    return RunError(f"the Ray cluster is gone ({text}); nothing stored is lost, and the same command goes on")


@dataclass
class RayWorkers:
    """The launcher of tasks on a Ray cluster.

    A task whose node is lost is started again by Ray (``max_retries=-1``), which waits for room where there is none.
    """

    ledger: Ledger
    cluster: Cluster
    study: StudyLocation
    tell: Callable[[str], None]
    _tasks: dict[int, Any] = field(default_factory=dict)
    _told: str = ""
    _seen: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._key = f"ray-{uuid.uuid4().hex}"
        self._restart_policy = RestartPolicy(self.ledger, self.tell)

    def maintain(self, rows: Sequence[WorkerRow], done: int, remaining: int) -> None:
        if not self.cluster.is_there():
            if time.monotonic() - self._seen > GONE_SECONDS:
                raise _gone("its head cannot be reached")
            return
        self._seen = time.monotonic()
        for number, ref in list(self._tasks.items()):
            ending = _ending(ref)
            if ending is not None:
                del self._tasks[number]
                self._ended(number, ending, rows, done)
        if remaining or is_open(self.ledger):
            self._fill(rows)

    def _ended(self, number: int, ending: CommandResult, rows: Sequence[WorkerRow], done: int) -> None:
        own = [row for row in rows if row.launcher == self._key and row.number == number]
        if own and own[-1].lives:
            mark_dead(self.ledger, own[-1].id, f"ended with status {ending.status}")
        complaint = last_line(ending.lines)
        self._restart_policy.record_end(
            number, f"worker {number}", ending.status, complaint, "status --logs tells", done
        )

    def _fill(self, rows: Sequence[WorkerRow]) -> None:
        nodes = alive_nodes()
        room = worker_capacity([node["Resources"] for node in nodes], self.cluster.share)
        wanted = room if self.cluster.workers is None else self.cluster.workers
        self._tell_size(len(nodes), room, wanted)
        for number in range(wanted):
            if number not in self._tasks and self._restart_policy.may_start(number):
                self._tasks[number] = self._start(number)
        surplus = len(self._tasks) - wanted
        if surplus > 0:  # the cluster has shrunk: what waits for room to start again would wait for ever
            at_work = {row.number for row in rows if row.launcher == self._key and row.lives}
            for number in sorted(set(self._tasks) - at_work, reverse=True)[:surplus]:
                ray.cancel(self._tasks.pop(number), force=True)
        if wanted:
            self._restart_policy.raise_if_hopeless(wanted, rows)

    def _start(self, number: int) -> Any:
        who = {"SEARCH_WORKER_NUMBER": str(number), "SEARCH_WORKER_LAUNCHER": self._key}
        order = self.cluster.order("worker", self.study, (), who)
        return _submit(order, self.cluster.share, f"search worker {number} of {self.study.name}")

    def _tell_size(self, nodes: int, room: int, wanted: int) -> None:
        text = f"Ray: {nodes} node{'s' if nodes > 1 else ''} with room for {room}; {wanted} workers"
        if room < wanted:
            text += f", {wanted - room} of which wait until the cluster grows"
        if text != self._told:
            self._told = text
            self.tell(text)

    def stop(self) -> None:
        refs = list(self._tasks.values())
        self._tasks.clear()
        if refs and self.cluster.is_there():  # else its tasks are gone with it
            with contextlib.suppress(Exception):
                for ref in refs:
                    ray.cancel(ref)
                _, left = ray.wait(refs, num_returns=len(refs), timeout=LEAVE_SECONDS)
                for ref in left:
                    ray.cancel(ref, force=True)
        with contextlib.suppress(StorageLostError):
            reap(self.ledger, restart_grace=True)


def _submit(order: NodeCommand, share: WorkerResources, name: str) -> Any:
    """Have a command carried out on whatever node has room; Ray starts it again where that is lost."""
    task = ray.remote(run_command).options(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=-1, name=name)
    return task.remote(order)


def _ending(ref: Any) -> CommandResult | None:
    """How a task ended; None while it runs or waits.

    Raises:
        RunError: the cluster is gone.
    """
    try:
        return ray.get(ref, timeout=0)  # type: ignore[no-any-return]
    except GetTimeoutError:
        return None
    except TaskCancelledError:
        return CommandResult(0, "cancelled", {})
    except RayTaskError as error:  # our own few lines failed, such as for want of a module
        return CommandResult(1, first_line(error.cause if isinstance(error.cause, Exception) else error), {})
    except RayError as error:  # such as a runtime environment that cannot be set up
        return CommandResult(1, f"{type(error).__name__}: {first_line(error)}", {})
    except Exception as error:
        raise _gone(error) from error


def retrain_on(
    where: Cluster, study: StudyLocation, max_epochs: int | None, progress: Callable[[], str], show: Show
) -> None:
    """Retrain a search's winner on a node, by `python -m search retrain`, and bring the saved model here.

    Args:
        where: the cluster.
        study: the search, whose finale nobody holds: the node's process will.
        max_epochs: of a training, at most.
        progress: where the retrain is, as a line; empty while nothing is known.
        show: gets events.

    Raises:
        UserError, RunError: the retrain's own complaint.
    """
    share = where.share
    if not share.gpus:  # one training by itself: all of the largest node
        share = WorkerResources(max(node["Resources"].get("CPU", 1.0) for node in alive_nodes()), 0.0)
    gpus = math.ceil(share.gpus)
    most = () if max_epochs is None else ("--max-retrain-epochs", str(max_epochs))
    best = study.out / "best"
    # With what is there: a retrain that is done finds its model and does nothing.
    folder = str(best.resolve())
    order = replace(where.order("retrain", study, most, {}), folder=folder, files=read_files(folder))
    show(Note(f"retrain on a node of the Ray cluster, with {gpus} GPUs and {share.cpus:g} CPUs"))
    ref = _submit(order, WorkerResources(share.cpus, gpus), f"search retrain of {study.name}")
    told = ""
    try:
        while (ending := _ending(ref)) is None:
            time.sleep(RETRAIN_POLL_SECONDS)
            if (now := progress()) not in ("", told):
                told = now
                show(Note(told))
    except BaseException:
        with contextlib.suppress(Exception):
            ray.cancel(ref)
            ray.wait([ref], timeout=LEAVE_SECONDS)
        raise
    if ending.status:
        complaint = last_line(ending.lines)
        raise (
            UserError(complaint)
            if ending.status == ExitStatus.WRONG_INPUT
            else RunError(f"the retrain failed: {complaint}")
        )
    best.mkdir(parents=True, exist_ok=True)
    for name, content in ending.files.items():
        (best / name).write_bytes(content)
