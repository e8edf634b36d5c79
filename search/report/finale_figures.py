"""Figures of the finale: the confirmation, the retrain's trainings, and the test by class."""

import html
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from search.analysis.outcomes import number
from search.report.drawing import COLOURS, LINE_COLOURS, thinned, titled
from search.results import Confirmation, CurvePoint, LossPoint, RetrainResult

MOST_CLASSES = 30
"""Classes that `class_figure` shows at most: more could not be told apart."""

WRITTEN_CLASSES = 12
"""Classes up to which a cell of the confusion matrix has room for its number."""


@dataclass(frozen=True)
class _Line:
    """A training as the figures draw it."""

    name: str
    colour: str
    epochs: int
    curve: Sequence[CurvePoint]
    losses: Sequence[LossPoint]
    tested: float | None = None


def confirmation_figure(confirmation: Confirmation) -> go.Figure:
    """Each confirmed configuration's accuracy with every seed, their mean, and its accuracy in the search."""
    rows = [row for row in confirmation.configurations if row.accuracies]
    names = [f"trial {row.trial}" for row in rows]
    figure = titled("Confirmation over fresh seeds")
    seeds = [(name, seed, y) for name, row in zip(names, rows, strict=True) for seed, y in row.accuracies.items()]
    figure.add_scatter(
        x=[round(value, 5) for _, _, value in seeds],
        y=[name for name, _, _ in seeds],
        text=[f"seed {seed}" for _, seed, _ in seeds],
        name="one seed",
        mode="markers",
        marker={"color": LINE_COLOURS[0], "opacity": 0.7, "size": 8},
        hovertemplate="%{y}, %{text}: %{x:.2%}<extra></extra>",
    )
    figure.add_scatter(
        x=[row.mean for row in rows],
        y=names,
        error_x={"type": "data", "array": [row.std or 0 for row in rows], "thickness": 1.5},
        name="mean ± standard deviation",
        mode="markers",
        marker={
            "color": COLOURS["complete"],
            "symbol": "line-ns",
            "size": 18,
            "line": {"width": 3, "color": COLOURS["complete"]},
        },
        hovertemplate="%{y}: mean %{x:.2%}<extra></extra>",
    )
    figure.add_scatter(
        x=[row.search_accuracy for row in rows],
        y=names,
        name="in the search",
        mode="markers",
        marker={"color": COLOURS["failed attempt"], "symbol": "diamond-open", "size": 11, "line": {"width": 2}},
        hovertemplate="%{y} in the search: %{x:.2%}<extra></extra>",
    )
    figure.update_xaxes(title_text="validation accuracy", tickformat=".1%")
    # Categories by their rank, the first row on top, whichever trace names them first.
    figure.update_yaxes(categoryorder="array", categoryarray=names, autorange="reversed", automargin=True)
    return figure


def retrain_accuracy_figure(retrain: RetrainResult, most: int = 150) -> go.Figure:
    """Accuracy by epoch of every training of the finale, ``most`` points per line; stars are test accuracies."""
    figure = titled("Retrain: accuracy by epoch")
    for line in _lines(retrain):
        shown = True
        curves = (
            ("validation", "solid", [(point.epoch, number(point.validation_accuracy)) for point in line.curve]),
            ("train", "dot", [(point.epoch, number(point.train_accuracy)) for point in line.curve]),
        )
        for what, dash, curve in curves:
            points = thinned([(epoch, y) for epoch, y in curve if y is not None], most)
            if points:
                figure.add_scatter(
                    x=[epoch for epoch, _ in points],
                    y=[round(y, 5) for _, y in points],
                    name=line.name,
                    legendgroup=line.name,
                    showlegend=shown,
                    mode="lines" if len(points) > 1 else "markers",
                    line={"color": line.colour, "dash": dash, "width": 1.8},
                    marker={"color": line.colour},
                    hovertemplate=f"{line.name}, {what}: %{{y:.2%}} after epoch %{{x}}<extra></extra>",
                )
                shown = False
        if line.tested is not None and line.curve:
            figure.add_scatter(
                x=[line.curve[-1].epoch],
                y=[round(line.tested, 5)],
                name=line.name,
                legendgroup=line.name,
                showlegend=shown,
                mode="markers",
                marker={"color": line.colour, "symbol": "star", "size": 12},
                hovertemplate=f"{line.name}, test: %{{y:.2%}}<extra></extra>",
            )
    figure.update_xaxes(title_text="epoch", rangemode="tozero")
    figure.update_yaxes(title_text="accuracy", tickformat=".0%")
    return figure


def retrain_loss_figure(retrain: RetrainResult, most: int = 150) -> go.Figure:
    """Training loss by batch of every training of the finale, ``most`` points per line, with the mean around each."""
    figure = titled("Retrain: loss of every batch")
    for line in _lines(retrain):
        losses = [(step, y) for step, loss in line.losses if (y := number(loss)) is not None]
        if not losses:
            continue
        scale = line.epochs / max(1, losses[-1][0])
        smooth = _smoothed([y for _, y in losses], max(1, len(losses) // 40))
        means = [(step, y) for (step, _), y in zip(losses, smooth, strict=True)]
        for points, width, opacity, shown in ((losses, 1, 0.3, False), (means, 2, 1.0, True)):
            drawn = thinned(points, most)
            figure.add_scatter(
                x=[round(step * scale, 3) for step, _ in drawn],
                y=[round(y, 4) for _, y in drawn],
                name=line.name,
                legendgroup=line.name,
                showlegend=shown,
                mode="lines",
                opacity=opacity,
                line={"color": line.colour, "width": width},
                hovertemplate=f"{line.name}: %{{y:.3f}} at epoch %{{x:.1f}}<extra></extra>" if shown else None,
                hoverinfo=None if shown else "skip",
            )
    figure.update_xaxes(title_text="epoch", rangemode="tozero")
    figure.update_yaxes(title_text="training loss of a batch", rangemode="tozero")
    return figure


def _lines(retrain: RetrainResult) -> list[_Line]:
    """Length trainings, then final ones."""
    colours = itertools.cycle(LINE_COLOURS)
    lines = []
    for training in retrain.watched:
        name = f"watched, {training.epochs} epochs"
        lines.append(_Line(name, next(colours), training.epochs, training.curve, training.losses))
    for final in retrain.runs:
        name, epochs = f"final, seed {final.seed}", final.curve[-1].epoch if final.curve else 1
        lines.append(_Line(name, next(colours), epochs, final.curve, final.losses, final.test.accuracy))
    return lines


def _smoothed(values: Sequence[float], reach: int) -> list[float]:
    """For each value the mean of those up to ``reach`` before and after it."""
    sums = [0.0, *itertools.accumulate(values)]
    ends = ((max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values)))
    return [(sums[high] - sums[low]) / (high - low) for low, high in ends]


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
    """How each class's images were classified: right answers in green, mistakes in red, each with its own scale."""
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
