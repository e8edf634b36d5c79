"""How far chance alone moves a score: the standard deviation between trainings that differ only in their seed.

A search trains one configuration several times early on (`repeat_slots` in `search.config.study_file`), so that it
knows how much of a difference is luck. The pruner (`search.samplers.pruner`), the forecast and the comparison of the
best configurations use it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from search.analysis.outcomes import end_accuracy


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation between trainings of one configuration that differ in their seed.

    Attributes:
        std: in accuracy.
        freedom: degrees of freedom: repeated trainings minus one for each configuration.
    """

    std: float
    freedom: int


def pooled_noise(groups: Sequence[Sequence[float]]) -> SeedNoise | None:
    """Noise of scores in groups of one configuration each; None if no group has two."""
    repeated = [scores for scores in groups if len(scores) > 1]
    freedom = sum(len(scores) - 1 for scores in repeated)
    if not freedom:
        return None
    squares = math.fsum((len(scores) - 1) * float(np.var(scores, ddof=1)) for scores in repeated)
    return SeedNoise(math.sqrt(squares / freedom), freedom)


def seed_noise(trials: Sequence[FrozenTrial], epoch: int | None = None) -> SeedNoise | None:
    """Noise of the configurations that were trained to their end more than once; None if there are none.

    Args:
        trials: in any state.
        epoch: after which their accuracies are compared; None: at the end.
    """
    ended = [(trial, end) for trial in trials if (end := end_accuracy(trial)) is not None]
    scored = ((trial.params, end if epoch is None else trial.intermediate_values.get(epoch)) for trial, end in ended)
    return noise_of((params, accuracy) for params, accuracy in scored if accuracy is not None)


def noise_of(scored: Iterable[tuple[Mapping[str, Any], float]]) -> SeedNoise | None:
    """Noise of configurations with a score for each training; None if none was trained more than once."""
    groups: dict[tuple[tuple[str, Any], ...], list[float]] = {}
    for params, accuracy in scored:
        groups.setdefault(tuple(sorted(params.items())), []).append(accuracy)
    return pooled_noise(list(groups.values()))


def combined_noise(*estimates: SeedNoise | None) -> SeedNoise | None:
    """Several estimates of the same noise as one; None if there are none."""
    known = [estimate for estimate in estimates if estimate is not None]
    freedom = sum(estimate.freedom for estimate in known)
    if not freedom:
        return None
    return SeedNoise(math.sqrt(math.fsum(part.freedom * part.std**2 for part in known) / freedom), freedom)
