"""Trials as a study stores them, without a study."""

from typing import Any

from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial


def trial(
    number: int,
    value: float = 0.5,
    lr: float | None = None,
    state: TrialState = TrialState.COMPLETE,
    **attributes: Any,
) -> FrozenTrial:
    """A trial of the slot with its number: its accuracy after two epochs, or after the first where it did not end."""
    complete = state == TrialState.COMPLETE
    made = create_trial(
        state=state,
        value=value if complete else None,
        params={"lr": 0.01 + 0.001 * number if lr is None else lr},
        distributions={"lr": FloatDistribution(0.01, 1.0)},
        user_attrs={"slot": number, "seconds": 10.0, **attributes},
        intermediate_values={1: value - 0.2} | ({2: value} if complete else {}),
    )
    made.number = number
    return made
