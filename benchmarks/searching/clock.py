"""A search on a simulated clock: real samplers and pruners, trainings drawn from a surrogate.

Workers are asynchronous, as in a real study: each takes its next configuration as soon as it is free, and the sampler
and the pruner know only what was reported by then.
"""

import heapq
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from benchmarks.searching.surrogate import Curve, Surrogate
from search.attributes import SLOT
from search.config.space import SearchSpace, sample

SamplerAt = Callable[[int], BaseSampler]
"""The sampler of each slot; a sampler with a memory is the same for all slots."""

Given = Callable[[int, Callable[[], Sequence[FrozenTrial]]], Mapping[str, Any]]
"""Parameters that a slot is given, from its number and the trials so far."""


@dataclass(frozen=True)
class Method:
    """How a search proposes configurations and stops trainings.

    Attributes:
        make: sampler and pruner of a search with that seed.
        given: see `Given`.
        audited: share of the configurations that run to their end even if the pruner would stop them.
        spared: slots that the pruner is not asked about.
    """

    make: Callable[[int], tuple[SamplerAt, BasePruner]]
    given: Given = lambda slot, trials: {}  # noqa: ARG005
    audited: float = 0.0
    spared: Container[int] = ()


@dataclass(frozen=True)
class Ended:
    """One configuration of a simulated search.

    Attributes:
        seconds: on the clock, when it ended.
        number: in the order of starting.
        params: Optuna parameters.
        curve: accuracy after each epoch that was trained.
        whole: accuracy at the end of the whole training.
        stopped: by the pruner.
        would_stop: the epoch after which the pruner wanted to stop it, whether or not it did.
    """

    seconds: float
    number: int
    params: Mapping[str, Any]
    curve: tuple[float, ...]
    whole: float
    stopped: bool
    would_stop: int | None


@dataclass
class _Running:
    trial: Trial
    curve: Curve
    epoch: int = 0
    would_stop: int | None = None


def simulate(
    surrogate: Surrogate,
    space: SearchSpace,
    method: Method,
    seed: int,
    seconds: float,
    workers: int = 1,
    overhead: float = 0.0,
    trials: int | None = None,
) -> list[Ended]:
    """Search until the clock is past ``seconds`` or ``trials`` have begun; those that ended by then, in that order.

    Args:
        surrogate: of the space's curves.
        space: to sample from.
        method: of searching.
        seed: of sampler, pruner, training seeds and audit; two methods with one seed get the same noise.
        seconds: of every worker.
        workers: that search at once.
        overhead: seconds of a trial besides its epochs.
        trials: at most; None: as many as time allows.
    """
    noise, audit_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    sampler_at, pruner = method.make(seed)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    ended: list[Ended] = []
    begun = 0
    events: list[tuple[float, int, _Running]] = []

    def begin(time: float) -> None:
        nonlocal begun
        if trials is not None and begun >= trials:
            return
        study.sampler = sampler_at(begun)
        if given := method.given(begun, partial(study.get_trials, deepcopy=False)):
            study.enqueue_trial(dict(given))
        trial = study.ask()
        trial.set_user_attr(SLOT, begun)
        sample(space, trial)
        begun += 1
        running = _Running(trial, surrogate.draw(trial.params, noise))
        heapq.heappush(events, (time + overhead + running.curve.seconds[0], trial.number, running))

    for _ in range(workers):
        begin(0.0)
    while events:
        time, number, running = heapq.heappop(events)
        if time > seconds:
            break
        running.epoch += 1
        trial, curve, epoch = running.trial, running.curve, running.epoch
        trial.report(curve.accuracy[epoch - 1], epoch)
        last = epoch == len(curve.accuracy)
        stopped = False
        if not last and running.would_stop is None and number not in method.spared and trial.should_prune():
            running.would_stop = epoch
            stopped = bool(audit_rng.random() >= method.audited)
        if not (last or stopped):
            heapq.heappush(events, (time + curve.seconds[epoch], number, running))
            continue
        if stopped:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, curve.accuracy[-1])
        seen = curve.accuracy[:epoch]
        ended.append(Ended(time, number, trial.params, seen, curve.accuracy[-1], stopped, running.would_stop))
        begin(time)
    return ended
