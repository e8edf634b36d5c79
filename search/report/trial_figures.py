"""Figures of trials that only the report has: no titles, few enough points for a page of 2,000 trials."""

import html
import math
from collections.abc import Sequence
from datetime import datetime

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from search.analysis.outcomes import Outcome, number, outcome, validation_curve
from search.analysis.pruning_audit import RankCorrelation
from search.attributes import START, WORKER, WOULD_STOP
from search.config.objective import score
from search.console.format import percent
from search.report.drawing import BEST, COLOURS, LINE_COLOURS, thinned

MOST_DOTS = 2_000
MOST_CURVES = 150
MOST_WORKERS = 40
"""What a figure shows at most: more could not be told apart."""


def history_figure(trials: Sequence[FrozenTrial]) -> go.Figure:
    """Accuracy of trials in their order, and the best so far."""
    figure = go.Figure()
    size = 7 if len(trials) < 500 else 4
    groups: dict[str, tuple[str, str, list[tuple[int, float]]]] = {
        "pruned": (COLOURS["pruned"], "x-thin", []),
        "complete": (COLOURS["complete"], "circle", []),
        "audited": (LINE_COLOURS[4], "circle-open", []),
        "start": (LINE_COLOURS[0], "star", []),
    }
    best: list[tuple[int, float]] = []
    for trial in trials:
        curve = validation_curve(trial)
        if trial.state == TrialState.COMPLETE and (value := number(score(trial))) is not None:
            name = "complete" if WOULD_STOP not in trial.user_attrs else "audited"
            name = "start" if START in trial.user_attrs else name
            if not best or value > best[-1][1]:
                best.append((trial.number, value))
        elif outcome(trial) == "pruned" and curve:
            name, value = "pruned", list(curve.values())[-1]
        else:
            continue
        groups[name][2].append((trial.number, value))
    for name, (colour, symbol, points) in groups.items():
        if points:
            drawn = thinned(points, MOST_DOTS)
            figure.add_scatter(
                x=[x for x, _ in drawn],
                y=[round(y, 5) for _, y in drawn],
                name=name,
                mode="markers",
                cliponaxis=False,
                marker={
                    "color": colour,
                    "symbol": symbol,
                    "size": size,
                    "opacity": 0.8,
                    "line": {"color": colour, "width": 1.5},
                },
                hovertemplate="trial %{x}: %{y:.2%}<extra></extra>",
            )
    if best:
        last = max(trial.number for trial in trials)
        figure.add_scatter(
            x=[*(x for x, _ in best), last],
            y=[*(round(y, 5) for _, y in best), round(best[-1][1], 5)],
            name="best so far",
            mode="lines",
            line={"shape": "hv", "color": BEST, "width": 1.8},
            hoverinfo="skip",
        )
    figure.update_xaxes(title_text="trial", rangemode="tozero")
    figure.update_yaxes(title_text="validation accuracy", tickformat=".0%")
    return figure


def learning_curves_figure(trials: Sequence[FrozenTrial]) -> go.Figure:
    """Validation accuracy by epoch of finished trials, by what became of them; of many the best and some others."""
    groups: dict[str, tuple[str, list[FrozenTrial]]] = {
        "pruned": (COLOURS["pruned"], []),
        "complete": (COLOURS["complete"], []),
        "audited": (LINE_COLOURS[4], []),
    }
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            groups["complete" if WOULD_STOP not in trial.user_attrs else "audited"][1].append(trial)
        elif outcome(trial) == "pruned":
            groups["pruned"][1].append(trial)
    figure = go.Figure()
    for name, (colour, members) in groups.items():
        ranked = sorted(members, key=lambda trial: -(number(score(trial)) or 0.0))
        drawn = [*ranked[: MOST_CURVES // 3], *thinned(ranked[MOST_CURVES // 3 :], MOST_CURVES * 2 // 3)]
        curves = [(trial.number, thinned(list(validation_curve(trial).items()), 200)) for trial in drawn]
        points = [(epoch, y, n) for n, curve in curves for epoch, y in (*curve, (None, None)) if curve]
        if points:
            figure.add_scatter(
                x=[epoch for epoch, _, _ in points],
                y=[None if y is None else round(y, 4) for _, y, _ in points],
                customdata=[n for _, _, n in points],
                name=name,
                mode="lines+markers",
                marker={"size": 3},
                line={"color": colour, "width": 1.2},
                opacity=0.7,
                hovertemplate="trial %{customdata}: %{y:.2%} after epoch %{x}<extra></extra>",
            )
    longest = max(
        (epoch for _, members in groups.values() for t in members for epoch in validation_curve(t)), default=1
    )
    figure.update_xaxes(title_text="epoch", dtick=max(1, math.ceil(longest / 8)), tick0=0)
    figure.update_yaxes(title_text="validation accuracy", tickformat=".0%")
    return figure


def timeline_figure(trials: Sequence[FrozenTrial], until: datetime) -> go.Figure:
    """Which worker had which trial when, in hours since the first one began; trials under way last ``until`` now."""
    begun = [trial for trial in trials if trial.datetime_start is not None]
    first = min((t.datetime_start for t in begun if t.datetime_start), default=until)
    workers = list(dict.fromkeys(worker_of(trial) for trial in begun))[:MOST_WORKERS]
    bars: dict[Outcome, list[tuple[float, float, str, str]]] = {name: [] for name in COLOURS}
    for trial in begun:
        if trial.datetime_start is None or worker_of(trial) not in workers:
            continue
        start = (trial.datetime_start - first).total_seconds()
        end = ((trial.datetime_complete or until) - first).total_seconds()
        kind = outcome(trial)
        accuracy = number(score(trial)) if trial.state == TrialState.COMPLETE else None
        text = f"trial {trial.number}, {kind}" + (f", {percent(accuracy)}" if accuracy is not None else "")
        bars[kind].append((start, max(0.0, end - start), worker_of(trial), text))
    last = max((start + length for members in bars.values() for start, length, _, _ in members), default=0.0)
    unit, per = ("hours", 3600) if last > 2 * 3600 else ("minutes", 60)
    figure = go.Figure()
    for kind, members in bars.items():
        if members:
            figure.add_bar(
                base=[round(start / per, 4) for start, _, _, _ in members],
                x=[round(length / per, 4) for _, length, _, _ in members],
                y=[_shortened(worker) for _, _, worker, _ in members],
                text=[text for _, _, _, text in members],
                textposition="none",
                name=kind,
                orientation="h",
                marker={
                    "color": COLOURS[kind],
                    "line": {"color": "rgba(255,255,255,0.7)", "width": 0.5 if len(begun) < 500 else 0},
                },
                hovertemplate=f"%{{text}}: %{{x:.2f}} {unit}<extra>%{{y}}</extra>",
            )
    figure.update_xaxes(title_text=f"{unit} since the first trial", rangemode="tozero")
    # One row each, in the order in which they came.
    names = [_shortened(worker) for worker in workers]
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=names, autorange="reversed", automargin=True
    )
    figure.update_layout(barmode="overlay", bargap=0.25)
    return figure


def worker_of(trial: FrozenTrial) -> str:
    """The worker that had a trial."""
    return str(trial.user_attrs.get(WORKER, "unknown"))


def _shortened(worker: str, most: int = 20) -> str:
    """A worker's name as a label; its end distinguishes it from its neighbours'."""
    return html.escape(worker if len(worker) <= most else f"…{worker[1 - most :]}")


def correlation_figure(rows: Sequence[RankCorrelation]) -> go.Figure:
    """Rank correlation between the accuracy after each epoch and the final one."""
    known = [(row.epoch, row.spearman) for row in rows if row.spearman is not None]
    figure = go.Figure()
    figure.add_scatter(
        x=[epoch for epoch, _ in known],
        y=[round(spearman, 4) for _, spearman in known],
        mode="lines+markers",
        line={"color": LINE_COLOURS[0], "width": 1.8},
        hovertemplate="after epoch %{x}: %{y:.2f}<extra></extra>",
    )
    lowest = min((spearman for _, spearman in known), default=0.0)
    figure.update_xaxes(title_text="epoch", tickformat="d", dtick=1 if len(known) <= 15 else None)
    figure.update_yaxes(title_text="rank correlation with the end", range=[min(0.0, lowest) - 0.05, 1.05])
    return figure
