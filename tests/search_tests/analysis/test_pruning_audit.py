import math
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.analysis.pruning_audit import pruning_audit

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def trial(
    number: int, value: float = 0.5, epochs: int = 4, state: TrialState = COMPLETE, **attributes: Any
) -> FrozenTrial:
    """A trial of 4 epochs whose accuracy grows evenly up to its value, unless it ended before."""
    made = create_trial(
        state=state,
        value=value if state == COMPLETE else None,
        params={"lr": 0.1},
        distributions={"lr": FloatDistribution(0.01, 1.0)},
        user_attrs={"config": {"network": {}, "fit": {"epochs": 4}}, **attributes},
        intermediate_values={epoch: value * epoch / 4 for epoch in range(1, epochs + 1)},
    )
    made.number = number
    return made


def study(complete: int, audited: dict[int, int]) -> list[FrozenTrial]:
    """Trials that ended COMPLETE, trial 0 the best; those audited with the epoch after which they were to stop."""
    stops = [{"would_stop": audited[n]} if n in audited else {} for n in range(complete)]
    return [trial(n, 0.9 - n / 1000, **stop) for n, stop in enumerate(stops)]


@pytest.mark.parametrize("trials", [[], [trial(0, state=FAIL)], [trial(0, state=TrialState.RUNNING)]])
def test_there_is_nothing_to_audit_before_a_trial_has_ended(trials: list[FrozenTrial]) -> None:
    assert pruning_audit(trials, 5) is None


def test_a_false_prune_is_an_audited_trial_among_the_best() -> None:
    found = pruning_audit(study(100, {0: 2, 4: 3, 5: 2, 99: 2}), top=5)
    assert found is not None
    assert (found.audited, found.false_prunes, found.top) == (4, (0, 4), 5)
    assert found.rate is not None
    assert found.rate.share == 0.5
    assert found.chance == 0.05
    # The exact interval of 2 in 4, from tables.
    assert (found.rate.low, found.rate.high) == pytest.approx((0.0676, 0.9324), abs=1e-4)


def test_of_equals_the_earlier_is_among_the_best() -> None:
    trials = [trial(n, 0.8, **({"would_stop": 2} if n in (1, 2) else {})) for n in range(4)]
    found = pruning_audit(trials, top=2)
    assert found is not None
    assert found.false_prunes == (1,)


def test_only_trials_that_ran_to_their_end_are_audited() -> None:
    stopped = [
        trial(8, epochs=2, state=PRUNED, would_stop=2),
        trial(9, epochs=2, state=FAIL, would_stop=2),
        trial(10, math.inf, would_stop=2),
    ]
    found = pruning_audit([*study(8, {}), *stopped], top=3)
    assert found is not None
    assert found.audited == 0
    assert found.rate is None


def test_epochs_saved_are_those_that_pruned_trials_did_not_train() -> None:
    trials = [
        *study(3, {}),
        trial(3, epochs=1, state=PRUNED),
        trial(4, epochs=2, state=PRUNED),
        trial(5, epochs=0, state=PRUNED, fault="infeasible"),
        trial(6, epochs=1, state=PRUNED, fault="non-finite loss"),
        trial(7, epochs=1, state=FAIL),
    ]
    found = pruning_audit(trials, top=1)
    assert found is not None
    assert (found.pruned, found.saved_epochs) == (2, 5)
    assert found.saved_share == pytest.approx(5 / 20)


def test_without_a_configuration_a_trials_length_is_the_longest_ones() -> None:
    stopped = trial(1, epochs=1, state=PRUNED)
    del stopped.user_attrs["config"]
    found = pruning_audit([trial(0), stopped], top=1)
    assert found is not None
    assert found.saved_epochs == 3


def test_correlation_is_told_for_every_epoch_before_the_last() -> None:
    def noisy(n: int) -> FrozenTrial:
        made = trial(n, n / 10)
        made.intermediate_values = {1: -n / 10, 2: n / 10, 3: 0.3, 4: n / 10}
        return made

    found = pruning_audit([noisy(n) for n in range(6)], top=2)
    assert found is not None
    first, second, third = found.correlation
    assert (first.epoch, first.n) == (1, 6)
    assert first.spearman == pytest.approx(-1)
    assert second.spearman == pytest.approx(1)
    assert third.spearman is None  # of a constant there is none


def test_of_four_trials_no_correlation_is_told() -> None:
    found = pruning_audit(study(4, {}), top=1)
    assert found is not None
    assert [(row.spearman, row.n) for row in found.correlation] == [(None, 4)] * 3


@pytest.mark.parametrize(
    ("audited", "harmful", "verdict"),
    [
        ({}, None, "nothing was pruned"),
        (dict.fromkeys(range(50, 59), 2), None, "too few audited trials to tell"),
        (dict.fromkeys(range(50, 60), 2), False, "pruning looks harmless"),
        ({0: 2, **dict.fromkeys(range(50, 59), 2)}, True, "pruning looks harmful: 1 of 10 trials"),
        ({0: 2, **dict.fromkeys(range(50, 90), 2)}, False, "pruning looks harmless"),
        ({0: 2, 60: 2}, None, "too few audited trials to tell"),
        ({0: 2, 1: 2, 2: 2}, True, "pruning looks harmful: 3 of 3 trials"),
    ],
)
def test_the_verdict(audited: dict[int, int], harmful: bool | None, verdict: str) -> None:
    found = pruning_audit(study(100, audited), top=5)
    assert found is not None
    assert found.harmful is harmful
    assert found.verdict.startswith(verdict)


def test_where_most_trials_are_among_the_best_nobody_can_tell() -> None:
    found = pruning_audit(study(8, dict.fromkeys(range(8), 2)), top=5)
    assert found is not None
    assert found.harmful is None
