"""Which trials are stopped early: the worst at their epoch, by more than chance alone moves a score.

No pruner that was replayed on measured curves (benchmarks/results/replay) found better configurations than a search
without one. So the default stops few trials, and hardly ever a good one.
"""

import copy

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, PercentilePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from search.analysis.noise import seed_noise
from search.config.study_file import StudyConfig


class TolerantPercentilePruner(PercentilePruner):
    """Optuna's percentile pruner, for each trial as if its scores were better by one standard deviation between seeds.

    The deviation is that of the trial's epoch, once it is known; until then this is Optuna's pruner.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether to stop this trial now."""
        if not super().prune(study, trial):
            return False
        noise = seed_noise(study.get_trials(deepcopy=False), trial.last_step)
        if noise is None:
            return True
        bonus = noise.std if study.direction == StudyDirection.MAXIMIZE else -noise.std
        lucky = copy.copy(trial)
        lucky.intermediate_values = {epoch: value + bonus for epoch, value in trial.intermediate_values.items()}
        return super().prune(study, lucky)


def build_pruner(config: StudyConfig) -> BasePruner:
    """The pruner that a study file asks for; its epochs count from 1."""
    pruner = config.pruner
    match pruner.kind:
        case "none":
            return NopPruner()
        case "median":
            return MedianPruner(n_startup_trials=pruner.startup_trials, n_warmup_steps=pruner.warmup_epochs)
        case "percentile":
            return TolerantPercentilePruner(
                pruner.percentile, n_startup_trials=pruner.startup_trials, n_warmup_steps=pruner.warmup_epochs
            )
