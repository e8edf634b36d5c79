"""The shape of JSON: keys in their order, nesting, and the type of every value."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from support.studies import SMALL_TRIALS

OPEN = frozenset({"environment", "device_seconds"})
"""Keys whose mappings have other keys on other machines."""

STUDY = f"""
trials = 16

{SMALL_TRIALS}
[pruner]
kind = "none"

[confirm]
configurations = 2
seeds = 2

[retrain]
epochs = 2
max_epochs = 2
seeds = 2

[[start]]
blocks = 2
lr = 0.1
"""


def shape(value: Any) -> Any:
    """A JSON value with types in the place of values; a list as the different shapes in it."""
    if isinstance(value, dict):
        return {key: "mapping" if key in OPEN else shape(part) for key, part in value.items()}
    if isinstance(value, list):
        shapes: list[Any] = []
        for part in map(shape, value):
            if part not in shapes:
                shapes.append(part)
        return shapes
    return "null" if value is None else type(value).__name__


def take_snapshots(call: Callable[..., str], home: Path) -> dict[str, Any]:
    """Run two small studies in a folder, with ``python -m search``, and look at each before its finale and after it.

    Args:
        call: runs the command with these words and returns what it printed.
        home: the current folder.
    """
    (home / "shapes.toml").write_text(STUDY)
    snapshots: dict[str, Any] = {}
    two = ("--objective", "accuracy,latency", "--trials", "4", "--max-params", "100000")
    for name, options in (("plain", ()), ("two-objectives", two)):
        words = ("run", "--study", "shapes.toml", "--name", name, "--dataset", "digits", "--device", "cpu", *options)
        call(*words, "--workers", "1", "--no-finale")
        snapshots[f"{name}, status before the finale"] = json.loads(_status(call, name))
        call("run", "--name", name, "--device", "cpu", "--workers", "1")
        summary = home / "studies" / name / "summary.json"
        snapshots[f"{name}, summary after the finale"] = json.loads(summary.read_text())
    study = optuna.load_study(study_name="plain", storage="sqlite:///studies/search.db")
    study.ask().report(0.25, 1)
    _revive_workers(home / "studies" / "search.db")
    snapshots["plain, status with workers and logs"] = json.loads(_status(call, "plain", "--logs"))
    return {title: shape(content) for title, content in snapshots.items()}


def _status(call: Callable[..., str], name: str, *options: str) -> str:
    return call("status", "--name", name, "--format", "json", *options)


def _revive_workers(database: Path) -> None:
    """Make it look as if every worker that has left were in the midst of a trial."""
    progress = {"trial": 16, "epoch": 1, "epochs": 2, "accuracy": 0.25, "images_per_second": 1000.0}
    connection = sqlite3.connect(database)
    connection.execute(
        "UPDATE search_workers SET left = NULL, farewell = NULL, slot = 0, start_up = 1.5, progress = ?, "
        "heartbeat = (julianday('now') - 2440587.5) * 86400.0",
        (json.dumps(progress),),
    )
    connection.execute("UPDATE search_logs SET lines = 'first' || char(10) || 'last', place = 'worker.log'")
    connection.commit()
    connection.close()
