"""Ten thousand one-second trials by hundreds of workers on one PostgreSQL: what the storage costs, and what limits it.

    python -m benchmarks.service.scale [--workers 256] [--trials 10000] [--seconds 1] [--processes 8] [--epochs 1]
        [--json FILE]

Real workers (`search.worker.loop.run_worker`), each with its own lease, heartbeats and database connection; only the
training is a nap. Many are threads of one process, because 256 processes with PyTorch do not fit a small machine: that
saves memory and costs what threads of one Python cost each other. Random sampling, no pruning, the shipped studies'
heartbeat.

The ideal is ceil(trials / workers) naps. The report compares with it, and adds: ask (from one trial's end to the next
one's nap: lease, trial, sampling) and tell (from the nap's end until the slot is closed), processor time of the
database and of the workers per trial, transactions per trial, connections. If all processors are busy, they set the
pace; the two times per trial then say at what rate the database alone would be busy (`model`).
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import optuna
import psutil  # type: ignore[import-untyped, unused-ignore]  # comes with the extra `test`
import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.engine import URL

from benchmarks.service.latency import ask_and_tell, quantiles
from benchmarks.service.record import report_head, write_report
from benchmarks.service.sleeper import SleepingRunner
from benchmarks.service.studies import create_study, sleeping_study
from search.attributes import SLOT
from search.config.study_file import WorkersConfig
from search.ledger.budget import count_budget
from search.ledger.leases import Ledger, open_ledger
from search.storage.connect import storage_opened
from search.storage.local_postgres import local_postgres
from search.storage.url import storage_url
from search.worker import loop as worker
from search.worker.runner import WorkerOptions
from search.worker.stop import StopRequest

ROOT = Path(__file__).parents[2]


NAME = "scale"


# Workers, many to a process


def host(given: argparse.Namespace) -> None:
    """Run the workers of one process, each a thread, once the file exists; at the end write what happened when."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = storage_url(None)
    events: list[list[tuple[str, float]]] = [[] for _ in range(given.workers)]
    ready = threading.Barrier(given.workers + 1)

    def work(index: int) -> None:
        def note(what: str, **_: object) -> None:
            events[index].append((what, time.time()))

        def open_runner(
            ledger: Ledger, study: optuna.Study, id_: str, options: WorkerOptions, show: Any
        ) -> SleepingRunner:
            del ledger, study, options, show
            ready.wait()  # connected and registered
            while not given.go.exists():
                time.sleep(0.02)
            note("begins")
            return SleepingRunner(f"sleeper:{id_[:6]}", given.seconds, note)

        options = WorkerOptions(url, NAME, "cpu", Path("none"), Path("none"), number=given.first + index)
        worker.run_worker(options, lambda _: None, StopRequest(), open_runner)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(given.workers)]
    for thread in threads:
        thread.start()
    ready.wait()
    before = sum(os.times()[:2])  # imports and opening are not a trial's
    given.events.with_suffix(".ready").touch()
    for thread in threads:
        thread.join()
    cpu = sum(os.times()[:2]) - before
    given.events.write_text(json.dumps({"cpu": cpu, "events": events}))


# The measurement


class Database:
    """What the server's processes have used; their parent counts those that have ended."""

    def __init__(self, url: URL) -> None:
        self._engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", pool_size=1)
        pid = self._value("SELECT pg_backend_pid()")
        self._server = psutil.Process(pid).parent()

    def _value(self, query: str) -> Any:
        with self._engine.connect() as connection:
            return connection.scalar(sa.text(query))

    def set_up(self, connections: int) -> None:
        """Ask for room for this many connections, which takes a restart."""
        with self._engine.connect() as connection:
            connection.execute(sa.text(f"ALTER SYSTEM SET max_connections = {connections}"))

    def cpu(self) -> float:
        """Processor seconds of all its processes so far."""
        assert self._server is not None
        times = self._server.cpu_times()
        total = times.user + times.system + times.children_user + times.children_system
        for child in self._server.children():
            try:
                used = child.cpu_times()
                total += used.user + used.system
            except psutil.NoSuchProcess:
                continue
        return float(total)

    def connections(self) -> int:
        """Client connections at this moment, without this one."""
        query = "SELECT count(*) - 1 FROM pg_stat_activity WHERE backend_type = 'client backend'"
        return int(self._value(query))

    def transactions(self) -> int:
        """Committed and rolled back, as far as they have been reported."""
        return int(self._value("SELECT sum(xact_commit + xact_rollback) FROM pg_stat_database"))

    def close(self) -> None:
        self._engine.dispose()


def measure(url: URL, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One study, from when all workers are ready."""
    real_heartbeat = {"workers": WorkersConfig()}
    config = sleeping_study(given.trials, given.epochs).model_copy(update=real_heartbeat)
    create_study(url, NAME, config)
    database = Database(url)
    go = folder / "go"
    shares = [len(range(index, given.workers, given.processes)) for index in range(given.processes)]
    children, files, first = [], [], 0
    environment = {**os.environ, "SEARCH_STORAGE": url.render_as_string(hide_password=False), "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(ROOT)}  # fmt: skip
    for index, share in enumerate(shares):
        files.append(folder / f"host-{index}.json")
        command = [
            sys.executable, "-m", "benchmarks.service.scale", "--host", "--workers", share, "--first", first, "--go",
            go, "--events", files[-1], "--seconds", given.seconds,
        ]  # fmt: skip
        children.append(subprocess.Popen([str(word) for word in command], env=environment))
        first += share
    while not all(file.with_suffix(".ready").exists() for file in files):
        assert all(child.poll() is None for child in children)
        time.sleep(0.5)
    busy_before, database_before, transactions = psutil.cpu_times(), database.cpu(), database.transactions()
    go.touch()
    most_connections = 0
    while any(child.poll() is None for child in children):
        most_connections = max(most_connections, database.connections())
        time.sleep(1)
    spent = database.cpu() - database_before
    busy = psutil.cpu_times()
    hosts = [json.loads(file.read_text()) for file in files]
    result = {
        "workers": given.workers,
        "processes": given.processes,
        "trials": given.trials,
        "seconds": given.seconds,
        "epochs": given.epochs,
        **latencies(hosts, given),
        "connections": most_connections,
        "transactions_per_trial": round((database.transactions() - transactions) / given.trials, 1),
        "database_cpu_ms_per_trial": round(1000 * spent / given.trials, 2),
        "workers_cpu_ms_per_trial": round(1000 * sum(host["cpu"] for host in hosts) / given.trials, 2),
        "processors_idle_share": round(_idle(busy_before, busy), 3),
        **outcome(url),
    }
    database.close()
    return result


def _idle(before: Any, after: Any) -> float:
    spent = {
        name: getattr(after, name) - getattr(before, name) for name in ("user", "nice", "system", "idle", "iowait")
    }
    return float((spent["idle"] + spent["iowait"]) / max(1e-9, sum(spent.values())))


def latencies(hosts: Sequence[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Wall time against the ideal, and how long asks and tells took."""
    workers = [events for host in hosts for events in host["events"]]
    asks, tells = (list(chain.from_iterable(waits)) for waits in zip(*map(ask_and_tell, workers), strict=True))
    begins, ends = ([at for events in workers for what, at in events if what == word] for word in ("begins", "told"))
    wall = max(ends) - min(begins)
    ideal = math.ceil(given.trials / given.workers) * given.seconds
    return {
        "wall_seconds": round(wall, 2),
        "ideal_seconds": round(ideal, 2),
        "overhead": round(wall / ideal - 1, 3),
        "trials_per_second": round(given.trials / wall, 1),
        "ask": quantiles(asks),
        "tell": quantiles(tells),
    }


def outcome(url: URL) -> dict[str, int]:
    """What the study holds in the end."""
    with storage_opened(url) as storage:
        ledger, study = open_ledger(storage, NAME, WorkersConfig())
        count = count_budget(ledger)
        slots = [t.user_attrs[SLOT] for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    return {"complete": count.complete, "different_slots": len(set(slots)), "running_left": count.running}


def model(result: dict[str, Any], database_cores: int) -> dict[str, Any]:
    """How far the database would go with that many cores of its own: an upper bound, from its processor time alone."""
    rate = 1000 * database_cores / result["database_cpu_ms_per_trial"]
    return {
        "database_cores": database_cores,
        "trials_per_second": round(rate, 1),
        "shortest_trial_seconds_at_10000_workers": round(10_000 / rate, 1),
    }


@contextlib.contextmanager
def server(folder: Path, connections: int) -> Iterator[URL]:
    """A PostgreSQL of our own with room for that many connections."""
    with local_postgres(folder) as first:
        database = Database(first.url.set(password=first.password))
        database.set_up(connections)
        database.close()
    with local_postgres(folder) as again:
        yield again.url.set(password=again.password)


def main() -> None:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service.scale", description=__doc__)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--json", type=Path)
    for name, kind in (("--first", int), ("--go", Path), ("--events", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--host", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.host:
        host(given)
        return
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="scale-") as scratch:
        folder = Path(scratch)
        with server(folder / "postgres", given.workers + 50) as url:
            result = measure(url, folder, given)
    report = {
        **report_head("benchmarks.service.scale"),
        **result,
        "model": [model(result, cores) for cores in (2, 16, 64)],
    }
    print(json.dumps(report, indent=1))
    write_report(given.json, report)


if __name__ == "__main__":
    main()
