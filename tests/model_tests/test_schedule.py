import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.fit import lr_factor


@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from(["linear", "cosine", "constant"]))
def test_it_stays_within_the_peak_and_climbs_before_it_falls(steps: int, warmup: float, schedule: str) -> None:
    factors = [lr_factor(step, steps, warmup, schedule) for step in range(steps)]  # type: ignore[arg-type]
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


def test_linear_schedule_by_hand() -> None:
    assert [lr_factor(step, 10, 0.2, "linear") for step in (0, 1, 2, 9)] == pytest.approx([0.5, 1, 8 / 9, 1 / 9])


def test_constant_schedule_stays() -> None:
    assert lr_factor(99, 100, 0, "constant") == 1
