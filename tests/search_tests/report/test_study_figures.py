import datetime
import io
import json
import math
from dataclasses import replace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from plotly.graph_objects import Figure

from search.analysis.outcomes import outcome
from search.report.drawing import thinned
from search.report.finale_figures import confirmation_figure, retrain_accuracy_figure, retrain_loss_figure
from search.report.study_figures import (
    MOST_POINTS,
    accuracy_cost_figure,
    budget_figure,
    cost_figure,
    device_hours_figure,
    learning_curve_png,
    pareto_front,
)
from search.results import RetrainResult, as_json, from_json
from support import finale

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def trial(
    number: int,
    state: TrialState = COMPLETE,
    value: float | None = 0.5,
    epochs: dict[int, float] | None = None,
    **attributes: Any,
) -> FrozenTrial:
    made = create_trial(
        state=state,
        value=value if state == COMPLETE else None,
        params={"lr": 0.1},
        distributions={"lr": FloatDistribution(0.01, 1.0)},
        user_attrs=attributes,
        intermediate_values=epochs or {},
    )
    made.number = number
    return made


def widths(figure: Figure) -> dict[str, float]:
    """Each bar's length by what it stands for."""
    bars: dict[str, float] = {}
    for bar in figure.data:
        names = [bar.name.partition(":")[0]] if bar.name else list(bar.y)
        bars |= dict(zip(names, bar.x, strict=True))
    return bars


def dots(figure: Figure) -> list[tuple[list[float], list[float]]]:
    return [(list(trace.x), list(trace.y)) for trace in figure.data if trace.mode == "markers"]


def test_every_trial_counts_once_against_the_budget() -> None:
    trials = [
        trial(0),
        trial(1),
        trial(2, PRUNED),
        trial(3, PRUNED, fault="non-finite loss"),
        trial(4, PRUNED, fault="infeasible"),
        trial(5, FAIL, fault="killed"),
        trial(6, TrialState.RUNNING),
        trial(7, TrialState.WAITING),
    ]
    figure = budget_figure(trials, requested=20, waiting=3)
    assert widths(figure) == {
        "complete": 2, "pruned": 2, "infeasible": 1, "failed attempt": 1, "running": 1, "waiting": 3,
    }  # fmt: skip
    assert figure.layout.shapes[0].x0 == 20
    assert "20 requested" in figure.to_json()


def test_a_failed_attempt_stands_apart_from_configurations() -> None:
    rows = {bar.name.partition(":")[0]: bar.y[0] for bar in budget_figure([trial(0, FAIL)], 1, 0).data}
    assert {name for name, row in rows.items() if row == "attempts"} == {"failed attempt"}


@pytest.mark.parametrize(("constraint", "expected"), [(None, "pruned"), (0.0, "pruned"), (1.0, "infeasible")])
def test_a_broken_constraint_makes_a_pruned_trial_infeasible(constraint: float | None, expected: str) -> None:
    made = trial(0, PRUNED)
    if constraint is not None:
        made.set_constraint("memory", constraint)
    assert outcome(made) == expected


def test_device_hours_are_measured_or_else_taken_from_start_and_end() -> None:
    clocked = trial(1, PRUNED)
    clocked.datetime_start = datetime.datetime(2026, 1, 1)  # noqa: DTZ001  (as Optuna stores it)
    clocked.datetime_complete = clocked.datetime_start + datetime.timedelta(hours=2)
    never_started = trial(2, FAIL)
    never_started.datetime_start = None
    trials = [
        trial(0, seconds=3600),
        clocked,
        never_started,
        trial(3, FAIL, seconds=1800),
        trial(4, PRUNED, fault="infeasible", seconds=360),
        trial(5, TrialState.RUNNING, seconds=7200),
    ]
    hours = widths(device_hours_figure(trials))
    assert hours == {"complete": 1.0, "pruned": 2.0, "infeasible": 0.1, "lost to failed attempts": 0.5}


def test_accuracy_stands_against_parameters_and_flops_of_complete_trials() -> None:
    trials = [
        trial(0, value=0.4, parameters=100, flops=5_000),
        trial(1, value=0.6, parameters=1_000),
        trial(2, value=0.5, flops=7_000),
        trial(3, PRUNED, parameters=1, flops=1),
        trial(4, value=math.inf, parameters=1, flops=1),
        trial(5, value=0.9, parameters=0, flops=0),
    ]
    figure = accuracy_cost_figure(trials)
    assert dots(figure) == [([100, 1_000], [0.4, 0.6]), ([5_000, 7_000], [0.4, 0.5])]
    assert figure.layout.xaxis.type == figure.layout.xaxis2.type == "log"
    assert figure.data[0].text[1] == "trial 1: lr 0.1"


def test_the_front_has_what_nothing_beats() -> None:
    trials = [
        trial(index, value=value, parameters=parameters, flops=parameters)
        for index, (parameters, value) in enumerate([(10, 0.3), (20, 0.2), (20, 0.5), (30, 0.5), (40, 0.6), (50, 0.1)])
    ]
    lines = [trace for trace in accuracy_cost_figure(trials).data if trace.mode == "lines"]
    assert [list(line.x) for line in lines] == [[10, 20, 40]] * 2
    assert [list(line.y) for line in lines] == [[0.3, 0.5, 0.6]] * 2


def test_one_cost_by_itself_is_drawn_as_beside_the_other() -> None:
    trials = [trial(i, value=i / 10, parameters=10 + i % 3, flops=1_000 * i) for i in range(1, 9)]
    together = accuracy_cost_figure(trials)
    for column, attribute in enumerate(("parameters", "flops")):
        assert dots(cost_figure(trials, attribute)) == [dots(together)[column]]
    assert [t.number for t in pareto_front(trials, "parameters")] == [6, 7, 8]


def test_a_confirmation_shows_every_seed_and_the_search_beside_the_mean() -> None:
    trials = [trial(4, value=0.75), trial(2, value=0.7), trial(3, value=0.65)]
    confirmation = finale.confirmation(trials)
    rows = list(confirmation.configurations)
    rows[2] = replace(rows[2], accuracies={}, mean=None)
    figure = confirmation_figure(replace(confirmation, configurations=tuple(rows)))
    seeds, means, search = figure.data
    assert len(seeds.x) == 6
    assert (list(means.y), list(means.x)) == (["trial 4", "trial 2"], pytest.approx([0.691, 0.689]))
    assert list(search.x) == [0.75, 0.7]
    assert list(figure.layout.yaxis.categoryarray) == ["trial 4", "trial 2"]


def test_a_retrain_shows_every_training() -> None:
    done = finale.retrain(0, ("cat", "dog"))
    names = ["watched, 4 epochs", "watched, 8 epochs", "final, seed 500010", "final, seed 500011"]
    for figure in (retrain_accuracy_figure(done), retrain_loss_figure(done)):
        assert list(dict.fromkeys(line.name for line in figure.data)) == names
        legend = [line.name for line in figure.data if line.showlegend]
        assert legend == names
    accuracy = retrain_accuracy_figure(done)
    stars = [(list(line.x), list(line.y)) for line in accuracy.data if line.marker.symbol == "star"]
    assert stars == [([8], [0.915])] * 2
    validation = next(line for line in accuracy.data if line.name == names[0])
    assert list(validation.y) == pytest.approx([0.5, 0.7, 0.76667, 0.8])
    assert max(retrain_loss_figure(done).data[0].x) == 4


def test_a_long_retrain_stays_small() -> None:
    content = as_json(finale.retrain(0, ("cat", "dog")))
    for run in (*content["watched"], *content["runs"]):
        run["losses"] = [[step, 1.23456789 + step % 7] for step in range(1000)]
        run["curve"] = [{**run["curve"][0], "epoch": epoch} for epoch in range(1, 2001)]
    done = from_json(RetrainResult, content)
    assert len(retrain_accuracy_figure(done).to_json()) < 20_000
    assert len(retrain_loss_figure(done).to_json()) < 30_000


EARLIER = {
    "trial": 0, "epochs": 8, "converged": None, "train_accuracy": 0.9, "parameters": 10, "flops": 20, "seconds": 60.0,
    "test_accuracy": {"mean": 0.9, "std": None, "n": 1},
}  # fmt: skip
"""A retrain as an earlier version stored it."""

TESTED = {
    "accuracy": 0.9, "loss": 0.3, "per_class": [], "confusion": [], "calibration_error": 0.0, "images": 1,
    "read_at": "",
}  # fmt: skip
BARE = {
    "seed": 1, "train_accuracy": 0.9, "train_loss": 0.1, "seconds": 1.0, "curve": [], "losses": [], "test": TESTED,
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"watched": [], "runs": []}, {"runs": [BARE]}])
def test_a_retrain_without_curves_is_an_empty_figure(more: dict[str, Any]) -> None:
    done = from_json(RetrainResult, {**EARLIER, **more})
    assert not retrain_accuracy_figure(done).data
    assert not retrain_loss_figure(done).data


def test_thinning_keeps_both_ends() -> None:
    assert thinned(range(5), 9) == [0, 1, 2, 3, 4]
    assert thinned(range(1001), 5) == [0, 250, 500, 750, 1000]


def test_a_large_study_shows_its_best_trials_and_the_whole_front() -> None:
    count = 3 * MOST_POINTS
    trials = [trial(i, value=0.5 + i / (10 * count), parameters=1_000 + i % 7, flops=100) for i in range(count)]
    trials.append(trial(count, value=0.01, parameters=2, flops=100))
    figure = accuracy_cost_figure(trials)
    parameters, accuracies = dots(figure)[0]
    assert len(parameters) == MOST_POINTS
    assert 2 in parameters
    assert sorted(accuracies)[1] > 0.56
    assert len(figure.to_json()) < 120_000
    assert f"of {count + 1:,}" in figure.layout.title.text


@pytest.mark.parametrize("trials", [[], [trial(0, FAIL)], [trial(0, TrialState.RUNNING, value=None)]])
def test_figures_of_a_study_without_results(trials: list[FrozenTrial]) -> None:
    for figure in (budget_figure(trials, 5, 0), device_hours_figure(trials), accuracy_cost_figure(trials)):
        assert isinstance(figure, Figure)
        json.loads(figure.to_json())


def test_figures_depend_on_nothing_but_their_trials() -> None:
    trials = [trial(i, value=i / 10, parameters=10 + i, flops=10, seconds=3) for i in range(5)]
    for draw in (device_hours_figure, accuracy_cost_figure):
        assert draw(trials).to_json() == draw(trials).to_json()


def pixels(png: bytes) -> "np.ndarray[Any, Any]":
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def colours(png: bytes) -> set[tuple[int, ...]]:
    rgb = (pixels(png)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return {tuple(colour) for colour in rgb}


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def test_a_learning_curve_shows_validation_and_train_accuracy_where_they_are() -> None:
    validation = {1: 0.2, 2: 0.4, 3: 0.5}
    rows = [{"epoch": e, "train_accuracy": a + 0.1, "validation_accuracy": a} for e, a in validation.items()]
    alone, both = learning_curve_png(trial(0, epochs=validation)), learning_curve_png(trial(0, epochs={}, curve=rows))
    assert BLUE in colours(alone)
    assert ORANGE not in colours(alone)
    assert {BLUE, ORANGE} <= colours(both)


@pytest.mark.parametrize(
    "made",
    [
        trial(0, FAIL),
        trial(0, PRUNED, epochs={1: math.nan, 2: math.inf}),
        trial(0, PRUNED, curve=[{"epoch": 1, "train_accuracy": None, "validation_accuracy": "nan"}]),
    ],
)
def test_a_learning_curve_without_a_finite_point_is_a_picture_all_the_same(made: FrozenTrial) -> None:
    png = learning_curve_png(made)
    assert pixels(png).shape[0] > 100
    assert BLUE not in colours(png)
