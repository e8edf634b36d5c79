"""Which trials of a search its finale takes: the best, the knee of the front, or the best within limits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from data.errors import UserError
from search.analysis.pareto import Point, front, knee
from search.attributes import DEFINITION, LIMITS
from search.config.objective import CostName, Objective, cost_of, format_cost, score, second_objective

RuleName = Literal["accuracy", "knee", "limit"]

RULES: Mapping[RuleName, str] = {
    "accuracy": "the highest validation accuracy",
    "knee": "the knee of the front",
    "limit": "the highest validation accuracy within the limit",
}
"""What each rule chooses, in words."""


@dataclass(frozen=True)
class CostLimits:
    """What a network may cost at most; None: no limit.

    Attributes:
        params: trainable values.
        latency: seconds of a forward pass (`search.config.objective.LATENCY_BATCH`) on the trial's device.
    """

    params: int | None = None
    latency: float | None = None

    @property
    def most(self) -> dict[CostName, float]:
        """Those that are not None."""
        limits: dict[CostName, float | None] = {"params": self.params, "latency": self.latency}
        return {cost: most for cost, most in limits.items() if most is not None}

    def allow(self, trial: FrozenTrial) -> bool:
        """Whether a trial's costs are known and within them."""
        return all((cost_of(trial, cost) or math.inf) <= most for cost, most in self.most.items())

    @property
    def text(self) -> str:
        """Such as ``at most 100,000 parameters``; empty if there are none."""
        return " and ".join(f"at most {format_cost(cost, most)}" for cost, most in self.most.items())


@dataclass(frozen=True)
class SelectionRule:
    """What a search recommends: by which cost besides accuracy, if any, and within which limits."""

    cost: CostName | None = None
    limits: CostLimits = CostLimits()

    @property
    def rule(self) -> RuleName:
        """How it chooses; with limits the front's knee plays no part."""
        if self.limits.most:
            return "limit"
        return "accuracy" if self.cost is None else "knee"

    @property
    def text(self) -> str:
        """`RULES`, with the limits."""
        words = RULES[self.rule]
        return f"{words}, {self.limits.text}" if self.limits.most else words


def selection_rule_of(study: optuna.Study) -> SelectionRule:
    """What a search recommends by its definition and its limits."""
    attributes = study.user_attrs
    objective: Objective = attributes.get(DEFINITION, {}).get("objective", "accuracy")
    return selection_rule(objective, attributes)


def selection_rule(objective: Objective, attributes: Mapping[str, Any]) -> SelectionRule:
    """The same, from an objective and the study's user attributes."""
    return SelectionRule(second_objective(objective), CostLimits(**(attributes.get(LIMITS) or {})))


def ranked(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The COMPLETE trials, the highest validation accuracy first; of equals the earliest."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and math.isfinite(_accuracy(trial))]
    return sorted(complete, key=lambda trial: (-_accuracy(trial), trial.number))


def _accuracy(trial: FrozenTrial) -> float:
    accuracy = score(trial)
    return math.nan if accuracy is None else accuracy


def points_of(trials: Sequence[FrozenTrial], cost: CostName) -> list[Point]:
    """COMPLETE trials of known cost as points, named by their numbers."""
    return [
        Point(trial.number, _accuracy(trial), value)
        for trial in ranked(trials)
        if (value := cost_of(trial, cost)) is not None
    ]


def front_of(trials: Sequence[FrozenTrial], cost: CostName) -> list[FrozenTrial]:
    """The trials on the front of accuracy and a cost, cheapest first."""
    by_number = {trial.number: trial for trial in trials}
    return [by_number[point.key] for point in front(points_of(trials, cost))]


def candidates(trials: Sequence[FrozenTrial], selection: SelectionRule, most: int) -> list[FrozenTrial]:
    """What the finale takes, best first, each configuration once; empty if no trial keeps to the limits.

    Args:
        trials: of the search.
        selection: what the search recommends.
        most: at most this many. The knee is confirmed alone: its neighbours on the front are other trade-offs, not
            rivals that a higher accuracy could make the winner.
    """
    if selection.rule == "knee":
        assert selection.cost is not None
        point = knee(points_of(trials, selection.cost))
        return [trial for trial in trials if point is not None and trial.number == point.key][:most]
    chosen: list[FrozenTrial] = []
    for trial in ranked(trials):
        if len(chosen) == most:
            break
        if selection.limits.allow(trial) and all(trial.params != other.params for other in chosen):
            chosen.append(trial)
    return chosen


def refuse_unmeasured(limits: Mapping[CostName, float | None], objective: Objective) -> None:
    """Raise `UserError` if there is a limit on the latency and the study's trials do not measure it."""
    if limits.get("latency") is not None and second_objective(objective) != "latency":
        raise UserError(
            "--max-latency needs the latency of every trial, which a study with --objective accuracy,latency measures; "
            f"this one's objective is {objective}"
        )


def refuse_out_of_reach(trials: Sequence[FrozenTrial], limits: CostLimits) -> None:
    """Raise `UserError` with the smallest costs so far if trials have completed and none keeps to the limits."""
    complete = ranked(trials)
    if not complete or any(limits.allow(trial) for trial in complete):
        return
    least = [
        f"{format_cost(cost, point.cost)} (trial {point.key})"
        for cost in limits.most
        for point in sorted(points_of(complete, cost), key=lambda point: (point.cost, point.key))[:1]
    ]
    options = " or ".join(f"--max-{cost}" for cost in limits.most)
    raise UserError(
        f"no trial that ran to its end has {limits.text}; the least there is: {', '.join(least)}; raise {options}, or "
        "lift it with none"
    )


def set_limits(study: optuna.Study, changes: Mapping[CostName, float | None]) -> None:
    """Change the limits that the study stores; those not named stay, None lifts one."""
    before: dict[str, float | None] = asdict(selection_rule_of(study).limits)
    after = {**before, **{str(cost): most for cost, most in changes.items()}}
    if after != before:
        study.set_user_attr(LIMITS, after)
