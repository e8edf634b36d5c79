"""Best accuracy against wall time for different numbers of workers: what parallel searching costs in knowledge.

    python -m benchmarks.searching.parallel [--workers 1 4 16 64] [--seeds 30] [--trainings 100] [--methods default GP]
        [--curves FILE] [--json FILE] [--plot FILE]

The same simulated clock and surrogate as `benchmarks.searching.replay`. Every search has the same device time, divided
among its workers, and at least `LEAST` trainings of wall time. With more workers each configuration is chosen knowing
less, since more others are still under way. Speed-up: one worker's wall time to the last target over that of many.
Efficiency: speed-up by worker.
"""

import math
import statistics
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.searching.clock import simulate
from benchmarks.searching.command import checked_methods, command_line, open_world, run_all, write_json
from benchmarks.searching.methods import DEFAULT, methods
from benchmarks.searching.replay_page import cell, finite
from benchmarks.searching.simulated import OVERHEAD, World, handed_over, reached, world_of_process

LEAST = 4.0
"""Whole trainings of wall time that a search has at least."""
GRID = 24
"""Number of times at which the best accuracy is shown, evenly spread on a logarithmic scale from half a training on."""

Steps = Sequence[tuple[float, float]]
"""When a search's choice changed, in whole trainings of wall time, and the accuracy of the new one over seeds."""


def length(trainings: float, workers: int) -> float:
    """Wall time of a search, in whole trainings."""
    return max(LEAST, trainings / workers)


def run_one(path: Path, key: tuple[str, int], seed: int, trainings: float) -> Steps:
    """One search by a method and a number of workers, in a process of its own."""
    name, workers = key
    world = world_of_process(path)
    method = methods(world.config, world.surrogate.epochs)[name]
    seconds = length(trainings, workers) * world.training
    ended = simulate(world.surrogate, world.config.space, method, seed, seconds, workers, OVERHEAD)
    return [(when / world.training, accuracy) for when, accuracy in handed_over(world, ended)]


def at(steps: Steps, wall: float) -> float:
    """The accuracy of what a search would hand over at that time; NaN before its first trial's end."""
    return next((accuracy for when, accuracy in reversed(steps) if when <= wall), math.nan)


def rows_of(world: World, searches: dict[tuple[str, int], list[Steps]], trainings: float) -> list[dict[str, Any]]:
    """A row for each method and number of workers, methods in order, fewest workers first."""
    rows: list[dict[str, Any]] = []
    single: dict[str, float] = {}
    for (name, workers), runs in searches.items():
        times = [reached(steps, world.last_target) or math.inf for steps in runs]
        median = statistics.median(times)
        if workers == 1:
            single[name] = median
        grid = np.geomspace(0.5, length(trainings, workers), GRID)
        curve = np.median([[at(steps, wall) for wall in grid] for steps in runs], axis=0)
        speed_up = single.get(name, math.nan) / median if math.isfinite(median) else math.nan
        rows.append({
            "method": name,
            "workers": workers,
            "seeds": len(runs),
            "wall_to_last_target": finite(round(median, 5)),
            "reached": sum(map(math.isfinite, times)) / len(runs),
            "speed_up": finite(round(speed_up, 5)),
            "efficiency": finite(round(speed_up / workers, 5)),
            "wall": [round(float(wall), 3) for wall in grid],
            "accuracy": [finite(round(value, 5)) for value in curve],
        })  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    heads = ["method", "workers", "wall time to the last target, trainings", "reached it", "speed-up", "efficiency"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        figures = [(row["wall_to_last_target"], ".1f"), (row["reached"], ".0%"), (row["speed_up"], ".1f"),
                   (row["efficiency"], ".0%")]  # fmt: skip
        lines.append([row["method"], str(row["workers"]), *(cell(value, form) for value, form in figures)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(world: World, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against wall time, a line for each number of workers, a panel for each method."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(5 * len(names) + 1, 4.5), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for row in rows:
            if row["method"] == name:
                known = [(wall, 100 * value) for wall, value in zip(row["wall"], row["accuracy"], strict=True) if value]
                workers = f"{row['workers']} worker" + "s" * (row["workers"] > 1)
                panel.step(*zip(*known, strict=True), where="post", label=workers)
        panel.axhline(100 * world.last_target, color="grey", linewidth=0.8, linestyle="--", label="last target")
        panel.set_xscale("log")
        panel.set_title(name)
        panel.set_xlabel("wall time, in whole trainings")
        panel.grid(alpha=0.25, which="both")
    panels[0].set_ylabel("accuracy of the search's choice, %, median of the seeds")
    panels[0].set_ylim(bottom=100 * (world.summit - 0.04), top=100 * world.summit)
    panels[-1].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Simulate, print, write."""
    parser = command_line("parallel", __doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--methods", nargs="+", default=[DEFAULT, "GP"])
    parser.add_argument("--trainings", type=float, default=100, help="device time of a search, in whole trainings")
    parser.add_argument("--plot", type=Path, help="a picture, .png or .svg")
    given = parser.parse_args()
    world = open_world(parser, given.curves)
    names = checked_methods(parser, world, given.methods)
    search = partial(run_one, given.curves, trainings=given.trainings)
    rows = rows_of(world, run_all(search, product(names, sorted(given.workers)), given.seeds), given.trainings)
    print(table(rows))
    report = {"trainings": given.trainings, "last_target": world.last_target, "summit": world.summit, "rows": rows}
    write_json(given.json, report)
    if given.plot:
        plot(world, rows, given.plot)


if __name__ == "__main__":
    main()
