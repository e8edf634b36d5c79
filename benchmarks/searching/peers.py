"""Schedulers of other tools in place of an Optuna sampler and pruner, so that all search on the same clock.

Ray Tune's and Syne Tune's own classes, driven as their own loops drive them: they suggest a configuration, get every
epoch's result and decide whether to stop. A tool that is not installed is left out; ``pip install '.[peers]'`` installs
them.
"""

import datetime
import importlib.util
import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from benchmarks.searching.clock import Method, SamplerAt
from search.config.space import SearchSpace, parameter_distributions

ACCURACY, EPOCH = "accuracy", "training_iteration"


def peers(space: SearchSpace, epochs: int) -> dict[str, Method]:
    """The methods of those tools that are installed, by name."""
    installed: dict[str, Method] = {}
    if importlib.util.find_spec("ray") and importlib.util.find_spec("pyarrow"):  # Ray alone comes without its Tune
        installed["Ray Tune ASHA"] = Method(lambda seed: _ray_asha(seed, epochs))
    if importlib.util.find_spec("syne_tune"):
        from syne_tune.optimizer import baselines

        logging.getLogger("syne_tune").setLevel(logging.ERROR)
        for name in ("ASHA", "BOHB", "ASHABORE", "ASHACQR"):
            installed[f"Syne Tune {name}"] = Method(_syne_tune(getattr(baselines, name), space, epochs))
    return installed


class _SchedulerPruner(BasePruner):
    """Asks a scheduler after every epoch."""

    def __init__(self, stops: Callable[[FrozenTrial], bool]) -> None:
        self._stops = stops

    def prune(self, study: Study, trial: FrozenTrial) -> bool:  # noqa: ARG002
        return self._stops(trial)


def _result(trial: FrozenTrial) -> dict[str, Any]:
    assert trial.last_step is not None
    return {EPOCH: trial.last_step, ACCURACY: trial.intermediate_values[trial.last_step]}


def _ray_asha(seed: int, epochs: int) -> tuple[SamplerAt, BasePruner]:
    """Random configurations and ASHA with Ray Tune's defaults."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

    scheduler = AsyncHyperBandScheduler(time_attr=EPOCH, metric=ACCURACY, mode="max", max_t=epochs)
    sampler = RandomSampler(seed=seed)

    def stops(trial: FrozenTrial) -> bool:
        theirs = SimpleNamespace(trial_id=trial.number)
        if trial.last_step == 1:
            scheduler.on_trial_add(None, theirs)
        return bool(scheduler.on_trial_result(None, theirs, _result(trial)) == TrialScheduler.STOP)

    return lambda _: sampler, _SchedulerPruner(stops)


class _SchedulerSampler(BaseSampler):
    """Takes its configurations from a scheduler of Syne Tune."""

    def __init__(self, scheduler: Any, forms: Mapping[str, BaseDistribution]) -> None:
        self._scheduler, self._forms = scheduler, dict(forms)
        self.trials: dict[int, Any] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        return self._forms

    def sample_relative(
        self,
        study: Study,  # noqa: ARG002
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],  # noqa: ARG002
    ) -> dict[str, Any]:
        from syne_tune.backend.trial_status import Trial

        config = self._scheduler.suggest().config
        self.trials[trial.number] = Trial(trial.number, config, datetime.datetime.now(datetime.UTC))
        self._scheduler.on_trial_add(self.trials[trial.number])
        return dict(config)

    def sample_independent(self, *_: Any) -> Any:
        raise NotImplementedError("the scheduler samples every parameter")

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:  # noqa: ARG002
        theirs = self.trials.pop(trial.number)
        if state == TrialState.COMPLETE:
            self._scheduler.on_trial_complete(theirs, _result(trial))
        else:
            self._scheduler.on_trial_remove(theirs)


def _syne_tune(
    make: Callable[..., Any], space: SearchSpace, epochs: int
) -> Callable[[int], tuple[SamplerAt, BasePruner]]:
    """One of Syne Tune's schedulers with its defaults."""
    from syne_tune.optimizer.scheduler import SchedulerDecision

    forms = parameter_distributions(space)
    domains = {name: _domain(form) for name, form in forms.items()}

    def of_seed(seed: int) -> tuple[SamplerAt, BasePruner]:
        scheduler = make(domains, metric=ACCURACY, time_attr=EPOCH, max_t=epochs, do_minimize=False, random_seed=seed)
        sampler = _SchedulerSampler(scheduler, forms)

        def stops(trial: FrozenTrial) -> bool:
            decision = scheduler.on_trial_result(sampler.trials[trial.number], _result(trial))
            return bool(decision == SchedulerDecision.STOP)

        return lambda _: sampler, _SchedulerPruner(stops)

    return of_seed


def _domain(form: BaseDistribution) -> Any:
    """One parameter as Syne Tune has it."""
    from syne_tune import config_space as theirs

    if isinstance(form, CategoricalDistribution):
        return theirs.choice(list(form.choices))
    assert isinstance(form, IntDistribution | FloatDistribution)
    if form.log:
        return (theirs.lograndint if isinstance(form, IntDistribution) else theirs.loguniform)(form.low, form.high)
    if form.step is None:
        return theirs.uniform(form.low, form.high)
    size = round((form.high - form.low) / form.step) + 1
    return theirs.finrange(form.low, form.high, size, cast_int=isinstance(form, IntDistribution))
