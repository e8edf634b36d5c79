"""Searches on a simulated clock, over a surrogate without noise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial

from benchmarks.searching.clock import Ended, Method, simulate
from benchmarks.searching.surrogate import Curve
from search.config.space import parse_space

SPACE = parse_space({"blocks": {"low": 3, "high": 6}, "lr": {"low": 0.01, "high": 1, "log": True}})


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
    assert [(trial.number, trial.seconds) for trial in ended] == [(0, 9.5), (1, 28), (2, 40.5), (3, 56)]
    assert [trial.whole for trial in ended] == pytest.approx([0.3, 0.6, 0.4, 0.5])
    assert not any(trial.stopped for trial in ended)


def test_workers_take_the_next_the_moment_they_are_free() -> None:
    ended = searched(workers=2)
    assert [(trial.number, trial.seconds) for trial in ended] == [(0, 9), (1, 18), (2, 21), (3, 33)]


def test_time_is_up_for_what_has_not_ended() -> None:
    assert [trial.number for trial in searched(seconds=40.0)] == [0, 1, 2]


def test_a_stopped_training_costs_its_epochs_and_its_end_stays_unknown_to_the_search() -> None:
    ended = searched(pruner=AfterFirst())
    assert [(trial.number, trial.seconds, trial.stopped) for trial in ended] == [
        (0, 3, True), (1, 21, False), (2, 25, True), (3, 40, False),
    ]  # fmt: skip
    assert [len(trial.curve) for trial in ended] == [1, 3, 1, 3]
    assert ended[0].whole == pytest.approx(0.3)


def test_audited_trainings_go_on_and_say_when_they_would_have_been_stopped() -> None:
    ended = searched(pruner=AfterFirst(), audited=1.0)
    assert [(trial.stopped, trial.would_stop, len(trial.curve)) for trial in ended] == [
        (False, 1, 3), (False, None, 3), (False, 1, 3), (False, None, 3),
    ]  # fmt: skip


def test_the_pruner_is_not_asked_about_slots_that_are_spared() -> None:
    ended = searched(pruner=AfterFirst(), spared=(2,))
    assert [(trial.stopped, trial.would_stop) for trial in ended] == [
        (True, 1),
        (False, None),
        (False, None),
        (False, None),
    ]


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
