"""The learning rate as a function of the step."""

import math

from model.config import Schedule


def lr_factor(step: int, steps: int, warmup: float, schedule: Schedule) -> float:
    """Share of the peak learning rate at a step: linear climb, then the schedule's fall to 0.

    Args:
        step: from 0 to ``steps`` - 1.
        steps: of the whole training.
        warmup: share of the steps in which the rate climbs.
        schedule: ``linear``, ``cosine`` or ``constant``.
    """
    climb = warmup * steps
    if step + 1 < climb:
        return (step + 1) / climb
    if schedule == "constant":
        return 1.0
    done = (step + 1 - climb) / (steps - climb + 1) if steps > climb else 0.0
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
