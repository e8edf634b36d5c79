"""What other pruners would have made of a study."""

import json
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from data.errors import UserError
from search.config.study_file import ConfirmConfig, PrunerConfig, StudyConfig, find_study
from search.samplers.pruner_replay import PrunerReplay, replay
from support.command import Command


def trained(number: int, end: float, epochs: int = 4, stopped_after: int | None = None) -> FrozenTrial:
    """A trial that gains a tenth an epoch, or the beginning of one."""
    seen = stopped_after or epochs
    made = create_trial(
        state=TrialState.PRUNED if stopped_after else TrialState.COMPLETE,
        value=None if stopped_after else end,
        params={"lr": 0.1 + 0.01 * number},
        distributions={"lr": FloatDistribution(0.01, 1.0)},
        user_attrs={"curve": [{"epoch": epoch, "seconds": 2.0} for epoch in range(1, seen + 1)]},
        intermediate_values={epoch: end - 0.1 * (epochs - epoch) for epoch in range(1, seen + 1)},
    )
    made.number = number
    return made


def definition(**changes: Any) -> StudyConfig:
    config = find_study("cpu")[1]
    return config.model_copy(update={"confirm": ConfirmConfig(configurations=2), **changes})


def rows_of(trials: list[FrozenTrial], **changes: Any) -> dict[str, PrunerReplay]:
    return {row.pruner: row for row in replay(trials, definition(**changes), draws=20).pruners}


WORSE = [trained(number, 0.8 - 0.02 * number) for number in range(12)]


def test_without_a_pruner_nothing_is_saved_and_nothing_lost() -> None:
    none = rows_of(WORSE)["none"]
    for estimate in (none.saved, none.stopped, none.best_stopped, none.lost):
        assert (estimate.mean, estimate.low, estimate.high) == (0, 0, 0)


def test_a_pruner_saves_the_epochs_of_what_it_stops() -> None:
    # Each trial is worse than all before; the median pruner looks after epoch 1, from the sixth trial on.
    median = rows_of(WORSE)["median"]
    assert median.stopped.mean == 7
    assert median.saved.mean == pytest.approx(7 * 3 / 48)
    assert (median.best_stopped.mean, median.lost.mean) == (0, 0)


def test_where_the_best_come_late_and_begin_slowly_a_pruner_loses_them() -> None:
    slow = trained(12, 0.95)
    slow.intermediate_values = {1: 0.1, 2: 0.2, 3: 0.6, 4: 0.95}
    rows = rows_of([*WORSE, slow])
    assert rows["median"].best_stopped.mean == 1
    assert rows["median"].lost.mean == pytest.approx(0.15)
    assert rows["none"].best_stopped.mean == 0


def test_this_studys_own_pruner_is_the_one_of_its_definition() -> None:
    own = {"pruner": PrunerConfig(kind="median", startup_trials=5, warmup_epochs=0)}
    rows = rows_of(WORSE, **own)
    assert rows["this study's"].saved == rows["median"].saved
    assert rows_of(WORSE, pruner=PrunerConfig(kind="none"))["this study's"].saved.mean == 0


def test_how_a_stopped_trial_would_have_ended_is_drawn() -> None:
    noisy = [trained(number, 0.6 + 0.03 * ((7 * number) % 5) + 0.01 * number) for number in range(10)]
    near = [trained(10 + number, 0.75, stopped_after=1) for number in range(4)]
    replayed = replay([*noisy, *near], definition(), draws=40)
    assert (replayed.trials, replayed.whole, replayed.epochs, replayed.top, replayed.draws) == (14, 10, 4, 2, 40)
    rows = {row.pruner: row for row in replayed.pruners}
    assert rows["none"].best_stopped.high == 0
    assert any(row.best_stopped.low < row.best_stopped.high for row in replayed.pruners)
    assert replay([*noisy, *near], definition(), draws=40) == replayed


def test_trials_that_say_nothing_of_pruning_are_left_out() -> None:
    broken = trained(12, 0.5, stopped_after=2)
    broken.user_attrs["fault"] = "infeasible"
    failed = trained(13, 0.5)
    failed.state = TrialState.FAIL
    assert replay([*WORSE, broken, failed], definition(), draws=1).trials == 12


def test_too_few_trials_and_pareto_searches_are_refused() -> None:
    with pytest.raises(UserError, match="4 trials ran to their end; a replay needs 5"):
        replay(WORSE[:4], definition(), draws=1)
    with pytest.raises(UserError, match="stops nothing early"):
        replay(WORSE, definition(objective="accuracy,flops"), draws=1)


def test_the_command_prints_a_table_or_json(search: Command, tiny: Path) -> None:
    assert search("run", "--study", tiny, "--dataset", "digits", "--no-finale", "--trials", 6).status == 0
    ended = search("replay", "--name", "tiny")
    assert ended.status == 0
    assert ended.out.startswith("6 trials of 2 epochs, ")
    for name in ("none", "this study's", "successive halving"):
        assert name in ended.out
    table = json.loads(search("replay", "--format", "json").out)
    assert [row["pruner"] for row in table["pruners"]][:2] == ["none", "this study's"]
    assert table["pruners"][0]["saved"] == {"mean": 0, "low": 0, "high": 0}


def test_the_command_on_what_cannot_be_replayed(search: Command, tiny: Path) -> None:
    assert search("replay").complaint == "no database studies/search.db; `python -m search run` creates one"
    assert search("run", "--study", tiny, "--dataset", "digits", "--no-finale", "--trials", 2).status == 0
    assert search("replay").complaint == "2 trials ran to their end; a replay needs 5"
    assert search("replay", "--name", "other").complaint == "no study 'other': this storage has tiny"
