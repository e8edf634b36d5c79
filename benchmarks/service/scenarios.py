"""The scenarios of `benchmarks.service.faults`: each one study of one kind of worker, and what became of it."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.engine import URL

from benchmarks.service.latency import ask_and_tell, quantiles
from benchmarks.service.server import PostgresServer
from benchmarks.service.studies import create_study, sleeping_study
from benchmarks.service.workers import (
    ROOT,
    Kind,
    OptunaWorkers,
    count_words,
    living_sleepers,
    our_workers,
    read_events,
    start_sleeper,
)
from search.attributes import SLOT
from search.ledger.budget import count_budget
from search.ledger.leases import open_ledger
from search.storage.connect import open_storage
from search.storage.url import storage_url


def create(kind: Kind, url: URL, name: str, trials: int, epochs: int) -> None:
    """Create a study as workers of that kind need it."""
    if kind == "ours":
        create_study(url, name, sleeping_study(trials, epochs))
    else:
        optuna.create_study(storage=url.render_as_string(hide_password=False), study_name=name, direction="maximize")


def outcome(url: URL, name: str, kind: Kind) -> dict[str, Any]:
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


def kills(url: URL, folder: Path, kind: Kind, seed: int, workers: int, trials: int = 200) -> dict[str, Any]:
    """A worker killed every 2 to 4 seconds."""
    name = f"kills-{kind}-{seed}"
    rng, killed, began = random.Random(seed), 0, time.monotonic()
    words = ("--seconds", "1", "--epochs", "4")

    def maybe_kill(due: float) -> float:
        nonlocal killed
        if time.monotonic() < due:
            return due
        alive = living_sleepers(name)
        if alive:
            os.kill(rng.choice(alive), signal.SIGKILL)
            killed += 1
        return time.monotonic() + rng.uniform(2, 4)

    due = time.monotonic() + 8
    create(kind, url, name, trials, 4)
    if kind == "ours":
        with our_workers(url, name, folder, workers, *words) as tend:
            while not tend():
                due = maybe_kill(due)
                time.sleep(0.2)
    else:
        optuna_workers = OptunaWorkers(url, name, folder, workers, trials, *words)
        while not optuna_workers.tend():
            due = maybe_kill(due)
            time.sleep(0.2)
        optuna_workers.stop()
    seconds = time.monotonic() - began
    return {"kind": kind, "seed": seed, "workers": workers, "budget": trials, "killed": killed,
            "seconds": round(seconds, 1), "said_locked": count_words(folder, "database is locked"),
            **outcome(url, name, kind)}  # fmt: skip


def outage(url: URL, folder: Path, kind: Kind, server: PostgresServer, seconds: float = 60) -> dict[str, Any]:
    """The database away for a minute."""
    name, workers, trials = f"outage-{kind}", 4, 100
    words = ("--seconds", "2", "--epochs", "4")
    dead = 0

    def break_it() -> None:
        time.sleep(12)
        server.stop()
        time.sleep(seconds)
        server.start()

    create(kind, url, name, trials, 4)
    if kind == "ours":
        folder.mkdir(exist_ok=True)
        children = [start_sleeper("ours", url, name, folder, index, *words) for index in range(workers)]
        break_it()
        while any(child.poll() is None for child in children):
            time.sleep(0.2)
        dead = sum(child.returncode != 0 for child in children)
    else:
        optuna_workers = OptunaWorkers(url, name, folder, workers, trials, *words)
        break_it()
        time.sleep(3)
        until = time.monotonic() + 90
        while not optuna_workers.tend(replace=False) and time.monotonic() < until:
            time.sleep(0.2)
        dead = optuna_workers.died
        optuna_workers.stop()
    return {"kind": kind, "workers": workers, "budget": trials, "outage_seconds": seconds, "workers_dead": dead,
            **outcome(url, name, kind)}  # fmt: skip


def dropped(url: URL, folder: Path, kind: Kind, *more: str) -> dict[str, Any]:
    """The server terminates one of the workers' connections every two seconds, ten times."""
    name, workers, trials = f"dropped-{kind}", 8, 120
    words = ("--seconds", "1", "--epochs", "4", *more, *(("--trials", str(trials)) if kind == "optuna" else ()))
    create(kind, url, name, trials, 4)
    children = [start_sleeper(kind, url, name, folder, index, *words) for index in range(workers)]
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
    """A real training worker on digits gets SIGTERM in mid-trial."""
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
    ledger, study = open_ledger(storage, "long", sleeping_study(1, 1).workers)
    seconds, back, statuses, rng = [], 0, [], random.Random(0)
    for _ in range(times):
        child = subprocess.Popen(
            [*base, "worker", "--name", "long"], cwd=folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        for line in child.stdout:
            if ": epoch " in line:
                break
        time.sleep(rng.uniform(0, 1.5))
        signalled = time.monotonic()
        child.terminate()
        child.communicate()
        seconds.append(time.monotonic() - signalled)
        statuses.append(child.returncode)
        count = count_budget(ledger)
        back += count.waiting == 2 and count.running == 0
    attempts = study.get_trials(deepcopy=False)
    storage.engine.dispose()
    return {
        "times": times,
        "under_10_s": sum(value < 10 for value in seconds),
        "trial_back_in_the_queue": back,
        "exit_130": statuses.count(130),
        "median_seconds": round(statistics.median(seconds), 3),
        "longest_seconds": round(max(seconds), 3),
        "same_parameters": len({json.dumps(trial.params) for trial in attempts if trial.user_attrs[SLOT] == 0}) == 1,
        "epochs_kept": [trial.last_step for trial in attempts],
    }


def throughput(url: URL, folder: Path, kind: Kind, workers: int, trials: int, round_: int) -> dict[str, Any]:
    """Trials that sleep 0.2 s, from when all processes are ready."""
    name = f"throughput-{kind}-{workers}-{round_}"
    go = folder / "go"
    words = ("--seconds", "0.2", "--epochs", "1", "--go", str(go), "--trials", str(trials), "--no-heartbeat")
    create(kind, url, name, trials, 1)
    children = [start_sleeper(kind, url, name, folder, index, *words) for index in range(workers)]
    while sum(any(event["what"] == "ready" for event in events) for events in read_events(folder, kind)) < workers:
        time.sleep(0.5)
    time.sleep(1)
    go.touch()
    for child in children:
        child.wait()
    noted = [[(event["what"], event["at"]) for event in events] for events in read_events(folder, kind)]
    asks, tells = (list(chain.from_iterable(waits)) for waits in zip(*map(ask_and_tell, noted), strict=True))
    slept = sorted(at for events in noted for what, at in events if what == "slept")
    # The middle of the run: neither the start, when nobody but the first asks, nor the end, when some have left.
    low, high = len(slept) // 10, len(slept) * 9 // 10
    rate = (high - low) / (slept[high] - slept[low])
    return {"kind": kind, "workers": workers, "budget": trials, "round": round_, "trials_per_second": round(rate, 1),
            "ask": quantiles(asks), "tell": quantiles(tells), **outcome(url, name, kind)}  # fmt: skip
