"""What a search gives on this machine, without what differs from one run to the next: times, folders, commits.

    PYTHONPATH=tests python -m support.golden     writes tests/golden/<this machine>.json

Run with CIFAR-10 in ``$SEARCH_DATA_DIR``. A change of numerics is recorded anew, on purpose, by this command.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna

from benchmarks.service.growth import definition, grow
from search.config.study_file import PrunerConfig, SamplerConfig
from search.storage.url import storage_url

FOLDER = Path(__file__).resolve().parents[1] / "golden"

SEEDS = (0, 1)

DIGITS = """
trials = 4

[trial]
epochs = 3
train_images = 400

[space]
blocks = { low = 1, high = 3 }
convs = { low = 1, high = 3 }
width = { low = 8, high = 16, step = 8 }
width_growth = { low = 1.0, high = 2.0, step = 0.5 }
lr = { low = 0.01, high = 0.2, log = true }
augment = { low = 0.0, high = 0.2, step = 0.1 }
pools = 1
batch_size = 32

[sampler]
startup_trials = 2

[pruner]
kind = "percentile"
percentile = 50
startup_trials = 2
warmup_epochs = 1

[confirm]
configurations = 2
seeds = 2

[retrain]
epochs = 2
max_epochs = 4
seeds = 2

[[start]]
blocks = 2
lr = 0.1
"""

CIFAR10 = """
trials = 2

[trial]
epochs = 2
train_images = 2000

[space]
blocks = { low = 3, high = 4 }
convs = { low = 2, high = 3 }
width = { low = 16, high = 24, step = 8 }
width_growth = { low = 1.0, high = 1.5, step = 0.5 }
lr = { low = 0.02, high = 0.3, log = true }
augment = { low = 0.2, high = 0.6, step = 0.05 }
activation = "gelu"
pools = 3

[confirm]
configurations = 2
seeds = 1

[retrain]
epochs = 1
max_epochs = 1
seeds = 1
"""

STUDIES = {"digits": DIGITS, "cifar10": CIFAR10}

PASSING = frozenset({
    "age", "attempt_began", "commit", "cpu_hours", "device", "device_hours", "device_seconds", "eta_seconds", "folder",
    "forecast", "images_per_second", "latency", "overhead", "overhead_seconds", "peak_memory_bytes", "published",
    "definition", "environment", "read_at", "retrain_progress", "seconds", "start_up", "storage", "trial_seconds",
    "when", "worker",
})  # fmt: skip
"""Keys whose values differ from run to run, or from machine to machine."""


MOST_TEXT = 600
"""Longer lists, such as the losses of all steps, are kept as a digest."""


def machine() -> str:
    """Names what the last bit of a training depends on: processor, torch, and a compiler for the compiled kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    processor = sorted({line for line in lines if line.startswith(("model name", "cpu family", "model\t", "flags"))})
    parts = (*processor, metadata.version("torch"), metadata.version("optuna"), platform.python_version())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def lasting(value: Any) -> Any:
    """A JSON value without what passes."""
    if isinstance(value, Mapping):
        return {key: lasting(part) for key, part in value.items() if key not in PASSING}
    if not isinstance(value, list | tuple):
        return value
    kept = [lasting(part) for part in value]
    return kept if len(json.dumps(kept)) < MOST_TEXT else digest(json.dumps(kept, sort_keys=True).encode())


def digest(content: bytes) -> str:
    """SHA-256, as text."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def search(dataset: str, seed: int, folder: Path) -> dict[str, Any]:
    """Run one study with its finale by the command line, one worker on one thread of the CPU, and read what it left."""
    folder.mkdir(parents=True)
    (folder / "study.toml").write_text(STUDIES[dataset])
    database = f"sqlite:///{folder / 'search.db'}"
    words = ["--study", "study.toml", "--name", dataset, "--seed", str(seed), "--dataset", dataset, "--device", "cpu"]
    command = [sys.executable, "-m", "search", "run", *words, "--workers", "1", "--storage", database]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("SEARCH_STORAGE", None)
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=280)
    out = folder / "studies" / dataset
    return {
        "summary": lasting(json.loads((out / "summary.json").read_text())),
        "weights": digest((out / "best" / "model.safetensors").read_bytes()),
        "metrics": lasting(json.loads((out / "best" / "metrics.json").read_text())),
        "model": lasting(json.loads((out / "best" / "config.json").read_text())),
        "studies": {name: _study(name, database) for name in (dataset, f"{dataset}.confirm")},
    }


def _study(name: str, database: str) -> dict[str, Any]:
    """Everything lasting that a study holds, by plain Optuna."""
    storage = optuna.storages.RDBStorage(database)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
        trials = [
            {
                "number": trial.number,
                "state": trial.state.name,
                "values": trial.values,
                "params": trial.params,
                "reports": {str(step): value for step, value in trial.intermediate_values.items()},
                "attributes": lasting(trial.user_attrs),
            }
            for trial in study.trials
        ]
        return {"attributes": lasting(study.user_attrs), "trials": trials}
    finally:
        storage.remove_session()
        storage.engine.dispose()


def statements(folder: Path) -> list[list[int]]:
    """Statements and transactions of each of twelve trials, on SQLite, without training."""
    config = definition(12).model_copy(
        update={
            "sampler": SamplerConfig(startup_trials=2),
            "pruner": PrunerConfig(percentile=99.9, startup_trials=2, warmup_epochs=1),
        }
    )
    marks = grow(storage_url(f"sqlite:///{folder / 'growth.db'}"), folder, config).marks
    return [
        [after.statements - before.statements, after.transactions - before.transactions]
        for before, after in pairwise(marks)
    ]


def recorded() -> dict[str, Any] | None:
    """What was recorded on a machine like this one; None where nothing was."""
    path = FOLDER / f"{machine()}.json"
    return json.loads(path.read_text()) if path.exists() else None


def any_recorded() -> dict[str, Any]:
    """What was recorded on any machine."""
    content: dict[str, Any] = json.loads(min(FOLDER.glob("*.json")).read_text())
    return content


def record() -> None:
    """Run all studies and keep what they gave."""
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            f"{dataset}-{seed}": search(dataset, seed, Path(scratch) / f"{dataset}-{seed}")
            for dataset in STUDIES
            for seed in SEEDS
        }
        found["statements"] = statements(Path(scratch))
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{machine()}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    record()
