"""Configurations compared over the same seeds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.analysis.noise import SeedNoise
from search.finale.comparison import Candidate, compare

SEEDS = (1, 2, 3)


def candidate(key: int, scores: list[float], cost: float = 1.0) -> Candidate:
    return Candidate(key, cost, dict(zip(SEEDS, scores, strict=False)))


def test_the_best_mean_wins_where_it_is_clear() -> None:
    result = compare([candidate(1, [0.80, 0.81, 0.82]), candidate(2, [0.90, 0.91, 0.925])], SEEDS)
    assert (result.winner, result.tied) == (2, (2,))
    assert [one.key for one in result.ranked] == [2, 1]
    assert result.behind == {2: 0.0, 1: pytest.approx(0.10167, abs=1e-4)}


def test_within_a_standard_error_the_cheaper_one_is_taken_and_the_tie_is_said() -> None:
    dear, cheap = candidate(1, [0.90, 0.92, 0.91], cost=5), candidate(2, [0.91, 0.90, 0.917], cost=2)
    result = compare([dear, cheap], SEEDS)
    assert result.ranked[0].key == 1
    assert (result.winner, result.tied) == (2, (1, 2))


def test_what_a_seed_does_to_all_alike_is_no_noise_of_their_difference() -> None:
    shifts = np.array([0.0, 0.03, -0.02])
    result = compare([candidate(1, list(0.8 + shifts)), candidate(2, list(0.79 + shifts))], SEEDS)
    assert result.noise_of_difference == pytest.approx(0, abs=1e-12)
    assert result.noise is not None
    assert (result.noise.std, result.noise.freedom) == (pytest.approx(float(np.std(shifts, ddof=1))), 4)
    assert result.tied == (1,)


def test_the_error_of_a_difference_is_that_of_the_paired_test() -> None:
    """For two configurations the block design is the paired t-test."""
    first, second = np.array([0.81, 0.84, 0.80]), np.array([0.79, 0.83, 0.80])
    result = compare([candidate(1, list(first)), candidate(2, list(second))], SEEDS)
    expected = float(np.std(first - second, ddof=1)) / math.sqrt(3)
    assert result.noise_of_difference == pytest.approx(expected)
    assert result.margin == pytest.approx(4.302653 * expected)


def test_noise_known_from_before_joins_in_with_its_degrees_of_freedom() -> None:
    rows = [candidate(1, [0.80, 0.81, 0.82]), candidate(2, [0.81, 0.80, 0.83])]
    alone, together = compare(rows, SEEDS), compare(rows, SEEDS, SeedNoise(0.02, 4))
    assert alone.noise_of_difference is not None
    pooled = (2 * (alone.noise_of_difference**2 * 3 / 2) + 4 * 0.02**2) / 6
    assert together.noise_of_difference == pytest.approx(math.sqrt(2 * pooled / 3))
    assert together.margin == pytest.approx(2.446912 * math.sqrt(2 * pooled / 3))
    assert together.noise is not None
    assert together.noise.freedom == 8
    assert alone.noise is not None
    assert alone.noise.std < together.noise.std < 0.02


def test_noise_known_from_before_calls_a_tie_where_one_seed_could_not() -> None:
    rows = [Candidate(1, 5.0, {1: 0.80}), Candidate(2, 1.0, {1: 0.79})]
    assert compare(rows, (1,)).winner == 1
    result = compare(rows, (1,), SeedNoise(0.01, 2))
    assert result.noise_of_difference == pytest.approx(0.01 * math.sqrt(2))
    assert (result.winner, result.tied) == (2, (1, 2))
    assert compare([], (1,), SeedNoise(0.01, 2)).winner is None


def test_a_configuration_that_lacks_a_seed_does_not_win_over_one_that_has_all() -> None:
    result = compare([candidate(1, [0.99]), candidate(2, [0.5, 0.5, 0.5])], SEEDS)
    assert result.winner == 2
    assert [one.key for one in result.ranked] == [2, 1]
    assert 1 not in result.behind


def test_one_seed_or_one_configuration_leaves_the_noise_unknown() -> None:
    alone = compare([Candidate(1, 1.0, {1: 0.5})], (1,))
    assert (alone.noise, alone.noise_of_difference, alone.margin, alone.winner) == (None, None, None, 1)
    assert compare([Candidate(1, 1.0, {})], (1,)).winner is None
    assert compare([], (1,)).winner is None


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=6),
    st.lists(st.floats(1, 10), min_size=6, max_size=6),
)
def test_the_winner_is_always_one_of_the_tied_and_none_of_these_is_cheaper(
    table: list[list[float]], costs: list[float]
) -> None:
    candidates = [candidate(key, scores, costs[key]) for key, scores in enumerate(table)]
    result = compare(candidates, SEEDS)
    assert result.ranked[0].key in result.tied
    assert result.winner in result.tied
    cost = {one.key: one.cost for one in candidates}
    assert result.winner is not None
    assert cost[result.winner] == min(cost[key] for key in result.tied)
    means = [one.mean or 0.0 for one in result.ranked]
    assert means == sorted(means, reverse=True)
