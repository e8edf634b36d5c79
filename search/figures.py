"""The study's own pictures: pure functions of trials, drawn for optuna-dashboard.

A figure's JSON lies in the database and is read by every open browser every few seconds, so figures are kept small:
no template, rounded numbers, and a bound on the number of points.
"""

import html
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState
from plotly.subplots import make_subplots

from search.view import duration, params_text

Outcome = Literal["complete", "pruned", "infeasible", "failed attempt", "running", "waiting"]

COLOURS: Mapping[Outcome, str] = {
    "complete": "#2e7d32",
    "pruned": "#f9a825",
    "infeasible": "#6a1b9a",
    "failed attempt": "#c62828",
    "running": "#1565c0",
    "waiting": "#b0bec5",
}

MOST_POINTS = 500
"""Trials that `accuracy_cost_figure` shows at most: about 100 kB of JSON."""

_MARGIN = {"l": 60, "r": 30, "t": 50, "b": 50}


def outcome(trial: FrozenTrial) -> Outcome:
    """What became of a trial, finer than Optuna's states: an infeasible configuration is PRUNED there."""
    match trial.state:
        case TrialState.COMPLETE:
            return "complete"
        case TrialState.PRUNED:
            broken = any(value > 0 for value in trial.constraints.values())
            return "infeasible" if broken or trial.user_attrs.get("fault") == "infeasible" else "pruned"
        case TrialState.FAIL:
            return "failed attempt"
        case TrialState.RUNNING:
            return "running"
        case _:
            return "waiting"


def number(value: object) -> float | None:
    """A finite number as one; None for anything else, such as an absent attribute or an infinite loss."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def seconds(trial: FrozenTrial) -> float:
    """Time that a trial held its device: its own measurement, else from its start to its end."""
    measured = number(trial.user_attrs.get("seconds"))
    if measured is not None:
        return measured
    if trial.datetime_start is None or trial.datetime_complete is None:
        return 0.0
    return max(0.0, (trial.datetime_complete - trial.datetime_start).total_seconds())


def budget_figure(trials: Sequence[FrozenTrial], requested: int, waiting: int) -> go.Figure:
    """Configurations by outcome against the number asked for; failed attempts apart, as they count for nothing.

    Args:
        trials: all trials of the study.
        requested: configurations asked for.
        waiting: configurations in the queue.
    """
    count: dict[Outcome, int] = {**Counter(outcome(trial) for trial in trials), "waiting": waiting}
    figure = _figure("Budget: configurations by outcome")
    for name in COLOURS:
        row = "attempts" if name == "failed attempt" else "configurations"
        value = count.get(name, 0)
        figure.add_bar(
            x=[value],
            y=[row],
            name=f"{name}: {value}",
            orientation="h",
            marker_color=COLOURS[name],
            hovertemplate=f"{value} {name}<extra></extra>",
        )
    figure.add_vline(
        x=requested, line_dash="dash", annotation_text=f"{requested} requested", annotation_position="bottom left"
    )
    figure.update_layout(
        barmode="stack",
        yaxis_autorange="reversed",
        yaxis_automargin=True,
        xaxis_rangemode="tozero",
        legend={"orientation": "h", "traceorder": "normal", "y": -0.15},
    )
    return figure


def device_hours_figure(trials: Sequence[FrozenTrial]) -> go.Figure:
    """Device-hours by what came of them, over finished trials."""
    names: dict[Outcome, str] = {
        "complete": "complete",
        "pruned": "pruned",
        "infeasible": "infeasible",
        "failed attempt": "lost to failed attempts",
    }
    spent = dict.fromkeys(names, 0.0)
    for trial in trials:
        if trial.state.is_finished():
            spent[outcome(trial)] += seconds(trial)
    total = sum(spent.values())
    figure = _figure(f"Device time: {duration(total)}")
    figure.add_bar(
        x=[round(value / 3600, 4) for value in spent.values()],
        y=list(names.values()),
        orientation="h",
        marker_color=[COLOURS[name] for name in names],
        text=[f"{duration(value)} ({value / total:.0%})" if total else "0 s" for value in spent.values()],
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    figure.update_layout(
        yaxis_autorange="reversed", yaxis_automargin=True, xaxis_title="device-hours", xaxis_rangemode="tozero"
    )
    return figure


def accuracy_cost_figure(trials: Sequence[FrozenTrial]) -> go.Figure:
    """Validation accuracy of COMPLETE trials against parameters and against FLOPs, with the Pareto fronts."""
    complete = [t for t in trials if t.state == TrialState.COMPLETE and number(t.value) is not None]
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    shown: set[int] = set()
    for column, (attribute, label) in enumerate(
        (("parameters", "parameters"), ("flops", "FLOPs of one image, forward")), start=1
    ):
        points = [(cost, t) for t in complete if (cost := number(t.user_attrs.get(attribute))) and cost > 0]
        front = _front(points)
        kept = _at_most(MOST_POINTS, points, {trial.number for _, trial in front})
        shown |= {trial.number for _, trial in kept}
        figure.add_scatter(
            x=[cost for cost, _ in kept],
            y=[_accuracy(trial) for _, trial in kept],
            text=[f"trial {t.number}: {html.escape(params_text(t.params))}" for _, t in kept],
            hovertemplate=f"%{{text}}<br>%{{y:.2%}}, %{{x:,}} {attribute}<extra></extra>",
            mode="markers",
            marker={"color": COLOURS["running"], "opacity": 0.6},
            row=1,
            col=column,
        )
        figure.add_scatter(
            x=[cost for cost, _ in front],
            y=[_accuracy(trial) for _, trial in front],
            mode="lines",
            line={"shape": "hv", "color": COLOURS["failed attempt"], "width": 1.5},
            hoverinfo="skip",
            row=1,
            col=column,
        )
        figure.update_xaxes(
            title_text=label,
            type="log",
            tickformat="~s",
            tickvals=_ticks([cost for cost, _ in kept]),
            row=1,
            col=column,
        )
    figure.update_yaxes(title_text="validation accuracy", tickformat=".0%", row=1, col=1)
    some = f" (the best {len(shown):,} of {len(complete):,})" if len(shown) < len(complete) else ""
    figure.update_layout(showlegend=False)
    return _plain(figure, f"Accuracy and cost of complete trials{some}")


def learning_curve_png(trial: FrozenTrial) -> bytes:
    """Accuracy by epoch as a PNG: on the validation images, and on the training images where that was stored."""
    # Half a second to import, and only who draws a curve needs it. Figure and canvas without pyplot leave no state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(6, 3.6), dpi=80)
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.15, top=0.9)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, points in (
        ("validation", validation_curve(trial)),
        ("train", _finite(_curve(trial, "train_accuracy"))),
    ):
        if points:
            axes.plot(list(points), list(points.values()), marker=".", label=label)
    if axes.lines:
        axes.legend(loc="lower right")
    else:
        axes.text(0.5, 0.5, "no epoch was finished", ha="center", va="center", transform=axes.transAxes)
    axes.set(title=f"trial {trial.number}, {outcome(trial)}", xlabel="epoch", ylabel="accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def validation_curve(trial: FrozenTrial) -> dict[int, float]:
    """Validation accuracy by epoch; epochs without a finite one are left out."""
    return _finite({**_curve(trial, "validation_accuracy"), **trial.intermediate_values})


def _curve(trial: FrozenTrial, key: str) -> dict[int, object]:
    return {int(row["epoch"]): row.get(key) for row in trial.user_attrs.get("curve") or []}


def _finite(values: Mapping[int, object]) -> dict[int, float]:
    return {epoch: finite for epoch in sorted(values) if (finite := number(values[epoch])) is not None}


def _figure(title: str) -> go.Figure:
    return _plain(go.Figure(), title)


def _plain(figure: go.Figure, title: str) -> go.Figure:
    """Without the default template, which is 6 kB in every figure's JSON; the title clear of plotly's buttons."""
    return figure.update_layout(title={"text": title, "x": 0, "xanchor": "left"}, template=None, margin=_MARGIN)


def _ticks(costs: Sequence[float]) -> list[float]:
    """Few round numbers along a logarithmic axis; plotly's own choice overlaps in a narrow figure."""
    if not costs:
        return []
    low, high = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)))
    step = max(1, (high - low) // 4)
    digits = (1, 2, 5) if high - low <= 2 else (1,)
    return [digit * 10.0**power for power in range(low, high + 1, step) for digit in digits]


def _accuracy(trial: FrozenTrial) -> float:
    return round(trial.value or 0.0, 5)


def _front(points: Sequence[tuple[float, FrozenTrial]]) -> list[tuple[float, FrozenTrial]]:
    """The points than which none is both cheaper (or equal) and better."""
    front: list[tuple[float, FrozenTrial]] = []
    best = -math.inf
    for cost, trial in sorted(points, key=lambda point: (point[0], -_accuracy(point[1]), point[1].number)):
        if _accuracy(trial) > best:
            front.append((cost, trial))
            best = _accuracy(trial)
    return front


def _at_most(
    most: int, points: Sequence[tuple[float, FrozenTrial]], always: set[int]
) -> list[tuple[float, FrozenTrial]]:
    """The trials numbered in ``always`` and the best others, in the order given."""
    if len(points) <= most:
        return list(points)
    ranked = sorted(points, key=lambda point: (point[1].number not in always, -_accuracy(point[1]), point[1].number))
    kept = {trial.number for _, trial in ranked[:most]}
    return [(cost, trial) for cost, trial in points if trial.number in kept]
