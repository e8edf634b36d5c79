"""What a trial costs besides its training, from the first one to the last of a long study.

    python -m benchmarks.service.growth [--trials 2000] [--storage sqlite|postgres|both] [--json FILE]

One worker (`search.worker.loop.run_worker`, in this process) runs a study of N trials with its real trial runner, the
sampler and the percentile pruner of the shipped studies. Only the training is left out: an epoch takes no time and
reports a number that its learning rate decides. What is left is what a trial costs around its training: lease,
sampling, building the network, storage, checkpoints. For every bucket of trials:

rest        ms a trial, in all but the next two
sampler     ms a trial in the sampler, without the reading of trials from the database
pruner      the same of its pruner
statements  SQL statements a trial, and the transactions that hold them
memory      resident set of the process at the bucket's end
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import sqlalchemy as sa
import torch
from sqlalchemy.engine import URL

import search.worker.trial
from benchmarks.service.record import PACKAGES, report_head, write_report
from benchmarks.service.studies import create_study
from data.split import Split
from model.config import FitConfig
from model.fit import FitState
from model.result import EpochResult
from search.artifacts.mirror import Mirror
from search.config.study_file import StudyConfig, parse_study
from search.ledger.leases import Ledger
from search.samplers.gp import GaussianSampler
from search.storage.local_postgres import local_postgres
from search.storage.rdb import RetryingStorage
from search.storage.url import storage_url
from search.study import DatasetRecord
from search.worker.loop import run_worker
from search.worker.runner import WorkerOptions
from search.worker.stop import StopRequest
from search.worker.torch_runner import TorchRunner

EPOCHS = 4


@dataclass(frozen=True)
class Mark:
    """How far the counters were when a trial had ended.

    Attributes:
        seconds: since the worker began.
        sampler, pruner: seconds of it in samplers and in the pruner.
        statements, transactions: on the database, by the thread that trains.
        resident: bytes of the process.
    """

    seconds: float
    sampler: float
    pruner: float
    statements: int
    transactions: int
    resident: int


class Meter:
    """Counts what the thread that made it does in databases, in samplers and in the pruner."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self.texts: list[str] = []
        """The statements since the last mark."""
        self.last: list[str] = []
        """Those of the last trial that has ended."""
        self._thread = threading.get_ident()
        self._began = time.perf_counter()
        self._spent = {"sampler": 0.0, "pruner": 0.0}
        self._inside: str | None = None
        self._statements = self._transactions = 0

    def mark(self) -> None:
        """A trial has ended."""
        seconds = time.perf_counter() - self._began
        sampler, pruner = self._spent["sampler"], self._spent["pruner"]
        self.marks.append(Mark(seconds, sampler, pruner, self._statements, self._transactions, resident()))
        self.last, self.texts = self.texts, []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count while the context lasts."""
        hooks: list[tuple[str, Callable[..., None]]] = [
            ("before_cursor_execute", self._executed),
            ("commit", self._committed),
        ]
        for name, hook in hooks:
            sa.event.listen(sa.Engine, name, hook)
        try:
            with ExitStack() as patches:
                methods = ("infer_relative_search_space", "sample_relative", "sample_independent")
                for sampler, method in product((optuna.samplers.TPESampler, GaussianSampler), methods):
                    self._time(patches, sampler, method, "sampler")
                self._time(patches, optuna.pruners.PercentilePruner, "prune", "pruner")
                self._time(patches, RetryingStorage, "_get_trials", None)
                yield
        finally:
            for name, hook in hooks:
                sa.event.remove(sa.Engine, name, hook)

    def _executed(self, _: Any, __: Any, text: str, *___: Any) -> None:
        if threading.get_ident() == self._thread and not text.startswith("BEGIN"):
            self._statements += 1
            self.texts.append(text)

    def _committed(self, _: Any) -> None:
        if threading.get_ident() == self._thread:
            self._transactions += 1
            self.texts.append("COMMIT")

    def _time(self, patches: ExitStack, owner: type, name: str, whose: str | None) -> None:
        """Count the time spent in a method for ``whose``; None: for none, even if a counted method calls it."""
        plain = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self._inside
            if before == whose or threading.get_ident() != self._thread:
                return plain(*args, **kwargs)
            began, self._inside = time.perf_counter(), whose
            try:
                return plain(*args, **kwargs)
            finally:
                self._inside, seconds = before, time.perf_counter() - began
                if before is not None:
                    self._spent[before] -= seconds
                if whose is not None:
                    self._spent[whose] += seconds

        patches.enter_context(patch.object(owner, name, timed))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def definition(trials: int) -> StudyConfig:
    """A study of small networks, sampled and pruned as the shipped ones are."""
    table = {
        "trials": trials,
        "trial": {"epochs": EPOCHS},
        "space": {
            "blocks": {"low": 3, "high": 6},
            "convs": {"low": 1, "high": 3},
            "width": {"low": 8, "high": 16, "step": 8},
            "width_growth": {"low": 1.25, "high": 2.0, "step": 0.25},
            "lr": {"low": 0.05, "high": 1.0, "log": True},
            "augment": {"low": 0.2, "high": 0.6, "step": 0.05},
        },
        "retrain": {"epochs": 1},
    }
    return parse_study(table, "benchmarks/service/growth.py")


def untrained(_: object, __: object, config: FitConfig, *, state: FitState) -> Iterator[EpochResult]:
    """Instead of `model.fit.fit`: epochs that take no time."""
    for epoch in range(state.epoch + 1, config.epochs + 1):
        accuracy = config.lr / (1 + config.lr) * (1 - 0.5**epoch)
        state.epoch = epoch
        yield EpochResult(epoch, 1.0, accuracy, 1.0, accuracy, 1000.0, config.lr, 0.0)


def blank_split() -> Split:
    """Ten black images."""
    images, labels = torch.zeros(10, 3, 32, 32, dtype=torch.uint8), torch.arange(10)
    return Split(images, labels, images, labels, tuple("0123456789"), False, "blank")


def grow(url: URL, folder: Path, config: StudyConfig) -> Meter:
    """Run a new study to its end and count."""
    create_study(url, "growth", config, DatasetRecord("digits", "blank", tuple("0123456789"), 10, 10, False))
    meter = Meter()

    class MeteredRunner(TorchRunner):
        def remove_checkpoint(self, slot: int) -> None:
            super().remove_checkpoint(slot)
            meter.mark()

    def open_runner(ledger: Ledger, study: optuna.Study, id_: str, options: WorkerOptions, show: Any) -> MeteredRunner:
        del ledger, study, id_, show
        meter.mark()
        return MeteredRunner("growth:1", blank_split(), Mirror(options.out, None, print))

    options = WorkerOptions(url, "growth", "cpu", folder, folder)
    with meter.running(), patch.object(search.worker.trial, "fit", untrained):
        run_worker(options, lambda _: None, StopRequest(), open_runner)
    return meter


def buckets(marks: Sequence[Mark], size: int) -> list[dict[str, Any]]:
    """Means over ``size`` trials each."""
    rows = []
    for first in range(0, len(marks) - 1, size):
        last = min(first + size, len(marks) - 1)
        begun, ended = asdict(marks[first]), asdict(marks[last])
        each = {field.name: (ended[field.name] - begun[field.name]) / (last - first) for field in fields(Mark)}
        rows.append(
            {
                "trials": f"{first + 1}-{last}",
                "rest_ms": round(1000 * (each["seconds"] - each["sampler"] - each["pruner"]), 2),
                "sampler_ms": round(1000 * each["sampler"], 2),
                "pruner_ms": round(1000 * each["pruner"], 2),
                "statements": round(each["statements"], 2),
                "transactions": round(each["transactions"], 2),
                "resident_mb": round(ended["resident"] / 1e6, 1),
            }
        )
    return rows


def show_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows under each other."""
    print(f"\n{title}")
    print("  ".join(f"{name:>12}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value!s:>12}" for value in row.values()))


def main() -> None:
    """Grow a study on each chosen storage and print a table for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service.growth", description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--storage", choices=["sqlite", "postgres", "both"], default="sqlite")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--statements", action="store_true", help="print the last trial's statements")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    results = report_head("benchmarks.service.growth", (*PACKAGES, "torch"))
    for kind in ("sqlite", "postgres") if arguments.storage == "both" else (arguments.storage,):
        with tempfile.TemporaryDirectory(prefix="growth-") as scratch, ExitStack() as stack:
            folder = Path(scratch)
            if kind == "sqlite":
                url = storage_url(f"sqlite:///{folder / 'study.db'}")
            else:
                server = stack.enter_context(local_postgres(folder / "postgres"))
                url = server.url.set(password=server.password)
            meter = grow(url, folder / "out", definition(arguments.trials))
        rows = buckets(meter.marks, max(1, arguments.trials // 10))
        steps = [after.statements - before.statements for before, after in pairwise(meter.marks)]
        show_table(f"{kind}: {arguments.trials} trials; most statements of one trial: {max(steps)}", rows)
        if arguments.statements:
            print(*(" ".join(text.split())[:150] for text in meter.last), sep="\n")
        results[kind] = rows
        write_report(arguments.json, results)


if __name__ == "__main__":
    main()
