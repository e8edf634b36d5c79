"""The workers that `run` starts on its own machine: how many, on which devices, and what happens when one ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from sqlalchemy.engine import URL

from search.host.process import is_dead, is_key, pid_namespace, this_process
from search.host.resources import available_cores, available_memory, oom_kills, threads_per_worker
from search.launch.base import LEAVE_SECONDS, LauncherFactory, RestartPolicy, StudyLocation, last_line
from search.launch.gpu_sharing import GpuMonitor, HostLoad
from search.launch.nvidia_smi import gpu_key
from search.ledger.budget import is_open
from search.ledger.heartbeat import mark_dead, reap
from search.ledger.leases import Ledger
from search.ledger.registry import WorkerRow, WorkerState, adopt_workers, list_workers
from search.storage.retry import StorageLostError
from search.storage.url import with_password


class WorkerProcess(Protocol):
    """What a launcher needs of a worker's process."""

    pid: int

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True)
class WorkerPlan:
    """The workers that this machine is to have.

    Attributes:
        devices: for each worker, what ``--device`` gets.
        threads: that each may use.
        words: the rest of the worker's command line.
        storage: passed in the environment, since it may hold a password.
        logs: folder of the workers' outputs.
        shares_gpus: whether a GPU gets further workers if the measurements say that they pay.
    """

    devices: tuple[str, ...]
    threads: int
    words: tuple[str, ...]
    storage: URL
    logs: Path
    shares_gpus: bool = False

    def log(self, number: int) -> Path:
        """What a worker prints."""
        return self.logs / f"worker-{number}.log"


def plan_devices(workers: int | None, gpus: Sequence[str], per_gpu: int, cores: int) -> tuple[str, ...]:
    """The device of each worker.

    Args:
        workers: their number; None: ``per_gpu`` for each GPU, or one for every four cores of the CPU. On two cores two
            workers together were a tenth faster than one with both (benchmarks/results).
        gpus: the GPUs that may be used, such as ``cuda:0``; none: the CPU is.
        per_gpu: workers that share a GPU.
        cores: of the CPU.
    """
    if not gpus:
        return ("cpu",) * (max(1, cores // 4) if workers is None else workers)
    count = len(gpus) * per_gpu if workers is None else workers
    return tuple(gpus[index % len(gpus)] for index in range(count))


def local_launcher(devices: Sequence[str], workers: int | None, per_gpu: int | None) -> LauncherFactory:
    """Workers as processes of this machine.

    Args:
        devices: that may be used, such as ``cuda:0``.
        workers: their number; None: as the devices suggest.
        per_gpu: workers that share a GPU; None: as the measurements say.
    """
    gpus = [device for device in devices if device.startswith("cuda")]
    chosen = plan_devices(workers, gpus, per_gpu or 1, available_cores())
    shares_gpus = bool(gpus) and workers is None and per_gpu is None

    def launch(ledger: Ledger, study: StudyLocation, tell: Callable[[str], None]) -> LocalWorkers:
        words = ("--name", study.name, "--data-dir", str(study.data_dir.resolve()), "--out", str(study.out.resolve()))
        plan = WorkerPlan(
            chosen, threads_per_worker(len(chosen)), words, study.storage, study.out / "workers", shares_gpus
        )
        return LocalWorkers(ledger, plan, tell)

    return launch


def spawn_worker(plan: WorkerPlan, number: int) -> WorkerProcess:
    """Start a worker as a process of its own session: neither Ctrl-C nor the end of this process ends it."""
    plan.logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "search", "worker", "--device", plan.devices[number], *plan.words]
    environment = {
        "OMP_NUM_THREADS": str(plan.threads),  # the user's own value overrides it
        **os.environ,
        "SEARCH_STORAGE": with_password(plan.storage).render_as_string(hide_password=False),
        "SEARCH_WORKER_NUMBER": str(number),
        "SEARCH_WORKER_LAUNCHER": this_process().key,
        "SEARCH_WORKER_LOG": f"{this_process().host}:{plan.log(number).resolve()}",
    }
    with plan.log(number).open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


@dataclass
class LocalWorkers:
    """The launcher of processes on this machine."""

    ledger: Ledger
    plan: WorkerPlan
    tell: Callable[[str], None]
    _children: dict[int, WorkerProcess] = field(default_factory=dict)
    _rows: Sequence[WorkerRow] = ()
    _memory_kills: int = field(default_factory=oom_kills)
    _monitor: GpuMonitor | None = None

    def __post_init__(self) -> None:
        self._restart_policy = RestartPolicy(self.ledger, self.tell)
        if self.plan.shares_gpus:
            self._monitor = GpuMonitor(self.ledger, self.tell)

    def maintain(self, rows: Sequence[WorkerRow], done: int, remaining: int) -> None:
        self._rows = rows
        for number, child in list(self._children.items()):
            status = child.poll()
            if status is not None:
                del self._children[number]
                self._ended(number, child.pid, status, rows, done)
        if remaining and self._monitor is not None:
            self._share_gpus(self._monitor, rows, remaining)
        # A slot may be open although all results are stored: its worker died before it closed it.
        if remaining or is_open(self.ledger):
            self._fill(rows)

    def _ended(self, number: int, pid: int, status: int, rows: Sequence[WorkerRow], done: int) -> None:
        row = next((row for row in reversed(rows) if row.pid_namespace == pid_namespace() and row.pid == pid), None)
        if row is not None and row.state != WorkerState.LEFT:
            kills, before = oom_kills(), self._memory_kills
            self._memory_kills = kills
            for_memory = status == -signal.SIGKILL and kills > before
            why = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
            mark_dead(self.ledger, row.id, "killed by the kernel, out of memory" if for_memory else why, for_memory)
        log = self.plan.log(number)
        self._restart_policy.record_end(number, f"worker {number} (pid {pid})", status, _last_line(log), str(log), done)

    def _share_gpus(self, monitor: GpuMonitor, rows: Sequence[WorkerRow], remaining: int) -> None:
        """Add a worker to the plan if the measurements of a GPU say so."""
        running = {row.number: row for row in rows if row.number is not None and is_local(row)}
        devices = list(self.plan.devices)
        # Only workers know which GPU `cuda:0` is. One that has not loaded its images yet has none.
        names = {gpu_key(row.device_key): devices[n] for n, row in running.items() if n < len(devices) and row.device}
        host = HostLoad(max(len(devices), len(running)), available_cores(), available_memory())
        leased = sum(row.lives and row.slot is not None for row in rows)
        chosen = monitor.look(rows, names, host, remaining - leased)
        if chosen is None:
            return
        while len(devices) in running:  # added by an earlier `run` whose workers this one adopted
            devices.append(names.get(gpu_key(running[len(devices)].device_key), chosen))
        devices.append(chosen)
        self.plan = replace(self.plan, devices=tuple(devices), threads=threads_per_worker(len(devices)))

    def _fill(self, rows: Sequence[WorkerRow]) -> None:
        running = {row.number for row in rows if is_local(row)}
        for number in range(len(self.plan.devices)):
            if number not in self._children and number not in running and self._restart_policy.may_start(number):
                self._children[number] = spawn_worker(self.plan, number)
        self._restart_policy.raise_if_hopeless(len(self.plan.devices), rows)

    def stop(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
        own = {os.getpid(), *(child.pid for child in self._children.values())}
        # As last seen: the database may be away at this moment.
        adopted = [row for row in self._rows if row.launcher == this_process().key and row.pid not in own]
        adopted = [row for row in adopted if is_local(row)]
        for child in self._children.values():
            if child.poll() is None:
                child.terminate()
        for row in adopted:
            _signal(row, signal.SIGTERM)
        until = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < until and (
            any(child.poll() is None for child in self._children.values())
            or any(not is_dead(row.pid_namespace, row.process) for row in adopted)
        ):
            time.sleep(0.05)
        for child in self._children.values():
            if child.poll() is None:
                child.kill()
        for row in adopted:
            _signal(row, signal.SIGKILL)
        self._children.clear()
        with contextlib.suppress(StorageLostError):
            reap(self.ledger, restart_grace=True)


def is_local(row: WorkerRow) -> bool:
    """Whether a `run` started the worker as a process of this machine, and it lives."""
    started_here = row.launcher is not None and is_key(row.launcher) and row.pid_namespace == pid_namespace()
    return row.lives and row.number is not None and started_here and not is_dead(row.pid_namespace, row.process)


def adopt_orphans(ledger: Ledger) -> int:
    """Take over the workers of a `run` on this machine that has died; how many they are."""
    orphans = [
        row
        for row in list_workers(ledger)
        if is_local(row) and row.launcher is not None and is_dead(row.pid_namespace, row.launcher)
    ]
    adopt_workers(ledger, [row.id for row in orphans], this_process().key)
    return len(orphans)


def _signal(row: WorkerRow, number: signal.Signals) -> None:
    if not is_dead(row.pid_namespace, row.process):
        try:
            os.kill(row.pid, number)
        except ProcessLookupError:
            return


def _last_line(log: Path) -> str:
    try:
        return last_line(log.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "its log cannot be read"
