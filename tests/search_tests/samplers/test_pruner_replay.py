"""Searches on a simulated clock, over curves that were measured."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from benchmarks.searching.clock import Ended, Method, simulate
from benchmarks.searching.surrogate import Curve, fit_surrogate
from data.errors import UserError
from search.config.space import parse_space
from search.config.study_file import ConfirmConfig, PrunerConfig, StudyConfig, find_study
from search.samplers.pruner_replay import Replayed, replay
from search.samplers.unit_cube import point
from support.command import Command

FORMS = {"blocks": IntDistribution(1, 4), "lr": FloatDistribution(0.01, 1, log=True)}
SPACE = parse_space({"blocks": {"low": 3, "high": 6}, "lr": {"low": 0.01, "high": 1, "log": True}})


def truth(params: Mapping[str, Any]) -> np.ndarray:
    end = 0.5 + 0.05 * params["blocks"] - 0.05 * (np.log10(params["lr"]) + 1) ** 2
    return end - np.array([0.2, 0.1, 0.0])


def measured(count: int, repeats: int, noise: float = 0.01) -> list[Curve]:
    rng = np.random.default_rng(0)
    curves = []
    for row in range(count):
        params = point(FORMS, rng.random(2).tolist())
        for _ in range(1 + repeats * (row % 4 == 0)):
            accuracy = truth(params) + noise * rng.standard_normal() + 0.001 * rng.standard_normal(3)
            curves.append(Curve(params, tuple(accuracy), (float(params["blocks"]),) * 3))
    return curves


def test_a_surrogate_finds_the_mean_the_noise_and_the_cost() -> None:
    surrogate = fit_surrogate(FORMS, measured(80, 2))
    unseen = [{"blocks": blocks, "lr": lr} for blocks in (1, 2, 4) for lr in (0.03, 0.1, 0.5)]
    assert np.abs(surrogate.mean(unseen) - [truth(params) for params in unseen]).max() < 0.015
    assert np.allclose(surrogate.seconds(unseen), [params["blocks"] for params in unseen], rtol=0.05)
    assert surrogate.error.seeds == pytest.approx(0.01, rel=0.3)
    assert surrogate.error.rmse == pytest.approx(0.01, rel=0.4)
    assert surrogate.error.spearman > 0.9
    assert surrogate.error.seconds < 0.05
    # A seed moves the whole curve.
    assert surrogate.noise[0, 2] / surrogate.noise[2, 2] > 0.8


def test_a_training_that_diverged_is_worth_a_guess_from_there_on() -> None:
    curves = measured(20, 2, noise=0)
    broken = [Curve({"blocks": 4, "lr": 0.9}, (0.3,), (4.0,))] * 2
    surrogate = fit_surrogate(FORMS, [*curves, *broken], chance=0.1)
    assert surrogate.mean([{"blocks": 4, "lr": 0.9}])[0, -1] < 0.5


def test_without_repeats_nothing_is_known_of_the_noise() -> None:
    with pytest.raises(ValueError, match="no configuration was trained twice"):
        fit_surrogate(FORMS, measured(20, 0))


def test_draws_follow_their_random_numbers() -> None:
    surrogate = fit_surrogate(FORMS, measured(20, 2))
    params = {"blocks": 2, "lr": 0.1}
    first, again = (surrogate.draw(params, np.random.default_rng(3)) for _ in range(2))
    assert first == again
    drawn = [surrogate.draw(params, np.random.default_rng(seed)).accuracy[-1] for seed in range(300)]
    assert np.std(drawn) == pytest.approx(surrogate.error.seeds, rel=0.15)


@dataclass(frozen=True)
class Plain:
    """A surrogate without noise: an epoch takes as many seconds as there are blocks."""

    epochs: int = 3

    def draw(self, params: Mapping[str, Any], rng: np.random.Generator) -> Curve:
        rng.random()
        ends = 0.1 * params["blocks"]
        return Curve(params, (ends - 0.2, ends - 0.1, ends), (float(params["blocks"]),) * self.epochs)


class AfterFirst(BasePruner):
    """Stops what has fewer than five blocks after its first epoch."""

    def prune(self, _: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return bool(trial.params["blocks"] < 5)


def sampler_of(seed: int) -> Any:
    sampler = RandomSampler(seed=seed)
    return lambda _: sampler


STARTS = tuple({"blocks": blocks, "lr": 0.1} for blocks in (3, 6, 4, 5))


def searched(
    pruner: BasePruner | None = None,
    starts: Sequence[Mapping[str, Any]] = STARTS,
    audited: float = 0.0,
    spared: Sequence[int] = (),
    seed: int = 0,
    trials: int = 4,
    seconds: float = 1e9,
    **options: Any,
) -> list[Ended]:
    def given(slot: int, _: object) -> Mapping[str, Any]:
        return starts[slot] if slot < len(starts) else {}

    method = Method(lambda seed: (sampler_of(seed), pruner or NopPruner()), given, audited, spared)
    return simulate(Plain(), SPACE, method, seed, seconds, trials=trials, **options)  # type: ignore[arg-type]


def test_one_worker_takes_one_after_the_other() -> None:
    ended = searched(overhead=0.5)
    assert [(one.number, one.seconds) for one in ended] == [(0, 9.5), (1, 28), (2, 40.5), (3, 56)]
    assert [one.whole for one in ended] == pytest.approx([0.3, 0.6, 0.4, 0.5])
    assert not any(one.stopped for one in ended)


def test_workers_take_the_next_the_moment_they_are_free() -> None:
    ended = searched(workers=2)
    assert [(one.number, one.seconds) for one in ended] == [(0, 9), (1, 18), (2, 21), (3, 33)]


def test_time_is_up_for_what_has_not_ended() -> None:
    assert [one.number for one in searched(seconds=40.0)] == [0, 1, 2]


def test_a_stopped_training_costs_its_epochs_and_its_end_stays_unknown_to_the_search() -> None:
    ended = searched(pruner=AfterFirst())
    assert [(one.number, one.seconds, one.stopped) for one in ended] == [
        (0, 3, True), (1, 21, False), (2, 25, True), (3, 40, False),
    ]  # fmt: skip
    assert [len(one.curve) for one in ended] == [1, 3, 1, 3]
    assert ended[0].whole == pytest.approx(0.3)


def test_audited_trainings_go_on_and_say_when_they_would_have_been_stopped() -> None:
    ended = searched(pruner=AfterFirst(), audited=1.0)
    assert [(one.stopped, one.would_stop, len(one.curve)) for one in ended] == [
        (False, 1, 3), (False, None, 3), (False, 1, 3), (False, None, 3),
    ]  # fmt: skip


def test_the_pruner_is_not_asked_about_slots_that_are_spared() -> None:
    ended = searched(pruner=AfterFirst(), spared=(2,))
    assert [(one.stopped, one.would_stop) for one in ended] == [(True, 1), (False, None), (False, None), (False, None)]


def test_what_a_slot_is_given_may_go_by_the_trials_before_it() -> None:
    def given(slot: int, trials: Callable[[], Sequence[FrozenTrial]]) -> Mapping[str, Any]:
        return trials()[0].params if slot == 3 else {}

    method = Method(lambda seed: (sampler_of(seed), NopPruner()), given)
    ended = simulate(Plain(), SPACE, method, 0, 1e9, trials=5)  # type: ignore[arg-type]
    assert ended[3].params == ended[0].params
    assert ended[4].params != ended[0].params != ended[1].params


def test_the_same_seed_searches_alike() -> None:
    assert searched(starts=(), seed=5, trials=6) == searched(starts=(), seed=5, trials=6)
    assert searched(starts=(), seed=5, trials=6) != searched(starts=(), seed=6, trials=6)


# What other pruners would have made of a study


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


def rows_of(trials: list[FrozenTrial], **changes: Any) -> dict[str, Replayed]:
    return {row.pruner: row for row in replay(trials, definition(**changes), draws=20).pruners}


WORSE = [trained(number, 0.8 - 0.02 * number) for number in range(12)]


def test_without_a_pruner_nothing_is_saved_and_nothing_lost() -> None:
    none = rows_of(WORSE)["none"]
    for told in (none.saved, none.stopped, none.best_stopped, none.lost):
        assert (told.mean, told.low, told.high) == (0, 0, 0)


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
    found = replay([*noisy, *near], definition(), draws=40)
    assert (found.trials, found.whole, found.epochs, found.top, found.draws) == (14, 10, 4, 2, 40)
    rows = {row.pruner: row for row in found.pruners}
    assert rows["none"].best_stopped.high == 0
    assert any(row.best_stopped.low < row.best_stopped.high for row in found.pruners)
    assert replay([*noisy, *near], definition(), draws=40) == found


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
    told = search("replay", "--name", "tiny")
    assert told.status == 0
    assert told.out.startswith("6 trials of 2 epochs, ")
    for name in ("none", "this study's", "successive halving"):
        assert name in told.out
    table = json.loads(search("replay", "--format", "json").out)
    assert [row["pruner"] for row in table["pruners"]][:2] == ["none", "this study's"]
    assert table["pruners"][0]["saved"] == {"mean": 0, "low": 0, "high": 0}


def test_the_command_on_what_cannot_be_replayed(search: Command, tiny: Path) -> None:
    assert search("replay").complaint == "no database studies/search.db; `python -m search run` creates one"
    assert search("run", "--study", tiny, "--dataset", "digits", "--no-finale", "--trials", 2).status == 0
    assert search("replay").complaint == "2 trials ran to their end; a replay needs 5"
    assert search("replay", "--name", "other").complaint == "no study 'other': this storage has tiny"
