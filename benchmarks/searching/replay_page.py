"""What `benchmarks.searching.replay` found, as a file, a table and a picture."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.searching.methods import DEFAULT, RANDOM
from benchmarks.searching.simulated import Search, World

PLACES = (3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 100)
"""Whole trainings after which the regret is shown."""
COLUMNS = (5, 10, 20, 40, 100)
"""Those of them that the printed table has as columns."""
BANDED = (DEFAULT, RANDOM)
"""Methods whose 95 % intervals are drawn, too."""
SHADES = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2", "#eeca3b", "#ff9da6", "#bab0ac", "#6b6ecf")
STYLES = ("-", "--", ":")


def comparison(world: World, searches: Mapping[str, Sequence[Search]]) -> dict[str, Any]:
    """The comparison as the JSON file has it."""

    def row(name: str) -> dict[str, Any]:
        runs, random = searches[name], searches[RANDOM]
        ratio, low, high = _ratio(_times(runs), _times(random))
        last, last_low, last_high = _ratio(_last_times(runs), _last_times(random))
        would = sum(run.would for run in runs)
        foretold = sum(len(run.foretold) for run in runs)
        false = sum(run.false for run in runs)
        interval = stats.binomtest(false, would).proportion_ci(0.95, method="exact") if would else None
        return {
            "time_to_target_vs_random": ratio,
            "time_to_target_interval": [low, high],
            "time_to_target_trainings": finite(statistics.median(_times(runs)) / world.training),
            "reached": sum(run.reached is not None for run in runs) / len(runs),
            "time_to_last_target_vs_random": last,
            "time_to_last_target_interval": [last_low, last_high],
            "time_to_last_target_trainings": finite(statistics.median(_last_times(runs)) / world.training),
            "reached_last": sum(run.reached_last is not None for run in runs) / len(runs),
            "false_prune_rate": false / would if would else None,
            "interval": interval and [float(interval.low), float(interval.high)],
            "pruned_share": sum(run.pruned for run in runs) / sum(run.trials for run in runs),
            "regret": {
                str(place): _median([run.regret[place - 1] for run in runs])
                for place in PLACES
                if place <= len(runs[0].regret)
            },
            "forecast_covered": sum(map(sum, (run.foretold for run in runs))) / foretold if foretold else None,
            "forecasts": foretold,
            "seconds_a_trial": sum(run.thought for run in runs) / sum(run.trials for run in runs),
            "seeds": len(runs),
        }

    return {
        "target": world.target,
        "best": world.best,
        "last_target": world.last_target,
        "summit": world.summit,
        "surrogate": asdict(world.surrogate.error),
        "training_seconds": world.training,
        "default": row(DEFAULT) if DEFAULT in searches else None,
        "others": {name: row(name) for name in searches if name != DEFAULT},
    }


def _times(searches: Sequence[Search]) -> list[float]:
    return [math.inf if run.reached is None else run.reached for run in searches]


def _last_times(searches: Sequence[Search]) -> list[float]:
    return [math.inf if run.reached_last is None else run.reached_last for run in searches]


def _ratio(own: Sequence[float], other: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Ratio of medians with its 95 % interval (bootstrap over seeds); None: never reached."""
    rng = np.random.default_rng(0)
    pairs = np.array([own, other])
    drawn = [np.median(pairs[:, rng.integers(pairs.shape[1], size=pairs.shape[1])], axis=1) for _ in range(2000)]
    ratios = np.sort([own / others if math.isfinite(others) else math.nan for own, others in drawn])
    whole = statistics.median(own) / statistics.median(other)
    return finite(whole), finite(ratios[50]), finite(ratios[-51])


def _median(values: Sequence[float]) -> dict[str, float]:
    """A median with its 95 % interval (bootstrap over seeds)."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    interval = {"median": statistics.median(values), "low": float(low), "high": float(high)}
    return {key: round(value, 5) for key, value in interval.items()}


def table(result: Mapping[str, Any]) -> str:
    """The comparison in Markdown; the methods that reach the target soonest come first."""
    known = _rows(result)
    places = [str(place) for place in COLUMNS if str(place) in next(iter(known.values()))["regret"]]
    heads = [
        "method", "trainings to the target", "of random's time (95 %)", "... to the last one", "reached it",
        *(f"regret at {place}" for place in places), "stopped", "of these wrongly (95 %)", "s a trial",
    ]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]

    def order(name: str) -> tuple[float, float]:
        row = known[name]
        whole = row["time_to_last_target_trainings"]
        return (math.inf if whole is None else whole, row["regret"][places[-1]]["median"])

    for name in sorted(known, key=order):
        row = known[name]
        low, high = row["time_to_target_interval"]
        wrong = "" if row["interval"] is None else f" ({row['interval'][0]:.1%} to {row['interval'][1]:.1%})"
        lines.append([
            f"**{name}**" if name == DEFAULT else name,
            cell(row["time_to_target_trainings"], ".1f"),
            f"{cell(row['time_to_target_vs_random'], '.3f')} ({cell(low, '.3f')} to {cell(high, '.3f')})",
            cell(row["time_to_last_target_trainings"], ".1f"),
            f"{row['reached_last']:.0%}",
            *(f"{100 * row['regret'][place]['median']:.2f}" for place in places),
            f"{row['pruned_share']:.0%}",
            f"{cell(row['false_prune_rate'], '.1%')}{wrong}",
            f"{row['seconds_a_trial']:.3f}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows(result: Mapping[str, Any]) -> dict[str, Any]:
    """Every method that was compared, by name."""
    rows = {DEFAULT: result["default"], **result["others"]}
    return {name: row for name, row in rows.items() if row is not None}


def cell(value: float | None, form: str) -> str:
    """A figure of a table; None is a dash."""
    return "-" if value is None else format(value, form)


def finite(value: float) -> float | None:
    """As JSON can have it: None for what is not finite."""
    return float(value) if math.isfinite(value) else None


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the file that `benchmarks.searching.replay` writes.

    Args:
        result: of `comparison`.
        path: of the picture; its suffix says which form.
    """
    known = _rows(result)
    last = max((int(place) for row in known.values() for place in row["regret"]), default=1)
    order = sorted(known, key=lambda name: known[name]["regret"][str(last)]["median"])
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.add_subplot()
    others = [name for name in order if name != DEFAULT]
    for name in order:
        regret = known[name]["regret"]
        places = [int(place) for place in regret]
        values = [100 * regret[place]["median"] for place in regret]
        if name == DEFAULT:
            color, style, width = "black", "-", 2.8
        else:
            index = others.index(name)
            color, style, width = SHADES[index % len(SHADES)], STYLES[index // len(SHADES) % len(STYLES)], 1.2
        axes.plot(places, values, style, color=color, linewidth=width, label=name)
        if name in BANDED:
            low, high = ([100 * regret[place][key] for place in regret] for key in ("low", "high"))
            axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    for name, style in (("target", "--"), ("last_target", "-")):
        label = name.replace("_", " ")
        axes.axhline(100 * (result["summit"] - result[name]), color="grey", linewidth=0.8, linestyle=style, label=label)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xlabel("device time, in whole trainings of a configuration drawn at random")
    axes.set_ylabel("regret: points below the space's best configuration, median of the seeds")
    axes.grid(alpha=0.25, which="both")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
