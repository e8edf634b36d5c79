"""Searches give what they gave: sampled configurations, losses, reports, weights and summaries, to the last bit.

Floating-point sums differ from processor to processor, so that holds on machines like those that
`tests/support/golden.py` has recorded; elsewhere the trainings' numbers are not compared.
"""

from pathlib import Path

import pytest

from support import golden

RECORDED = golden.recorded()


def expected(key: str) -> object:
    """What was recorded on a machine like this one."""
    if RECORDED is None:
        pytest.skip("nothing was recorded on such a processor and torch: see tests/support/golden.py")
    return RECORDED[key]


@pytest.mark.slow
@pytest.mark.parametrize("seed", golden.SEEDS)
def test_a_digits_study_with_finale_gives_the_same_bits(seed: int, tmp_path: Path) -> None:
    recorded = expected(f"digits-{seed}")
    assert golden.search("digits", seed, tmp_path / "run") == recorded


@pytest.mark.slow
@pytest.mark.parametrize("seed", golden.SEEDS)
@pytest.mark.usefixtures("cifar10_dir")
def test_a_cifar10_study_with_finale_gives_the_same_bits(seed: int, tmp_path: Path) -> None:
    recorded = expected(f"cifar10-{seed}")
    assert golden.search("cifar10", seed, tmp_path / "run") == recorded


def test_a_trial_costs_the_database_the_same_statements(tmp_path: Path) -> None:
    """Not a matter of the processor: any machine's recording will do."""
    anywhere = golden.any_recorded()
    assert golden.statements(tmp_path) == anywhere["statements"]
