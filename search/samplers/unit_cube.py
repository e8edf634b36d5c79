"""A search space as the unit cube: points of it as parameters, and parameters as features of a regression.

Every number is spread evenly over 0 to 1 on the scale that it is drawn on (logarithmic, in steps), so that a distance
means the same in every direction.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from search.config.space import Params

Distributions = Mapping[str, BaseDistribution]
"""Every parameter of a space with its distribution (`search.config.space.parameter_distributions`)."""


def value_at(distribution: BaseDistribution, coordinate: float) -> Any:
    """A parameter's value at a coordinate from 0 (included) to 1 (excluded); equal lengths have equal odds."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[_cell(coordinate, len(distribution.choices))]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if distribution.log and isinstance(distribution, IntDistribution):
        low, high = math.log(distribution.low - 0.5), math.log(distribution.high + 0.5)
        return min(max(round(math.exp(low + coordinate * (high - low))), distribution.low), distribution.high)
    if distribution.log:
        low, high = math.log(distribution.low), math.log(distribution.high)
        return min(max(math.exp(low + coordinate * (high - low)), distribution.low), distribution.high)
    if distribution.step is None:
        return distribution.low + coordinate * (distribution.high - distribution.low)
    value = distribution.low + _cell(coordinate, _steps(distribution)) * distribution.step
    return value if isinstance(distribution, IntDistribution) else min(value, distribution.high)


def coordinate_of(distribution: IntDistribution | FloatDistribution, value: float) -> float:
    """The coordinate of a number, from 0 to 1: a step's middle, so that steps are equally far apart."""
    if distribution.log:
        half = 0.5 if isinstance(distribution, IntDistribution) else 0.0
        low, high = math.log(distribution.low - half), math.log(distribution.high + half)
        return (math.log(value) - low) / (high - low) if high > low else 0.5
    if distribution.step is None:
        width = distribution.high - distribution.low
        return (value - distribution.low) / width if distribution.high > distribution.low else 0.5
    return (round((value - distribution.low) / distribution.step) + 0.5) / _steps(distribution)


def params_at(distributions: Distributions, coordinates: Sequence[float]) -> Params:
    """The parameters at a point of the unit cube, one coordinate for each parameter."""
    pairs = zip(distributions.items(), coordinates, strict=True)
    return {name: value_at(distribution, coordinate) for (name, distribution), coordinate in pairs}


def coordinates(distributions: Distributions, params: Mapping[str, Any]) -> list[float]:
    """A point of the unit cube that gives these parameters; a parameter that is missing is in the middle."""
    point: list[float] = []
    for name, distribution in distributions.items():
        if name not in params:
            point.append(0.5)
        elif isinstance(distribution, CategoricalDistribution):
            point.append((distribution.choices.index(params[name]) + 0.5) / len(distribution.choices))
        else:
            assert isinstance(distribution, IntDistribution | FloatDistribution)
            point.append(coordinate_of(distribution, params[name]))
    return point


def features(distributions: Distributions, params: Mapping[str, Any]) -> np.ndarray:
    """Parameters as float64 numbers from 0 to 1: one for each number, one for each choice of several.

    A number that a configuration lacks (the width of a block that it has not) is in the middle.
    """
    row: list[float] = []
    for name, distribution in distributions.items():
        if isinstance(distribution, CategoricalDistribution):
            row += [float(name in params and params[name] == choice) for choice in distribution.choices]
        else:
            assert isinstance(distribution, IntDistribution | FloatDistribution)
            row.append(coordinate_of(distribution, params[name]) if name in params else 0.5)
    return np.array(row)


def _steps(distribution: IntDistribution | FloatDistribution) -> int:
    return round((distribution.high - distribution.low) / (distribution.step or 1)) + 1


def _cell(coordinate: float, cells: int) -> int:
    return min(int(coordinate * cells), cells - 1)
