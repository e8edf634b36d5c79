"""Faults, on purpose: what becomes of the budget, the trials and the workers, beside plain Optuna in the same run.

    python -m benchmarks.service.faults [--only kills,outage,...] [--json FILE] [--seeds 3]

Every worker is a real process whose trials sleep (`benchmarks.service.sleeper`), every PostgreSQL a real server, every
kill a real signal. Scenarios:

kills       8 workers, 1-second trials, a worker killed with -9 every 2 to 4 seconds at random and replaced
sqlite      the same with 4 workers on SQLite
outage      PostgreSQL stopped for a minute in mid-study and started again
dropped     one connection after another terminated by the server
preempted   a real training worker gets SIGTERM in mid-trial, 20 times
throughput  64 workers, 0.2-second trials: trials/s, ask and tell, against plain ``study.optimize``
"""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.engine import URL

from benchmarks.service.sleeper import create, definition, quantiles
from search.attributes import SLOT
from search.host.environment import commit
from search.host.process import this_process
from search.launch import local as launch
from search.launch.local import LocalWorkers, WorkerPlan
from search.ledger.budget import count_budget, is_open
from search.ledger.leases import open_ledger
from search.ledger.registry import list_workers
from search.storage.connect import open_storage
from search.storage.local_postgres import local_postgres
from search.storage.url import storage_url

ROOT = Path(__file__).parents[2]


# Processes


def sleeper(kind: str, url: URL, name: str, folder: Path, index: int, *words: str) -> "subprocess.Popen[bytes]":
    """Start one worker."""
    command = [
        sys.executable, "-m", "benchmarks.service.sleeper", kind, "--name", name,
        "--events", str(folder / f"{kind}-{index}.jsonl"), *words,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "SEARCH_STORAGE": url.render_as_string(hide_password=False),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    with (folder / f"{kind}-{index}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def events(folder: Path, kind: str) -> list[list[dict[str, Any]]]:
    """What the workers noted, a list for each."""
    return [
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        for path in sorted(folder.glob(f"{kind}-*.jsonl"))
    ]


# Studies


def outcome(url: URL, name: str, kind: str) -> dict[str, Any]:
    """What the database says in the end."""
    study = optuna.load_study(study_name=name, storage=url.render_as_string(hide_password=False))
    trials = study.get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if kind == "ours":
        keys = [trial.user_attrs[SLOT] for trial in done]
        by_slot: dict[int, set[str]] = {}
        for trial in trials:
            if len(trial.params) == 5:
                by_slot.setdefault(trial.user_attrs[SLOT], set()).add(json.dumps(trial.params))
        changed = sum(len(params) > 1 for params in by_slot.values())
    else:
        keys = [json.dumps(trial.params, sort_keys=True) for trial in done]
        changed = None
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    finished_params = {json.dumps(trial.params, sort_keys=True) for trial in done}
    complete_params = [trial for trial in failed if len(trial.params) == 5]
    return {
        "done": len(done),
        "running_left": sum(trial.state == TrialState.RUNNING for trial in trials),
        "waiting_left": sum(trial.state == TrialState.WAITING for trial in trials),
        "duplicates": len(keys) - len(set(keys)),
        "failed_attempts": len(failed),
        "failed_never_repeated": sum(
            json.dumps(trial.params, sort_keys=True) not in finished_params for trial in complete_params
        ),
        "slots_whose_parameters_changed": changed,
    }


@contextmanager
def our_team(url: URL, name: str, folder: Path, workers: int, *words: str) -> Iterator[Callable[[], bool]]:
    """Our launcher over sleeping workers; what it yields is to be called again until it says that all is done."""
    started = iter(range(100_000))

    def spawn(team: WorkerPlan, number: int) -> "subprocess.Popen[bytes]":
        del team
        more = ("--number", str(number), "--launcher", this_process().key, *words)
        return sleeper("ours", url, name, folder, next(started), *more)

    storage = open_storage(url)
    ledger, _ = open_ledger(storage, name, definition(1, 1).workers)
    plain_spawn, launch.spawn_worker = launch.spawn_worker, spawn
    (folder / "worker-0.log").touch()
    local = LocalWorkers(ledger, WorkerPlan(("cpu",) * workers, 1, (), url, folder), lambda _: None)

    def tend() -> bool:
        count = count_budget(ledger)
        local.tend(list_workers(ledger), count.done, count.remaining)
        return not is_open(ledger)

    try:
        yield tend
    finally:
        local.stop()
        launch.spawn_worker = plain_spawn
        storage.engine.dispose()


def pids(name: str) -> list[int]:
    """Living sleepers of a study."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"benchmarks.service.sleeper" in words and name.encode() in words:
                found.append(int(folder.name))
    return found


class Replaced:
    """Plain Optuna's workers: whoever ends before the budget is done is started again, if that is asked for."""

    def __init__(self, url: URL, name: str, folder: Path, workers: int, trials: int, *words: str) -> None:
        def start(index: int) -> "subprocess.Popen[bytes]":
            return sleeper("optuna", url, name, folder, index, "--trials", str(trials), *words)

        self._start, self._index = start, workers
        self._children = [start(index) for index in range(workers)]
        self.died = 0

    def tend(self, replace: bool = True) -> bool:
        """Whether all have ended."""
        for child in list(self._children):
            status = child.poll()
            if status is None:
                continue
            self._children.remove(child)
            if status != 0:
                self.died += 1
                if replace:
                    self._children.append(self._start(self._index))
                    self._index += 1
        return not self._children

    def stop(self) -> None:
        """End all."""
        for child in self._children:
            child.kill()
            child.wait()


# Scenarios


def kills(url: URL, folder: Path, kind: str, seed: int, workers: int, trials: int = 200) -> dict[str, Any]:
    """A worker killed every 2 to 4 seconds."""
    name = f"kills-{kind}-{seed}"
    chance, killed, began = random.Random(seed), 0, time.monotonic()
    words = ("--seconds", "1", "--epochs", "4")

    def maybe_kill(due: float) -> float:
        nonlocal killed
        if time.monotonic() < due:
            return due
        alive = pids(name)
        if alive:
            os.kill(chance.choice(alive), signal.SIGKILL)
            killed += 1
        return time.monotonic() + chance.uniform(2, 4)

    due = time.monotonic() + 8
    if kind == "ours":
        create(url, name, definition(trials, 4))
        with our_team(url, name, folder, workers, *words) as tend:
            while not tend():
                due = maybe_kill(due)
                time.sleep(0.2)
    else:
        optuna.create_study(storage=url.render_as_string(hide_password=False), study_name=name, direction="maximize")
        team = Replaced(url, name, folder, workers, trials, *words)
        while not team.tend():
            due = maybe_kill(due)
            time.sleep(0.2)
        team.stop()
    seconds = time.monotonic() - began
    return {"kind": kind, "seed": seed, "workers": workers, "budget": trials, "killed": killed,
            "seconds": round(seconds, 1), "said_locked": said(folder, "database is locked"),
            **outcome(url, name, kind)}  # fmt: skip


def said(folder: Path, words: str) -> int:
    """How often the workers printed or noted something."""
    return sum(path.read_text(errors="replace").count(words) for path in folder.glob("*.[jl]*"))


def outage(url: URL, folder: Path, kind: str, server: "Server", seconds: float = 60) -> dict[str, Any]:
    """The database away for a minute."""
    name, workers, trials = f"outage-{kind}", 4, 100
    words = ("--seconds", "2", "--epochs", "4")
    dead = 0

    def break_it() -> None:
        time.sleep(12)
        server.stop()
        time.sleep(seconds)
        server.start()

    if kind == "ours":
        create(url, name, definition(trials, 4))
        folder.mkdir(exist_ok=True)
        children = [sleeper("ours", url, name, folder, index, *words) for index in range(workers)]
        break_it()
        while any(child.poll() is None for child in children):
            time.sleep(0.2)
        dead = sum(child.returncode != 0 for child in children)
    else:
        optuna.create_study(storage=url.render_as_string(hide_password=False), study_name=name, direction="maximize")
        team = Replaced(url, name, folder, workers, trials, *words)
        break_it()
        time.sleep(3)
        until = time.monotonic() + 90
        while not team.tend(replace=False) and time.monotonic() < until:
            time.sleep(0.2)
        dead = team.died
        team.stop()
    return {"kind": kind, "workers": workers, "budget": trials, "outage_seconds": seconds, "workers_dead": dead,
            **outcome(url, name, kind)}  # fmt: skip


def dropped(url: URL, folder: Path, kind: str, *more: str) -> dict[str, Any]:
    """The server terminates one of the workers' connections every two seconds, ten times."""
    name, workers, trials = f"dropped-{kind}", 8, 120
    words = ("--seconds", "1", "--epochs", "4", *more)
    if kind == "ours":
        create(url, name, definition(trials, 4))
        children = [sleeper("ours", url, name, folder, index, *words) for index in range(workers)]
    else:
        optuna.create_study(storage=url.render_as_string(hide_password=False), study_name=name, direction="maximize")
        children = [sleeper("optuna", url, name, folder, i, "--trials", str(trials), *words) for i in range(workers)]
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    time.sleep(10)
    for _ in range(10):
        with admin.connect() as connection:
            connection.execute(sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid() AND backend_type = 'client backend' ORDER BY random() LIMIT 1"
            ))  # fmt: skip
        time.sleep(2)
    until = time.monotonic() + 120
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(0.2)
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()
    admin.dispose()
    return {"kind": " ".join([kind, *more]), "workers": workers, "budget": trials, "connections_dropped": 10,
            "workers_dead": sum(child.returncode != 0 for child in children), **outcome(url, name, kind)}  # fmt: skip


def preempted(folder: Path, times: int = 20) -> dict[str, Any]:
    """A real training worker on digits, asked to go in mid-trial."""
    (folder / "long.toml").write_text(
        "trials = 2\n[trial]\nepochs = 2000\n[space]\nblocks = 3\nconvs = 2\nlr = 0.1\n"
        "[pruner]\nkind = 'none'\n[retrain]\nepochs = 1\n"
    )
    url = storage_url(f"sqlite:///{folder / 'preempted.db'}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SEARCH_STORAGE": url.render_as_string()}
    base = [sys.executable, "-m", "search"]
    words = ["run", "--study", "long.toml", "--dataset", "digits", "--workers", "0", "--no-finale", "--timeout", "1"]
    subprocess.run([*base, *words], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    storage = open_storage(url)
    ledger, study = open_ledger(storage, "long", definition(1, 1).workers)
    seconds, back, statuses, chance = [], 0, [], random.Random(0)
    for _ in range(times):
        child = subprocess.Popen(
            [*base, "worker", "--name", "long"], cwd=folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        for line in child.stdout:
            if ": epoch " in line:
                break
        time.sleep(chance.uniform(0, 1.5))
        asked = time.monotonic()
        child.terminate()
        child.communicate()
        seconds.append(time.monotonic() - asked)
        statuses.append(child.returncode)
        count = count_budget(ledger)
        back += count.waiting == 2 and count.running == 0
    attempts = study.get_trials(deepcopy=False)
    storage.engine.dispose()
    return {
        "times": times,
        "under_10_s": sum(one < 10 for one in seconds),
        "trial_back_in_the_queue": back,
        "exit_130": statuses.count(130),
        "median_seconds": round(statistics.median(seconds), 3),
        "longest_seconds": round(max(seconds), 3),
        "same_parameters": len({json.dumps(trial.params) for trial in attempts if trial.user_attrs[SLOT] == 0}) == 1,
        "epochs_kept": [trial.last_step for trial in attempts],
    }


def throughput(url: URL, folder: Path, kind: str, workers: int, trials: int, round_: int) -> dict[str, Any]:
    """Trials that sleep 0.2 s, from when all processes are ready."""
    name = f"throughput-{kind}-{workers}-{round_}"
    go = folder / "go"
    words = ("--seconds", "0.2", "--epochs", "1", "--go", str(go), "--trials", str(trials), "--no-heartbeat")
    if kind == "ours":
        create(url, name, definition(trials, 1))
    else:
        optuna.create_study(storage=url.render_as_string(hide_password=False), study_name=name, direction="maximize")
    children = [sleeper(kind, url, name, folder, index, *words) for index in range(workers)]
    while sum(any(event["what"] == "ready" for event in one) for one in events(folder, kind)) < workers:
        time.sleep(0.5)
    time.sleep(1)
    go.touch()
    for child in children:
        child.wait()
    noted = events(folder, kind)
    asks, tells, slept, asked = [], [], [], []
    for one in noted:
        told = None
        for event in one:
            if event["what"] == "asked":
                asked.append(event["at"])
                if told is not None:
                    asks.append(event["at"] - told)
            if event["what"] == "slept":
                slept.append(event["at"])
                last = event["at"]
            if event["what"] == "told":
                tells.append(event["at"] - last)
                told = event["at"]
    # The middle of the run: neither the start, when nobody asks beside the first, nor the end, when some have left.
    slept.sort()
    low, high = len(slept) // 10, len(slept) * 9 // 10
    rate = (high - low) / (slept[high] - slept[low])

    return {"kind": kind, "workers": workers, "budget": trials, "round": round_, "trials_per_second": round(rate, 1),
            "ask": quantiles(asks), "tell": quantiles(tells), **outcome(url, name, kind)}  # fmt: skip


class Server:
    """A PostgreSQL of our own that can be stopped and started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = local_postgres(folder)
        server = self._context.__enter__()
        self.url = server.url.set(password=server.password)

    def database(self, name: str) -> URL:
        """An empty database."""
        admin = sa.create_engine(self.url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(sa.text(f'CREATE DATABASE "{name}"'))
        admin.dispose()
        return self.url.set(database=name)

    def stop(self) -> None:
        """As a crash of its machine would, but for the data that it has on disk."""
        os.kill(self._pid(), signal.SIGQUIT)
        while Path(f"/proc/{self._last}").exists():
            time.sleep(0.05)

    def start(self) -> None:
        """Start it again, on its old port."""
        self._context = local_postgres(self._folder)
        self._context.__enter__()

    def _pid(self) -> int:
        self._last = int((self._folder / "data" / "postmaster.pid").read_text().split()[0])
        return self._last


def main() -> None:
    """Run the scenarios and print a JSON line for each result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="kills,sqlite,outage,dropped,preempted,throughput")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    wanted = arguments.only.split(",")
    results: dict[str, Any] = {
        "command": "python -m benchmarks.service.faults " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "versions": {name: metadata.version(name) for name in ("optuna", "sqlalchemy", "psycopg")},
    }

    def record(scenario: str, result: dict[str, Any]) -> None:
        results.setdefault(scenario, []).append(result)
        print(json.dumps({"scenario": scenario, **result}), flush=True)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        server = Server(Path(scratch) / "postgres")
        folders = iter(range(1000))

        def fresh() -> Path:
            folder = Path(scratch) / f"run-{next(folders)}"
            folder.mkdir()
            return folder

        for seed in range(arguments.seeds):
            for kind in ("ours", "optuna"):
                if "kills" in wanted:
                    record("kills", kills(server.database(f"kills-{kind}-{seed}"), fresh(), kind, seed, 8))
                if "sqlite" in wanted:
                    folder = fresh()
                    url = storage_url(f"sqlite:///{folder / 'study.db'}")
                    record("sqlite", kills(url, folder, kind, seed, 4, trials=100))
        for kind in ("ours", "optuna"):
            if "dropped" in wanted:
                record("dropped", dropped(server.database(f"dropped-{kind}"), fresh(), kind))
                if kind == "optuna":
                    record("dropped", dropped(server.database("dropped-ping"), fresh(), kind, "--pre-ping"))
            if "outage" in wanted:
                record("outage", outage(server.database(f"outage-{kind}"), fresh(), kind, server))
        if "preempted" in wanted:
            record("preempted", preempted(fresh()))
        if "throughput" in wanted:
            for round_ in range(arguments.rounds):
                for kind in ("optuna", "ours") if round_ % 2 else ("ours", "optuna"):
                    url = server.database(f"throughput-{kind}-{round_}")
                    count = arguments.workers
                    record("throughput", throughput(url, fresh(), kind, count, 20 * count, round_))
        os.kill(server._pid(), signal.SIGINT)


if __name__ == "__main__":
    main()
