"""One trial, from parameters to a score."""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import optuna
import torch
from optuna.trial import TrialState

from data.split import Split
from model.cost import count_cost
from model.device import describe_device
from model.fit import NonFiniteLossError, fit
from model.network import build_network
from search.errors import first_line
from search.events import EpochFinished, Outcome, Show, TrialStarted
from search.ledger import CAUSE, slot
from search.memory import is_out_of_memory, peak_memory, reset_peak_memory
from search.settings import trial_config
from search.space import sample
from search.study import trial_seed
from search.study_file import StudyConfig


class StopTrial(Exception):  # noqa: N818  (nothing went wrong)
    """The time for the search is up; the trial goes back to the queue."""


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended: COMPLETE or PRUNED are results, FAIL with a cause is none."""

    state: TrialState
    outcome: Outcome
    accuracy: float | None
    epochs: int
    cause: str | None = None


def run_trial(
    trial: optuna.Trial, config: StudyConfig, split: Split, show: Show, time_is_up: Callable[[], bool]
) -> TrialResult:
    """Sample, build, train and prune one configuration, and store how it ended.

    Raises:
        StopTrial: the time is up; the trial is still RUNNING.
        KeyboardInterrupt: likewise.
    """
    start = time.perf_counter()
    with _peak_memory_of(trial, split.fit_images.device):
        try:
            result = _train(trial, config, split, show, time_is_up)
        except NonFiniteLossError as error:
            # A result, not a fault: this configuration diverges, and would again.
            trial.set_user_attr(CAUSE, f"non-finite loss: {error}")
            result = TrialResult(TrialState.PRUNED, "pruned", None, 0, "non-finite loss")
        except StopTrial:
            raise
        except Exception as error:  # noqa: BLE001  (whatever a network does must not take the worker down)
            cause = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {first_line(error)}"
            trial.set_user_attr(CAUSE, cause)
            trial.set_user_attr("traceback", traceback.format_exc())
            result = TrialResult(TrialState.FAIL, "failed", None, 0, cause)
    trial.set_user_attr("seconds", round(time.perf_counter() - start, 3))
    value = result.accuracy if result.state == TrialState.COMPLETE else None
    trial.study.tell(trial, value, result.state)
    return result


def _train(
    trial: optuna.Trial, config: StudyConfig, split: Split, show: Show, time_is_up: Callable[[], bool]
) -> TrialResult:
    settings = sample(config.space, trial)
    chosen = trial_config(settings, config.trial.epochs, trial_seed(config, slot(trial)), classes=len(split.classes))
    cost = count_cost(chosen.network)
    trial.set_user_attr("config", asdict(chosen))
    trial.set_user_attr("parameters", cost.parameters)
    trial.set_user_attr("flops", cost.flops)
    trial.set_user_attr("device", describe_device(split.fit_images.device))
    show(TrialStarted(trial.number, trial.params, cost.parameters, chosen.fit.epochs))

    network = build_network(chosen.network, chosen.fit.seed, split.fit_images.device)
    accuracy, speeds = 0.0, []
    for result in fit(network, split, chosen.fit):
        accuracy = result.validation_accuracy
        speeds.append(result.images_per_second)
        trial.report(accuracy, result.epoch)
        show(EpochFinished(trial.number, result, chosen.fit.epochs))
        if result.epoch == chosen.fit.epochs:
            break
        if trial.should_prune():
            _store_speed(trial, speeds)
            return TrialResult(TrialState.PRUNED, "pruned", accuracy, result.epoch, "pruned")
        if time_is_up():
            raise StopTrial
    _store_speed(trial, speeds)
    return TrialResult(TrialState.COMPLETE, "complete", accuracy, chosen.fit.epochs)


def _store_speed(trial: optuna.Trial, speeds: list[float]) -> None:
    """The median over epochs: the first one also warms up caches and kernels."""
    trial.set_user_attr("images_per_second", round(sorted(speeds)[len(speeds) // 2], 1))


@contextmanager
def _peak_memory_of(trial: optuna.Trial, device: torch.device) -> Iterator[None]:
    reset_peak_memory(device)
    yield
    trial.set_user_attr("peak_memory_bytes", peak_memory(device))
