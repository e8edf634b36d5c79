"""The picture of `benchmarks.replay`: how far the configuration found so far is from the best, by device time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DEFAULT = "default"
BANDED = (DEFAULT, "random")
"""Methods whose 95 % intervals are drawn, too."""
SHADES = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2", "#eeca3b", "#ff9da6", "#bab0ac", "#6b6ecf")
STYLES = ("-", "--", ":")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the file that `benchmarks.replay` writes.

    Args:
        result: of `benchmarks.replay.told`.
        path: of the picture; its suffix says which form.
    """
    rows = {DEFAULT: result["default"], **result["others"]}
    known = {name: row for name, row in rows.items() if row is not None}
    last = max((int(place) for row in known.values() for place in row["regret"]), default=1)
    order = sorted(known, key=lambda name: known[name]["regret"][str(last)]["median"])
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.add_subplot()
    others = [name for name in order if name != DEFAULT]
    for name in order:
        told = known[name]["regret"]
        places = [int(place) for place in told]
        values = [100 * told[place]["median"] for place in told]
        if name == DEFAULT:
            color, style, width = "black", "-", 2.8
        else:
            place = others.index(name)
            color, style, width = SHADES[place % len(SHADES)], STYLES[place // len(SHADES) % len(STYLES)], 1.2
        axes.plot(places, values, style, color=color, linewidth=width, label=name)
        if name in BANDED:
            low, high = ([100 * told[place][key] for place in told] for key in ("low", "high"))
            axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    axes.axhline(100 * (result["best"] - result["target"]), color="grey", linewidth=0.8, label="target")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xlabel("device time, in whole trainings of a configuration drawn at random")
    axes.set_ylabel("regret: points below the table's best configuration, median of the seeds")
    axes.grid(alpha=0.25, which="both")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
