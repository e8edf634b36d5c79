"""What `benchmarks.searching.replay` compares: this project's search, Optuna's samplers and pruners, other tools'
schedulers."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from optuna import pruners, samplers
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from benchmarks.searching.clock import Method, SamplerAt
from benchmarks.searching.peers import peers
from search.config.study_file import NoiseConfig, PrunerConfig, SamplerConfig, StudyConfig
from search.samplers.pruner import build_pruner
from search.samplers.slots import build_sampler, given_parameters

DEFAULT = "default"
RANDOM = "random"
SLOW = ("Syne Tune ASHABORE", "Syne Tune ASHACQR")
"""They take half a second and more before every trial; compared only if they are named."""


def _optuna(
    sampler: Callable[..., BaseSampler], pruner: Callable[[], BasePruner] = pruners.NopPruner, **options: Any
) -> Method:
    """Optuna as its users run it: one sampler for a whole search."""

    def make(seed: int) -> tuple[SamplerAt, BasePruner]:
        seeded = sampler(seed=seed, **options)
        return lambda _: seeded, pruner()

    return Method(make)


def _ours(config: StudyConfig, **changes: Any) -> Method:
    """A study as `search.worker.loop` runs it, with other tables in its file."""
    changed = config.model_copy(update=changes)

    def make(seed: int) -> tuple[SamplerAt, BasePruner]:
        seeded = changed.model_copy(update={"seed": seed})
        return lambda slot: build_sampler(seeded, slot), build_pruner(changed)

    def given(slot: int, trials: Callable[[], Sequence[FrozenTrial]]) -> Mapping[str, Any]:
        return given_parameters(changed, slot, slot if slot < len(changed.start) else None, trials)

    return Method(make, given, changed.pruner.audit, changed.repeat_slots)


def methods(config: StudyConfig, epochs: int) -> dict[str, Method]:
    """Everything that is compared, by name."""
    tpe = partial(_optuna, samplers.TPESampler)
    stopping = {
        "none": PrunerConfig(kind="none"),
        "percentile 90": PrunerConfig(percentile=90, warmup_epochs=epochs - 1),
        "percentile 90 from half-way": PrunerConfig(percentile=90, warmup_epochs=epochs // 2),
        "median": PrunerConfig(kind="median", warmup_epochs=epochs // 2),
    }
    sampler = partial(SamplerConfig, startup_trials=config.sampler.startup_trials)
    cma_es = _optuna(samplers.CmaEsSampler, warn_independent_sampling=False) if find_spec("cmaes") else None
    ours = {
        f"ours: {name}, {stops}": {"sampler": proposes, "pruner": pruner}
        for name, proposes in {"tpe": sampler(kind="tpe"), "gp": sampler(kind="gp")}.items()
        for stops, pruner in stopping.items()
    }
    return {
        RANDOM: _optuna(samplers.RandomSampler),
        DEFAULT: _ours(config),
        "default, no pruner": _ours(config, pruner=stopping["none"]),
        "default, no start": _ours(config, start=()),
        "default, no repeats": _ours(config, noise=NoiseConfig(repeats=0)),
        **{name: _ours(config, **tables) for name, tables in ours.items()},
        "TPE + Median (Optuna's defaults)": tpe(pruners.MedianPruner),
        "TPE": tpe(),
        "TPE univariate": tpe(multivariate=False),
        "TPE group": tpe(multivariate=True, group=True),
        "TPE without constant liar": tpe(constant_liar=False),
        "TPE + Percentile 90": tpe(lambda: pruners.PercentilePruner(90.0, n_warmup_steps=2)),
        "TPE + Patient Median": tpe(lambda: pruners.PatientPruner(pruners.MedianPruner(), 1)),
        "TPE + SuccessiveHalving": tpe(pruners.SuccessiveHalvingPruner),
        "TPE + Hyperband": tpe(lambda: pruners.HyperbandPruner(max_resource=epochs)),
        "TPE + Wilcoxon": tpe(pruners.WilcoxonPruner),
        "GP": _optuna(samplers.GPSampler),
        "QMC": _optuna(samplers.QMCSampler),
        **({"CMA-ES": cma_es} if cma_es else {}),
        **peers(config.space, epochs),
    }
