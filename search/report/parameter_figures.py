"""Figures of a search's parameters: their importance, each against the accuracy, all together."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from search.config.objective import score
from search.console.format import percent
from search.report.drawing import BEST, FADED, GOOD, LINE_COLOURS, thinned

MOST_DOTS = 500
MOST_LINES = 300
MOST_TICKS = 6
"""What a figure shows at most: more could not be told apart."""


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
    members = thinned([trial for trial in complete if name in trial.params], MOST_DOTS)
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
    drawn = thinned(complete, MOST_LINES)
    values = [score(trial) or 0.0 for trial in drawn]
    low, high = min(values), max(values)
    names = [*forms, "accuracy"]
    groups = (
        ("the worse half", FADED, 0.45, 1.0, drawn[math.ceil(len(drawn) / 2) :]),
        ("the better half", GOOD, 0.6, 1.2, drawn[math.ceil(len(drawn) / 10) : math.ceil(len(drawn) / 2)]),
        ("the best tenth", BEST, 0.9, 2.0, drawn[: math.ceil(len(drawn) / 10)]),
    )
    figure = go.Figure()
    for label, colour, opacity, width, members in groups:
        xs: list[int | None] = []
        ys: list[float | None] = []
        texts: list[str] = []
        for trial in members:
            heights = [_height(form, trial.params.get(name)) for name, form in forms.items()]
            heights.append(0.5 if high == low else ((score(trial) or 0.0) - low) / (high - low))
            xs += [*range(len(names)), None]
            ys += [None if y is None else round(y, 3) for y in heights] + [None]
            parts = [f"{name} {_label(trial.params.get(name))}" for name in forms]
            parts.append(f"accuracy {percent(score(trial) or 0.0)}")
            texts += [*(f"trial {trial.number}: {html.escape(part)}" for part in parts), ""]
        if members:
            figure.add_scatter(
                x=xs,
                y=ys,
                text=texts,
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
        tickangle=-30,  # towards the left, as a narrow figure has room there
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
