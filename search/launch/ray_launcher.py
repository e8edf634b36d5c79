"""Workers as tasks of a Ray cluster: what `search.launch.local` is on one machine."""

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from search.launch.base import LEAVE_SECONDS, Launcher, LauncherFactory, RestartPolicy, StudyLocation, last_line
from search.launch.ray_cluster import Cluster, alive_nodes, cluster_lost, submit, task_result, worker_capacity
from search.launch.ray_task import CommandResult
from search.ledger.budget import is_open
from search.ledger.heartbeat import mark_dead, reap
from search.ledger.leases import Ledger
from search.ledger.registry import WorkerRow
from search.storage.retry import StorageLostError

GONE_SECONDS = 20.0
"""A cluster whose head is out of reach for this long is taken for lost. Ray itself would end this process after 60."""


def ray_launcher(cluster: Cluster) -> LauncherFactory:
    """Workers as tasks of a Ray cluster."""

    def launch(ledger: Ledger, study: StudyLocation, tell: Callable[[str], None]) -> Launcher:
        return RayWorkers(ledger, cluster, study, tell)

    return launch


@dataclass
class RayWorkers:
    """The launcher of tasks on a Ray cluster.

    Ray starts a task again whose node is lost (``max_retries=-1``); without room the task waits for it.
    """

    ledger: Ledger
    cluster: Cluster
    study: StudyLocation
    tell: Callable[[str], None]
    _tasks: dict[int, Any] = field(default_factory=dict)
    _told_size: str = ""
    _seen: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._key = f"ray-{uuid.uuid4().hex}"
        self._restart_policy = RestartPolicy(self.ledger, self.tell)

    def maintain(self, rows: Sequence[WorkerRow], done: int, remaining: int) -> None:
        if not self.cluster.is_there():
            if time.monotonic() - self._seen > GONE_SECONDS:
                raise cluster_lost("its head cannot be reached")
            return
        self._seen = time.monotonic()
        for number, ref in list(self._tasks.items()):
            result = task_result(ref)
            if result is not None:
                del self._tasks[number]
                self._ended(number, result, rows, done)
        if remaining or is_open(self.ledger):
            self._fill(rows)

    def _ended(self, number: int, result: CommandResult, rows: Sequence[WorkerRow], done: int) -> None:
        own = [row for row in rows if row.launcher == self._key and row.number == number]
        if own and own[-1].lives:
            mark_dead(self.ledger, own[-1].id, f"ended with status {result.status}")
        message = last_line(result.lines)
        self._restart_policy.record_end(number, f"worker {number}", result.status, message, "status --logs tells", done)

    def _fill(self, rows: Sequence[WorkerRow]) -> None:
        nodes = alive_nodes()
        room = worker_capacity([node.resources for node in nodes], self.cluster.share)
        target = room if self.cluster.workers is None else self.cluster.workers
        self._tell_size(len(nodes), room, target)
        for number in range(target):
            if number not in self._tasks and self._restart_policy.may_start(number):
                self._tasks[number] = self._start(number)
        surplus = len(self._tasks) - target
        if surplus > 0:  # the cluster has shrunk: a task that waits for room would wait for ever
            at_work = {row.number for row in rows if row.launcher == self._key and row.lives}
            for number in sorted(set(self._tasks) - at_work, reverse=True)[:surplus]:
                ray.cancel(self._tasks.pop(number), force=True)
        if target:
            self._restart_policy.raise_if_hopeless(target, rows)

    def _start(self, number: int) -> Any:
        environment = {"SEARCH_WORKER_NUMBER": str(number), "SEARCH_WORKER_LAUNCHER": self._key}
        command = self.cluster.node_command("worker", self.study, (), environment)
        return submit(command, self.cluster.share, f"search worker {number} of {self.study.name}")

    def _tell_size(self, nodes: int, room: int, target: int) -> None:
        text = f"Ray: {nodes} node{'s' if nodes > 1 else ''} with room for {room}; {target} workers"
        if room < target:
            text += f", {target - room} of which wait until the cluster grows"
        if text != self._told_size:
            self._told_size = text
            self.tell(text)

    def stop(self) -> None:
        refs = list(self._tasks.values())
        self._tasks.clear()
        if refs and self.cluster.is_there():  # otherwise its tasks are gone, too
            with contextlib.suppress(Exception):
                for ref in refs:
                    ray.cancel(ref)
                _, left = ray.wait(refs, num_returns=len(refs), timeout=LEAVE_SECONDS)
                for ref in left:
                    ray.cancel(ref, force=True)
        with contextlib.suppress(StorageLostError):
            reap(self.ledger, restart_grace=True)
