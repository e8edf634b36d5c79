"""The exact budget: how many configurations are done, and what becomes of a trial that was cut off.

A configuration is done when its trial is COMPLETE or PRUNED. A trial that was cut off (its process killed,
interrupted or out of time) is put back into the queue with its parameters and its seed, then marked FAIL: the
queue comes first, so that a crash between the two loses nothing, and the retry names the trial it stands for, so
that the next start does not queue it twice.
"""

from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

SLOT = "slot"
"""User attribute of a retry: number of the first trial with this configuration."""

RETRY_OF = "retry_of"
"""User attribute of a retry: number of the attempt that it repeats."""

CAUSE = "cause"
"""User attribute of a trial that did not end COMPLETE by itself: why."""


@dataclass(frozen=True)
class Budget:
    """Configurations asked for and what has become of them."""

    requested: int
    complete: int
    pruned: int
    failed_attempts: int
    running: int
    waiting: int

    @property
    def done(self) -> int:
        """Configurations that count against the budget."""
        return self.complete + self.pruned

    @property
    def remaining(self) -> int:
        """Configurations still to be done."""
        return max(0, self.requested - self.done)


def budget(study: optuna.Study, requested: int) -> Budget:
    """Count a study's trials against its budget."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    return Budget(
        requested=requested,
        complete=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED),
        failed_attempts=states.count(TrialState.FAIL),
        running=states.count(TrialState.RUNNING),
        waiting=states.count(TrialState.WAITING),
    )


def slot(trial: optuna.Trial | FrozenTrial) -> int:
    """The number that a configuration keeps over all its attempts; its seed comes from it."""
    return int(trial.user_attrs.get(SLOT, trial.number))


def hand_back(study: optuna.Study, trial: FrozenTrial, cause: str) -> None:
    """Put a RUNNING trial's configuration back into the queue and mark this attempt FAIL."""
    known = {other.user_attrs.get(RETRY_OF) for other in study.get_trials(deepcopy=False)}
    if trial.number not in known:
        kept = {key: value for key, value in trial.user_attrs.items() if key == "start"}
        study.enqueue_trial(trial.params, user_attrs={**kept, SLOT: slot(trial), RETRY_OF: trial.number})
    optuna.Trial(study, trial._trial_id).set_user_attr(CAUSE, cause)
    study.tell(trial.number, state=TrialState.FAIL)


def recover(study: optuna.Study) -> list[int]:
    """Hand back every RUNNING trial; only for a caller that holds the study alone (`search.storage.exclusive`).

    Returns:
        the numbers of the trials whose process had died.
    """
    lost = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in lost:
        hand_back(study, trial, "worker killed")
    return [trial.number for trial in lost]
