"""Figures that only the report has: pure functions, no titles, few enough points for a page of 2,000 trials."""

import html
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from search.analysis.outcomes import Outcome, number, outcome, validation_curve
from search.analysis.pruning_audit import RankCorrelation
from search.attributes import START, WORKER, WOULD_STOP
from search.config.objective import score
from search.console.format import percent
from search.report.study_figures import COLOURS, LINE_COLOURS, thinned

MOST_DOTS = 2_000
MOST_CURVES = 150
MOST_LINES = 300
MOST_WORKERS = 40
MOST_CLASSES = 30
MOST_TICKS = 6
"""What a figure shows at most: more could not be told apart."""

WRITTEN_CLASSES = 12
"""Classes up to which a cell of the confusion matrix has room for its number."""

FADED, GOOD, BEST = "#94a3b8", "#f59e0b", "#dc2626"
"""From the worst to the best, readable on white and on black."""


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
            kept = thinned(points, MOST_DOTS)
            figure.add_scatter(
                x=[x for x, _ in kept],
                y=[round(y, 5) for _, y in kept],
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
        kept = [*ranked[: MOST_CURVES // 3], *thinned(ranked[MOST_CURVES // 3 :], MOST_CURVES * 2 // 3)]
        curves = [(trial.number, thinned(list(validation_curve(trial).items()), 200)) for trial in kept]
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


def shares_figure(shares: Mapping[str, float]) -> go.Figure:
    """Bars of shares, in the order given."""
    figure = go.Figure()
    figure.add_bar(
        x=[round(share, 4) for share in shares.values()],
        y=list(shares),
        orientation="h",
        marker_color=LINE_COLOURS[0],
        text=[f"{share:.0%}" for share in shares.values()],
        textposition="auto",
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
    )
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    return figure


def slice_figure(complete: Sequence[FrozenTrial], name: str, form: BaseDistribution) -> go.Figure:
    """Accuracy of COMPLETE trials against one parameter."""
    members = thinned([trial for trial in complete if name in trial.params], MOST_DOTS // 4)
    figure = go.Figure()
    figure.add_scatter(
        x=[_label(trial.params[name]) if _is_choice(form) else trial.params[name] for trial in members],
        y=[round(score(trial) or 0.0, 5) for trial in members],
        customdata=[trial.number for trial in members],
        mode="markers",
        marker={
            "color": [trial.number for trial in members],
            "colorscale": [[0, "#fbbf24"], [1, "#7c3aed"]],
            "size": 7,
            "opacity": 0.8,
        },
        hovertemplate=f"trial %{{customdata}}: %{{y:.2%}}, {html.escape(name)} %{{x}}<extra></extra>",
    )
    if _is_choice(form):
        figure.update_xaxes(type="category")
    elif getattr(form, "log", False):
        figure.update_xaxes(type="log", tickvals=_decades(form), tickformat="~g")
    else:
        figure.update_xaxes(tickvals=_grid(form))
    figure.update_yaxes(tickformat=".0%", nticks=6)
    figure.update_layout(showlegend=False)
    return figure


def _decades(form: BaseDistribution) -> list[float]:
    assert isinstance(form, IntDistribution | FloatDistribution)
    low, high = math.floor(math.log10(form.low)), math.ceil(math.log10(form.high))
    digits = (1, 2, 5) if high - low <= 2 else (1,)
    return [digit * 10.0**power for power in range(low, high + 1) for digit in digits]


def _grid(form: BaseDistribution) -> list[float] | None:
    """The values of a range that has few of them."""
    assert isinstance(form, IntDistribution | FloatDistribution)
    steps = round((form.high - form.low) / form.step) if form.step else MOST_TICKS
    return [form.low + i * (form.step or 0) for i in range(steps + 1)] if steps < MOST_TICKS else None


def parallel_figure(complete: Sequence[FrozenTrial], forms: Mapping[str, BaseDistribution]) -> go.Figure:
    """A line for each COMPLETE trial through its parameters to its accuracy, coloured by rank.

    Args:
        complete: best first.
        forms: of the parameters that are drawn.
    """
    kept = thinned(complete, MOST_LINES)
    values = [score(trial) or 0.0 for trial in kept]
    low, high = min(values), max(values)
    names = [*forms, "accuracy"]
    groups = (
        ("the worse half", FADED, 0.45, 1.0, kept[math.ceil(len(kept) / 2) :]),
        ("the better half", GOOD, 0.6, 1.2, kept[math.ceil(len(kept) / 10) : math.ceil(len(kept) / 2)]),
        ("the best tenth", BEST, 0.9, 2.0, kept[: math.ceil(len(kept) / 10)]),
    )
    figure = go.Figure()
    for label, colour, opacity, width, members in groups:
        xs: list[int | None] = []
        ys: list[float | None] = []
        told: list[str] = []
        for trial in members:
            heights = [_height(form, trial.params.get(name)) for name, form in forms.items()]
            heights.append(0.5 if high == low else ((score(trial) or 0.0) - low) / (high - low))
            xs += [*range(len(names)), None]
            ys += [None if y is None else round(y, 3) for y in heights] + [None]
            parts = [f"{name} {_label(trial.params.get(name))}" for name in forms]
            parts.append(f"accuracy {percent(score(trial) or 0.0)}")
            told += [*(f"trial {trial.number}: {html.escape(part)}" for part in parts), ""]
        if members:
            figure.add_scatter(
                x=xs,
                y=ys,
                text=told,
                name=label,
                mode="lines",
                opacity=opacity,
                line={"color": colour, "width": width},
                hovertemplate="%{text}<extra></extra>",
            )
    ends = [*(_ends(form) for form in forms.values()), (f"{low:.1%}", f"{high:.1%}")]
    for x, (bottom, top) in enumerate(ends):
        for y, text, anchor in ((0, bottom, "top"), (1, top, "bottom")):
            figure.add_annotation(
                x=x, y=y, text=html.escape(text), yanchor=anchor, showarrow=False, yshift=0, font_size=11
            )
    figure.update_xaxes(
        tickvals=list(range(len(names))),
        ticktext=[html.escape(name.replace("_", " ")) for name in names],
        range=[-0.3, len(names) - 0.7],
        tickangle=-30,  # towards the left, where there is room in a narrow figure
        showgrid=True,
        zeroline=False,
    )
    figure.update_yaxes(visible=False, range=[-0.12, 1.12])
    return figure


def _is_choice(form: BaseDistribution) -> bool:
    return isinstance(form, CategoricalDistribution)


def _label(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _height(form: BaseDistribution, value: Any) -> float | None:
    """Where a value lies between the ends of its axis; None for a parameter that a trial does not have."""
    if value is None:
        return None
    if isinstance(form, CategoricalDistribution):
        return form.choices.index(value) / max(1, len(form.choices) - 1) if value in form.choices else None
    assert isinstance(form, IntDistribution | FloatDistribution)
    low, high, at = (math.log(x) if form.log else float(x) for x in (form.low, form.high, value))
    return 0.5 if high == low else (at - low) / (high - low)


def _ends(form: BaseDistribution) -> tuple[str, str]:
    if isinstance(form, CategoricalDistribution):
        return _label(form.choices[0]), _label(form.choices[-1]) if len(form.choices) > 1 else ""
    assert isinstance(form, IntDistribution | FloatDistribution)
    return _label(form.low), _label(form.high)


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
        told = f"trial {trial.number}, {kind}" + (f", {percent(accuracy)}" if accuracy is not None else "")
        bars[kind].append((start, max(0.0, end - start), worker_of(trial), told))
    last = max((start + length for members in bars.values() for start, length, _, _ in members), default=0.0)
    unit, per = ("hours", 3600) if last > 2 * 3600 else ("minutes", 60)
    figure = go.Figure()
    for kind, members in bars.items():
        if members:
            figure.add_bar(
                base=[round(start / per, 4) for start, _, _, _ in members],
                x=[round(length / per, 4) for _, length, _, _ in members],
                y=[_shortened(worker) for _, _, worker, _ in members],
                text=[told for _, _, _, told in members],
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
    # One row each, in the order of their coming.
    names = [_shortened(worker) for worker in workers]
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=names, autorange="reversed", automargin=True
    )
    figure.update_layout(barmode="overlay", bargap=0.25)
    return figure


def worker_of(trial: FrozenTrial) -> str:
    """Whose a trial was."""
    return str(trial.user_attrs.get(WORKER, "unknown"))


def _shortened(worker: str, most: int = 20) -> str:
    """A worker's name, the end of which tells it from its neighbours, as a label."""
    return html.escape(worker if len(worker) <= most else f"…{worker[1 - most :]}")


def class_figure(accuracies: Mapping[str, float]) -> go.Figure:
    """Test accuracy of each class, the worst first; of many classes the worst."""
    ranked = sorted(accuracies.items(), key=lambda item: item[1])[:MOST_CLASSES]
    figure = go.Figure()
    figure.add_bar(
        x=[round(value, 4) for _, value in ranked],
        y=[html.escape(name) for name, _ in ranked],
        orientation="h",
        marker_color=LINE_COLOURS[0],
        text=[f"{value:.1%}" for _, value in ranked],
        textposition="auto",
        hovertemplate="%{y}: %{x:.2%}<extra></extra>",
    )
    figure.update_xaxes(title_text="test accuracy", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    return figure


def confusion_figure(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> go.Figure:
    """How the images of each class were classed: right answers in green, mistakes in red, each with its own scale."""
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    names = [html.escape(name) for name in classes]
    size = len(shares)
    figure = go.Figure()
    for right, colour in ((True, "46,125,50"), (False, "198,40,40")):
        cells = [[round(shares[i][j], 4) if (i == j) == right else None for j in range(size)] for i in range(size)]
        largest = max((cell for row in cells for cell in row if cell is not None), default=0.0)
        figure.add_heatmap(
            z=cells,
            x=names,
            y=names,
            zmin=0,
            zmax=max(largest, 0.01),
            colorscale=[[0, f"rgba({colour},0.0)"], [1, f"rgba({colour},0.9)"]],
            showscale=False,
            hoverongaps=False,
            xgap=1,
            ygap=1,
            hovertemplate="%{y} taken for %{x}: %{z:.2%}<extra></extra>",
        )
    if size <= WRITTEN_CLASSES:
        written = [(i, j) for i in range(size) for j in range(size) if round(100 * shares[i][j]) or i == j]
        figure.add_scatter(
            x=[names[j] for _, j in written],
            y=[names[i] for i, _ in written],
            text=[f"{100 * shares[i][j]:.0f}" for i, j in written],
            mode="text",
            textfont={"size": 11},
            hoverinfo="skip",
            showlegend=False,
        )
    figure.update_xaxes(title_text="taken for", type="category", tickangle=-45, showgrid=False, automargin=True)
    figure.update_yaxes(title_text="is", type="category", autorange="reversed", showgrid=False, automargin=True)
    return figure


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
