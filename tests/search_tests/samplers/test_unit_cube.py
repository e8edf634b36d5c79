import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from search.config.space import parameter_distributions
from search.config.study_file import find_study
from search.samplers.unit_cube import coordinate_of, features, params_at, value_at

COORDINATES = st.floats(0, 1, exclude_max=True)


@st.composite
def numbers(draw: st.DrawFn) -> IntDistribution | FloatDistribution:
    log = draw(st.booleans())
    if draw(st.booleans()):
        low, steps = draw(st.integers(1 if log else -50, 50)), draw(st.integers(0, 40))
        step = 1 if log else draw(st.integers(1, 7))
        return IntDistribution(low, low + steps * step, step=step, log=log)
    if log:
        low = draw(st.floats(1e-6, 10))
        return FloatDistribution(low, low * draw(st.floats(1, 1e4)), log=True)
    low, width = draw(st.integers(-20, 20)) / 4, draw(st.integers(0, 20)) / 4
    return FloatDistribution(low, low + width, step=draw(st.sampled_from([None, 0.25])))


@given(numbers(), COORDINATES)
def test_a_value_lies_in_its_range_and_comes_from_its_coordinate(
    distribution: IntDistribution | FloatDistribution, coordinate: float
) -> None:
    value = value_at(distribution, coordinate)
    assert distribution.low <= value <= distribution.high
    assert isinstance(value, int) == isinstance(distribution, IntDistribution)
    back = coordinate_of(distribution, value)
    assert 0 <= back <= 1
    assert math.isclose(value_at(distribution, min(back, 1 - 1e-12)), value, rel_tol=1e-9, abs_tol=1e-9)
    if distribution.step is not None and distribution.high > distribution.low and not distribution.log:
        steps = round((distribution.high - distribution.low) / distribution.step) + 1
        assert abs(back - coordinate) <= 0.5 / steps + 1e-6


def test_every_step_and_every_choice_gets_the_same_odds() -> None:
    coordinates = (np.arange(1200) + 0.5) / 1200
    distributions: list[BaseDistribution] = [
        IntDistribution(3, 6), FloatDistribution(0.2, 0.6, step=0.2), CategoricalDistribution(("a", "b", "c")),
    ]  # fmt: skip
    for distribution, kinds in zip(distributions, (4, 3, 3), strict=True):
        _, counts = np.unique(
            [str(value_at(distribution, coordinate)) for coordinate in coordinates], return_counts=True
        )
        assert counts.tolist() == [1200 // kinds] * kinds


@pytest.mark.parametrize("study", ["cpu", "cifar10", "seed"])
def test_a_point_of_a_shipped_space_is_one_that_the_space_could_draw(study: str) -> None:
    distributions = parameter_distributions(find_study(study)[1].space)
    for coordinate in (0.0, 0.3, 0.999):
        params = params_at(distributions, [coordinate] * len(distributions))
        for name, value in params.items():
            assert distributions[name]._contains(distributions[name].to_internal_repr(value))
        row = features(distributions, params)
        assert row.dtype == np.float64
        assert row.min() >= 0
        assert row.max() <= 1


def test_choices_have_a_feature_each_and_what_is_absent_stands_in_the_middle() -> None:
    distributions = {
        "blocks": IntDistribution(1, 4),
        "activation": CategoricalDistribution(("relu", "gelu")),
        "w": IntDistribution(0, 9),
    }
    assert features(distributions, {"blocks": 2, "activation": "gelu"}).tolist() == [0.375, 0, 1, 0.5]
