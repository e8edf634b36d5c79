"""Which trials are stopped early."""

from collections.abc import Sequence

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, PercentilePruner
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.config.study_file import PrunerConfig, find_study
from search.samplers.pruner import TolerantPercentilePruner, build_pruner

CURVES = [(0.40 + 0.01 * row, 0.60 + 0.01 * row) for row in range(10)]


def study_of(curves: Sequence[Sequence[float]], apart: float | None, direction: str = "maximize") -> optuna.Study:
    """Trials that ended, and two of one configuration whose accuracies are this far apart at every epoch."""
    study = optuna.create_study(direction=direction)
    sign = 1 if direction == "maximize" else -1
    repeats = [] if apart is None else [(0.9 + apart, 0.9 + apart), (0.9, 0.9)]
    for row, curve in enumerate([*curves, *repeats]):
        study.add_trial(
            create_trial(
                params={"x": min(row, len(curves)) / 100},
                distributions={"x": FloatDistribution(0, 1)},
                value=sign * curve[-1],
                intermediate_values={epoch: sign * value for epoch, value in enumerate(curve, 1)},
            )
        )
    return study


def stops(pruner: BasePruner, study: optuna.Study, *curve: float) -> bool:
    sign = 1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1
    values = {epoch: sign * value for epoch, value in enumerate(curve, 1)}
    trial = create_trial(state=TrialState.RUNNING, params={}, distributions={}, intermediate_values=values)
    stopped = pruner.prune(study, trial)
    assert trial.intermediate_values == values
    return stopped


PLAIN = PercentilePruner(75.0, n_startup_trials=5, n_warmup_steps=0)
TOLERANT = TolerantPercentilePruner(75.0, n_startup_trials=5, n_warmup_steps=0)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_it_stops_what_is_worse_than_chance_explains_and_no_other(direction: str) -> None:
    quiet, loud = (study_of(CURVES, apart, direction) for apart in (0.001, 0.05))
    for study in (quiet, loud):
        assert stops(PLAIN, study, 0.41)
        assert stops(TOLERANT, study, 0.30)
        assert not stops(TOLERANT, study, 0.48)
    assert stops(TOLERANT, quiet, 0.41)
    assert not stops(TOLERANT, loud, 0.41)


def test_until_the_noise_is_known_it_is_optunas_pruner() -> None:
    study = study_of(CURVES, None)
    for value in (0.1, 0.3, 0.41, 0.42, 0.43, 0.45, 0.6):
        assert stops(TOLERANT, study, value) == stops(PLAIN, study, value)


def test_it_goes_by_the_noise_of_the_trials_epoch() -> None:
    study = study_of(CURVES, 0.001)
    first, second = study.trials[-2:]
    assert first.params == second.params
    loud_at_first = study_of(CURVES, None)
    for trial, early in ((first, 0.95), (second, 0.85)):
        loud_at_first.add_trial(with_first_epoch(trial, early))
    assert not stops(TOLERANT, loud_at_first, 0.41)
    assert stops(TOLERANT, loud_at_first, 0.41, 0.60)


def with_first_epoch(trial: FrozenTrial, value: float) -> FrozenTrial:
    return create_trial(
        params=trial.params,
        distributions=trial.distributions,
        value=trial.value,
        intermediate_values={**trial.intermediate_values, 1: value},
    )


@pytest.mark.parametrize(
    ("kind", "form"), [("none", NopPruner), ("median", MedianPruner), ("percentile", TolerantPercentilePruner)]
)
def test_a_study_file_chooses(kind: str, form: type[BasePruner]) -> None:
    config = find_study("cpu")[1].model_copy(update={"pruner": PrunerConfig(kind=kind)})
    assert type(build_pruner(config)) is form
