"""A search space as the unit cube: points of it as parameters, and parameters as features of a regression.

Every number is spread evenly over 0 to 1 on the scale that it is drawn on (logarithmic, in steps), so that a distance
means the same in every direction.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

Forms = Mapping[str, BaseDistribution]
"""Every parameter of a space with its distribution (`search.config.space.parameter_distributions`)."""


def value_at(form: BaseDistribution, place: float) -> Any:
    """The value of a parameter at a place from 0 (included) to 1 (excluded) of its range; equal places, equal odds."""
    if isinstance(form, CategoricalDistribution):
        return form.choices[_cell(place, len(form.choices))]
    assert isinstance(form, IntDistribution | FloatDistribution)
    if form.log and isinstance(form, IntDistribution):
        low, high = math.log(form.low - 0.5), math.log(form.high + 0.5)
        return min(max(round(math.exp(low + place * (high - low))), form.low), form.high)
    if form.log:
        low, high = math.log(form.low), math.log(form.high)
        return min(max(math.exp(low + place * (high - low)), form.low), form.high)
    if form.step is None:
        return form.low + place * (form.high - form.low)
    value = form.low + _cell(place, _steps(form)) * form.step
    return value if isinstance(form, IntDistribution) else min(value, form.high)


def coordinate_of(form: IntDistribution | FloatDistribution, value: float) -> float:
    """The place of a number in its range, from 0 to 1: a step's middle, so that steps are equally far apart."""
    if form.log:
        half = 0.5 if isinstance(form, IntDistribution) else 0.0
        low, high = math.log(form.low - half), math.log(form.high + half)
        return (math.log(value) - low) / (high - low) if high > low else 0.5
    if form.step is None:
        return (value - form.low) / (form.high - form.low) if form.high > form.low else 0.5
    return (round((value - form.low) / form.step) + 0.5) / _steps(form)


def point(forms: Forms, places: Sequence[float]) -> dict[str, Any]:
    """The parameters at a point of the unit cube, one coordinate a parameter."""
    return {name: value_at(form, place) for (name, form), place in zip(forms.items(), places, strict=True)}


def coordinates(forms: Forms, params: Mapping[str, Any]) -> list[float]:
    """A point of the unit cube that gives these parameters; in the middle for one that a configuration lacks."""
    found: list[float] = []
    for name, form in forms.items():
        if name not in params:
            found.append(0.5)
        elif isinstance(form, CategoricalDistribution):
            found.append((form.choices.index(params[name]) + 0.5) / len(form.choices))
        else:
            assert isinstance(form, IntDistribution | FloatDistribution)
            found.append(coordinate_of(form, params[name]))
    return found


def features(forms: Forms, params: Mapping[str, Any]) -> np.ndarray:
    """Parameters as float64 numbers from 0 to 1: one for each number, one for each choice of several.

    A parameter that a configuration lacks (the width of a block that it has not) stands in the middle.
    """
    row: list[float] = []
    for name, form in forms.items():
        if isinstance(form, CategoricalDistribution):
            row += [float(name in params and params[name] == choice) for choice in form.choices]
        else:
            assert isinstance(form, IntDistribution | FloatDistribution)
            row.append(coordinate_of(form, params[name]) if name in params else 0.5)
    return np.array(row)


def _steps(form: IntDistribution | FloatDistribution) -> int:
    return round((form.high - form.low) / (form.step or 1)) + 1


def _cell(place: float, cells: int) -> int:
    return min(int(place * cells), cells - 1)
