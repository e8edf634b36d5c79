"""What a search is for: accuracy alone, or accuracy and one cost, which gives a front of networks
(`search.analysis.pareto`).

With two objectives every trial has two values, validation accuracy first. Optuna then refuses `Trial.report`,
`Trial.should_prune`, `FrozenTrial.value`, `Study.direction` and `Study.best_trial`; use `score` for a trial's
accuracy.
"""

import math
from collections.abc import Mapping
from typing import Literal, cast, get_args

from optuna.trial import FrozenTrial

from data.errors import UserError
from search.attributes import FLOPS, LATENCY, PARAMETERS

CostName = Literal["params", "flops", "latency"]
"""What a network costs: trainable values; floating-point operations of one image's forward pass (`model.cost`); median
seconds of the forward pass of `LATENCY_BATCH` images on the trial's device (`model.quality.latency`)."""

Objective = Literal["accuracy", "accuracy,params", "accuracy,flops", "accuracy,latency"]

COST_ATTRIBUTES: Mapping[CostName, str] = {"params": PARAMETERS, "flops": FLOPS, "latency": LATENCY}
"""User attributes of a trial that hold its costs; ``latency`` only if it is an objective."""

COST_LABELS: Mapping[CostName, str] = {"params": "parameters", "flops": "FLOPs", "latency": "latency in seconds"}
"""The costs' names as shown to people."""

LATENCY_BATCH = 1
"""Images in the forward pass that a trial's latency measures."""


def parse_objective(text: str) -> Objective:
    """The objective with this name.

    Raises:
        UserError: there is none of that name.
    """
    name = ",".join(word.strip() for word in text.split(","))
    if name not in get_args(Objective):
        raise UserError(f"no objective {text!r}: take accuracy, or accuracy,params, accuracy,flops or accuracy,latency")
    return cast(Objective, name)


def second_objective(objective: Objective) -> CostName | None:
    """The cost to minimise while accuracy is maximised; None for accuracy alone."""
    return cast(CostName, objective.partition(",")[2]) if "," in objective else None


def score(trial: FrozenTrial) -> float | None:
    """A trial's validation accuracy, the first of its values; None if it has none."""
    return trial.values[0] if trial.values else None


def cost_of(trial: FrozenTrial, cost: CostName) -> float | None:
    """What a trial's network costs; None if that is unknown or not a number above 0."""
    value = trial.user_attrs.get(COST_ATTRIBUTES[cost])
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return value if known else None


def format_cost(cost: CostName, value: float) -> str:
    """A cost with its unit."""
    if cost == "latency":
        return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    return f"{value:,.0f} {COST_LABELS[cost]}"
