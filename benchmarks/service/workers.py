"""Worker processes of both kinds whose trials sleep, started and replaced as a launcher would."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy.engine import URL

from benchmarks.service.studies import sleeping_study
from search.host.process import this_process
from search.launch import local as launch
from search.launch.local import LocalWorkers, WorkerPlan
from search.ledger.budget import count_budget, is_open
from search.ledger.leases import open_ledger
from search.ledger.registry import list_workers
from search.storage.connect import open_storage

ROOT = Path(__file__).parents[2]

Kind = Literal["ours", "optuna"]
"""Whose worker: this project's, or plain Optuna's."""


def start_sleeper(kind: Kind, url: URL, name: str, folder: Path, index: int, *words: str) -> "subprocess.Popen[bytes]":
    """Start one worker; its events and its output go to files in the folder, named by its index."""
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


def read_events(folder: Path, kind: Kind) -> list[list[dict[str, Any]]]:
    """What the workers noted, a list for each."""
    return [
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        for path in sorted(folder.glob(f"{kind}-*.jsonl"))
    ]


def count_words(folder: Path, words: str) -> int:
    """How often the workers printed or noted something."""
    return sum(path.read_text(errors="replace").count(words) for path in folder.glob("*.[jl]*"))


@contextmanager
def our_workers(url: URL, name: str, folder: Path, workers: int, *words: str) -> Iterator[Callable[[], bool]]:
    """Our launcher over sleeping workers; yields a function to call again until it says that all is done."""
    started = iter(range(100_000))

    def spawn(plan: WorkerPlan, number: int) -> "subprocess.Popen[bytes]":
        del plan
        more = ("--number", str(number), "--launcher", this_process().key, *words)
        return start_sleeper("ours", url, name, folder, next(started), *more)

    storage = open_storage(url)
    ledger, _ = open_ledger(storage, name, sleeping_study(1, 1).workers)
    plain_spawn, launch.spawn_worker = launch.spawn_worker, spawn
    (folder / "worker-0.log").touch()
    local = LocalWorkers(ledger, WorkerPlan(("cpu",) * workers, 1, (), url, folder), lambda _: None)

    def tend() -> bool:
        count = count_budget(ledger)
        local.maintain(list_workers(ledger), count.done, count.remaining)
        return not is_open(ledger)

    try:
        yield tend
    finally:
        local.stop()
        launch.spawn_worker = plain_spawn
        storage.engine.dispose()


def living_sleepers(name: str) -> list[int]:
    """Process ids of a study's living workers."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"benchmarks.service.sleeper" in words and name.encode() in words:
                pids.append(int(folder.name))
    return pids


class OptunaWorkers:
    """Plain Optuna's workers; one that ends before the budget is done can be replaced."""

    def __init__(self, url: URL, name: str, folder: Path, workers: int, trials: int, *words: str) -> None:
        def start(index: int) -> "subprocess.Popen[bytes]":
            return start_sleeper("optuna", url, name, folder, index, "--trials", str(trials), *words)

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
