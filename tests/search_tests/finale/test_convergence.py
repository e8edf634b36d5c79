"""When a training is long enough."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.finale.convergence import SeedDeviation, TrainedLength, first_length, judge_length, last_slope
from search.results import LengthLimits

NOISE = SeedDeviation(0.005, at=0.5, images=5000)


FREE = LengthLimits(first=10, longest=80, seconds=None, finals=3, final_share=1.1)


def watched(*accuracies: float) -> list[TrainedLength]:
    return [TrainedLength(10 * 2**row, accuracy, 100.0 * 2**row) for row, accuracy in enumerate(accuracies)]


def test_one_training_says_nothing_yet_so_it_is_doubled() -> None:
    verdict = judge_length(watched(0.9), NOISE, FREE)
    assert (verdict.next, verdict.converged, verdict.stopped_by) == (20, None, None)


def test_a_doubling_that_helps_by_more_than_noise_is_followed_by_another() -> None:
    verdict = judge_length(watched(0.80, 0.85), NOISE, FREE)
    assert (verdict.next, verdict.converged, verdict.epochs) == (40, False, 20)


def test_a_doubling_within_noise_ends_it_and_the_better_length_is_taken() -> None:
    verdict = judge_length(watched(0.80, 0.85, 0.853), NOISE, FREE)
    assert (verdict.next, verdict.converged, verdict.stopped_by, verdict.epochs) == (None, True, "noise", 40)
    worse = judge_length(watched(0.80, 0.85, 0.849), NOISE, FREE)
    assert (worse.converged, worse.epochs) == (True, 20)
    assert judge_length(watched(0.80, 0.85, 0.85), NOISE, FREE).epochs == 20


def test_the_longest_allowed_ends_it_unconverged() -> None:
    verdict = judge_length(watched(0.5, 0.6, 0.7, 0.8), NOISE, FREE)
    assert (verdict.next, verdict.converged, verdict.stopped_by, verdict.epochs) == (None, False, "max epochs", 80)
    odd = LengthLimits(first=10, longest=15, seconds=None, finals=1, final_share=1.1)
    assert judge_length(watched(0.5), NOISE, odd).next == 15


def test_a_doubling_is_tried_where_time_remains_for_final_trainings_twice_as_long() -> None:
    # 10 epochs took 100 s. 20 more take 200 s, and three finals of 40 epochs at 1.1 1,320 s.
    enough, short = (LengthLimits(10, 80, seconds, 3, 1.1) for seconds in (1621, 1619))
    assert judge_length(watched(0.8), NOISE, enough).next == 20
    verdict = judge_length(watched(0.8), NOISE, short)
    assert (verdict.next, verdict.stopped_by, verdict.converged) == (None, "time", None)


def test_where_time_runs_out_while_longer_still_helps_all_that_is_left_goes_to_the_final_trainings() -> None:
    # 700 s of 1,000 are left; a final epoch of three seeds takes 33 s.
    verdict = judge_length(watched(0.7, 0.8), NOISE, LengthLimits(10, 80, 1000, 3, 1.1))
    assert (verdict.stopped_by, verdict.converged, verdict.epochs) == ("time", False, 21)
    held = judge_length(watched(0.7, 0.8), NOISE, LengthLimits(10, 80, 350, 3, 1.1))
    assert held.epochs == 20  # never shorter than what was watched
    assert judge_length(watched(0.8), NOISE, LengthLimits(10, 25, 1000, 1, 1.0)).next == 20


def test_the_first_training_is_shortened_where_it_would_not_fit() -> None:
    limits = LengthLimits(first=10, longest=80, seconds=100, finals=1, final_share=1.0)
    assert first_length(limits, seconds_per_epoch=5.0) == 10
    assert first_length(limits, seconds_per_epoch=10.0) == 5
    assert first_length(limits, seconds_per_epoch=1000.0) == 1
    assert first_length(LengthLimits(10, 4, None, 1, 1.0), 1.0) == 4


def test_noise_shrinks_with_the_number_of_errors_and_is_never_above_the_binomial() -> None:
    assert NOISE.expected(0.5) == pytest.approx(0.005)
    assert NOISE.expected(0.9) == pytest.approx(0.005 * math.sqrt(0.09 / 0.25))
    binomial = math.sqrt(0.25 / 5000)
    assert SeedDeviation(None, 0.5, 5000).expected(0.5) == pytest.approx(binomial)
    assert SeedDeviation(0.5, 0.5, 5000).expected(0.5) == pytest.approx(binomial)
    assert NOISE.expected(1.0) == 0


@given(
    st.lists(st.floats(0.1, 0.99), min_size=1, max_size=5),
    st.integers(1, 50),
    st.integers(1, 400),
    st.none() | st.floats(1, 1e5),
)
def test_lengthening_always_ends_within_the_limits(
    accuracies: list[float], first: int, longest: int, seconds: float | None
) -> None:
    limits = LengthLimits(first, longest, seconds, 2, 1.1)
    done = [TrainedLength(first_length(limits, 1.0), accuracies[0], 10.0)]
    for number in range(1, 12):
        verdict = judge_length(done, NOISE, limits)
        if verdict.next is None:
            assert verdict.stopped_by is not None
            assert verdict.epochs in {one.epochs for one in done} or verdict.stopped_by == "time"
            assert verdict.epochs <= max(longest, done[-1].epochs)
            return
        assert done[-1].epochs < verdict.next <= longest
        done.append(TrainedLength(verdict.next, accuracies[number % len(accuracies)], 10.0 * verdict.next))
    pytest.fail("it went on for ever")


def test_the_slope_of_the_last_fifth_with_its_interval() -> None:
    rng = np.random.default_rng(0)
    rising = [0.01 * epoch + rng.normal(0, 1e-3) for epoch in range(50)]
    slope = last_slope(rising)
    assert slope is not None
    assert slope.low < 0.01 < slope.high
    assert slope.low > 0
    flat = last_slope([0.5 + rng.normal(0, 1e-3) for _ in range(50)])
    assert flat is not None
    assert flat.low < 0 < flat.high
    assert last_slope([0.1, 0.2]) is None
    assert last_slope([0.1, 0.2, 0.3]) is not None
