"""Figures of a whole study, for optuna-dashboard and the report: budget, device time, accuracy against cost."""

import html
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from optuna.trial import FrozenTrial
from plotly.subplots import make_subplots

from search.analysis.outcomes import Outcome, curve, end_accuracy, outcome, seconds, validation_curve
from search.analysis.selection import front_of
from search.attributes import LATENCY
from search.config.objective import COST_ATTRIBUTES, LATENCY_BATCH, CostName, cost_of, score
from search.console.format import duration, params_text
from search.report.drawing import COLOURS, LINE_COLOURS, titled, with_title

MOST_POINTS = 500
"""Trials that `accuracy_cost_figure` shows at most: about 100 kB of JSON."""


def budget_figure(trials: Sequence[FrozenTrial], requested: int, waiting: int) -> go.Figure:
    """Configurations by outcome against the number requested; failed attempts separately, as they do not count.

    Args:
        trials: all trials of the study.
        requested: configurations requested.
        waiting: configurations in the queue.
    """
    count: dict[Outcome, int] = {**Counter(outcome(trial) for trial in trials), "waiting": waiting}
    figure = titled("Budget: configurations by outcome")
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
        x=requested,
        line_dash="dash",
        line_color="#7b8794",
        annotation_text=f"{requested} requested",
        annotation_position="bottom left",
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
    """Device-hours by outcome, over finished trials."""
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
    figure = titled(f"Device time: {duration(total)}")
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


COSTS: Mapping[str, str] = {
    "parameters": "parameters",
    "flops": "FLOPs of one image, forward",
    "latency": f"seconds of a forward pass of {LATENCY_BATCH} image",
}
"""Attributes of a trial that say what its network costs."""


def known_costs(trials: Sequence[FrozenTrial]) -> list[str]:
    """Those of `COSTS` that can be drawn: parameters and FLOPs, and the latency if trials have measured it."""
    measured = any(LATENCY in trial.user_attrs for trial in trials)
    return [attribute for attribute in COSTS if attribute != "latency" or measured]


def accuracy_cost_figure(trials: Sequence[FrozenTrial], chosen: int | None = None) -> go.Figure:
    """Validation accuracy of COMPLETE trials against each of their costs, with the Pareto fronts.

    Args:
        trials: of the study.
        chosen: number of the trial that stands out.
    """
    complete = _with_accuracy(trials)
    costs = known_costs(complete)
    figure = make_subplots(rows=1, cols=len(costs), shared_yaxes=True, horizontal_spacing=0.04)
    shown = {
        n
        for column, attribute in enumerate(costs, start=1)
        for n in _add_cost(figure, complete, attribute, column, chosen)
    }
    figure.update_yaxes(title_text="validation accuracy", tickformat=".0%", row=1, col=1)
    some = f" (the best {len(shown):,} of {len(complete):,})" if len(shown) < len(complete) else ""
    figure.update_layout(showlegend=False)
    return with_title(figure, f"Accuracy and cost of complete trials{some}")


def cost_figure(trials: Sequence[FrozenTrial], attribute: str, chosen: int | None = None) -> go.Figure:
    """`accuracy_cost_figure` against one of `COSTS` alone."""
    figure = make_subplots(rows=1, cols=1)
    _add_cost(figure, _with_accuracy(trials), attribute, 1, chosen)
    figure.update_yaxes(title_text="validation accuracy", tickformat=".0%")
    figure.update_layout(showlegend=False)
    return with_title(figure, f"Accuracy and {attribute}")


def pareto_front(trials: Sequence[FrozenTrial], attribute: str) -> list[FrozenTrial]:
    """COMPLETE trials for which no other is both cheaper (or equal) and better, cheapest first."""
    return front_of(trials, _cost_named(attribute))


def _cost_named(attribute: str) -> CostName:
    return next(cost for cost, name in COST_ATTRIBUTES.items() if name == attribute)


def _with_accuracy(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [t for t in trials if end_accuracy(t) is not None]


def _add_cost(
    figure: go.Figure, complete: Sequence[FrozenTrial], attribute: str, column: int, chosen: int | None
) -> set[int]:
    """Draw one panel; the numbers of the trials that it shows."""
    cost = _cost_named(attribute)
    points = [(price, trial) for trial in complete if (price := cost_of(trial, cost)) is not None]
    front = [(price, trial) for trial in front_of(complete, cost) if (price := cost_of(trial, cost)) is not None]
    always = {trial.number for _, trial in front} | {trial.number for _, trial in points if trial.number == chosen}
    drawn = _at_most(MOST_POINTS, points, always)
    unit = "%{x:.3g} s" if cost == "latency" else f"%{{x:,}} {attribute}"
    figure.add_scatter(
        x=[cost for cost, _ in drawn],
        y=[_accuracy(trial) for _, trial in drawn],
        text=[f"trial {t.number}: {html.escape(params_text(t.params))}" for _, t in drawn],
        hovertemplate=f"%{{text}}<br>%{{y:.2%}}, {unit}<extra></extra>",
        mode="markers",
        marker={"color": LINE_COLOURS[0], "opacity": 0.6},
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
    for price, trial in drawn:
        if trial.number == chosen:
            figure.add_scatter(
                x=[price],
                y=[_accuracy(trial)],
                name=f"trial {chosen}, chosen",
                hovertemplate=f"trial {chosen}, chosen<br>%{{y:.2%}}, {unit}<extra></extra>",
                mode="markers",
                marker={"color": LINE_COLOURS[3], "symbol": "star", "size": 15},
                row=1,
                col=column,
            )
    figure.update_xaxes(
        title_text=COSTS[attribute],
        type="log",
        tickformat="~s",
        tickvals=_ticks([cost for cost, _ in drawn]),
        row=1,
        col=column,
    )
    return {trial.number for _, trial in drawn}


def learning_curve_png(trial: FrozenTrial) -> bytes:
    """Accuracy by epoch as a PNG: on the validation images, and on the training images if that was stored."""
    # Half a second to import, and needed only to draw a curve. Figure and canvas without pyplot leave no state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(6, 3.6), dpi=80)
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.15, top=0.9)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, points in (
        ("validation", validation_curve(trial)),
        ("train", curve(trial, "train_accuracy")),
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


def _ticks(costs: Sequence[float]) -> list[float]:
    """Few round numbers along a logarithmic axis; plotly's own choice overlaps in a narrow figure."""
    if not costs:
        return []
    low, high = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)))
    step = max(1, (high - low) // 4)
    digits = (1, 2, 5) if high - low <= 2 else (1,)
    return [digit * 10.0**power for power in range(low, high + 1, step) for digit in digits]


def _accuracy(trial: FrozenTrial) -> float:
    return round(score(trial) or 0.0, 5)


def _at_most(
    most: int, points: Sequence[tuple[float, FrozenTrial]], always: set[int]
) -> list[tuple[float, FrozenTrial]]:
    """The trials numbered in ``always`` and the best others, in the order given."""
    if len(points) <= most:
        return list(points)
    ranked = sorted(points, key=lambda point: (point[1].number not in always, -_accuracy(point[1]), point[1].number))
    drawn = {trial.number for _, trial in ranked[:most]}
    return [(cost, trial) for cost, trial in points if trial.number in drawn]
