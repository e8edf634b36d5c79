"""What all figures share: colours, titles, and a bound on their points.

A figure's JSON is in the database and every open browser reads it every few seconds, so figures are kept small: no
template, rounded numbers, few points.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import plotly.graph_objects as go

from search.analysis.outcomes import Outcome

T = TypeVar("T")

COLOURS: Mapping[Outcome, str] = {
    "complete": "#2e7d32",
    "pruned": "#f9a825",
    "infeasible": "#6a1b9a",
    "failed attempt": "#c62828",
    "running": "#1565c0",
    "waiting": "#b0bec5",
}

LINE_COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#78716c", "#ec4899", "#84cc16")
"""For lines side by side, readable on white and on black."""

FADED, GOOD, BEST = "#94a3b8", "#f59e0b", "#dc2626"
"""From the worst to the best, readable on white and on black."""

_MARGIN = {"l": 60, "r": 30, "t": 50, "b": 50}


def titled(title: str) -> go.Figure:
    """An empty figure with a title."""
    return with_title(go.Figure(), title)


def with_title(figure: go.Figure, title: str) -> go.Figure:
    """A figure with a title clear of plotly's buttons, without the default template: 6 kB in every figure's JSON."""
    return figure.update_layout(title={"text": title, "x": 0, "xanchor": "left"}, template=None, margin=_MARGIN)


def thinned(items: Sequence[T], most: int) -> list[T]:
    """At most ``most``, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
