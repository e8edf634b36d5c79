"""One attempt at a trial, from parameters to a score."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from data.split import Split
from model.checkpoint import load_checkpoint, read_about, save_checkpoint
from model.config import ConfigError
from model.cost import count_cost
from model.device import describe_device
from model.fit import FitState, fit, start_state
from model.network import build_network
from model.result import EpochResult
from search.events import EpochFinished, Note, Show, TrialStarted
from search.ledger import Attempt, LeaseLostError
from search.memory import peak_memory, reset_peak_memory
from search.seat import TrialResult
from search.settings import TrialConfig, trial_config
from search.space import sample
from search.stop import Stop
from search.study import trial_seed
from search.study_file import StudyConfig
from search.workers import Heart, Progress


def run_attempt(
    attempt: Attempt, config: StudyConfig, split: Split, checkpoint: Path, heart: Heart, stop: Stop, show: Show
) -> TrialResult:
    """Sample, build, train and prune one configuration, going on from an earlier attempt's checkpoint if one is there.

    Whether and how this ended is for the caller to store; what was measured is stored with the trial.

    Raises:
        StoppedError: somebody wants this process to go.
        LeaseLostError: the lease went to another worker.
        NonFiniteLossError: the training diverged.
        Exception: whatever a network does.
    """
    trial, start = attempt.trial, time.perf_counter()
    with _measured(trial, split.fit_images.device, start):
        settings = sample(config.space, trial)
        seed = trial_seed(config, attempt.lease.slot)
        chosen = trial_config(settings, config.trial.epochs, seed, classes=len(split.classes))
        cost = count_cost(chosen.network)
        trial.set_user_attr("config", asdict(chosen))
        trial.set_user_attr("parameters", cost.parameters)
        trial.set_user_attr("flops", cost.flops)
        trial.set_user_attr("device", describe_device(split.fit_images.device))
        show(TrialStarted(trial.number, trial.params, cost.parameters, chosen.fit.epochs))
        heart.progress = Progress(trial.number, 0, chosen.fit.epochs)
        curve: list[EpochResult] = []
        try:
            return _train(attempt, chosen, split, checkpoint, heart, stop, show, curve)
        finally:
            if curve and not heart.lost:
                trial.set_user_attr("curve", [asdict(result) for result in curve])
                speeds = sorted(result.images_per_second for result in curve)
                # The median over epochs: the first one also warms up caches and kernels.
                trial.set_user_attr("images_per_second", round(speeds[len(speeds) // 2], 1))


def _train(
    attempt: Attempt,
    chosen: TrialConfig,
    split: Split,
    checkpoint: Path,
    heart: Heart,
    stop: Stop,
    show: Show,
    curve: list[EpochResult],
) -> TrialResult:
    trial, epochs, device = attempt.trial, chosen.fit.epochs, split.fit_images.device
    identity = _plain({"config": asdict(chosen), "images": split.fingerprint, "fit_images": len(split.fit_labels)})
    network = build_network(chosen.network, chosen.fit.seed, device)
    state = start_state(network, chosen.fit, device)
    about = read_about(checkpoint)
    if about is not None and about.get("identity") == identity:
        try:
            load_checkpoint(checkpoint, network, state)
            curve += [EpochResult(**result) for result in about["curve"]]
        except (ConfigError, KeyError, TypeError) as error:
            show(Note(f"trial {trial.number}: the checkpoint cannot be used and the trial starts afresh: {error}"))
        else:
            show(Note(f"trial {trial.number} goes on after epoch {state.epoch}, from its last attempt's checkpoint"))

    def stop_here(result: EpochResult) -> bool:
        """Whether the pruner stops the trial after this epoch, now reported."""
        trial.report(result.validation_accuracy, result.epoch)
        heart.progress = Progress(
            trial.number, result.epoch, epochs, result.validation_accuracy, round(result.images_per_second, 1)
        )
        return result.epoch < epochs and trial.should_prune()

    for result in curve[:-1]:
        trial.report(result.validation_accuracy, result.epoch)
    if curve and stop_here(curve[-1]):
        return TrialResult(TrialState.PRUNED, curve[-1].validation_accuracy, curve[-1].epoch)
    trainer = fit(network, split, chosen.fit, state=state)
    keeps = True
    while state.epoch < epochs:
        with stop.interrupting():
            result = next(trainer)
        curve.append(result)
        # Before the report: a database that is away must not cost an epoch.
        if keeps:
            about = {"identity": identity, "curve": [asdict(done) for done in curve]}
            keeps = _save(checkpoint, network, state, about, show)
        if heart.lost:
            raise LeaseLostError
        pruned = stop_here(result)
        show(EpochFinished(trial.number, result.epoch, epochs, result.validation_accuracy, result.images_per_second))
        if pruned:
            return TrialResult(TrialState.PRUNED, result.validation_accuracy, result.epoch)
    return TrialResult(TrialState.COMPLETE, curve[-1].validation_accuracy, epochs)


def _save(path: Path, network: torch.nn.Module, state: FitState, about: dict[str, Any], show: Show) -> bool:
    """Whether the checkpoint was written."""
    try:
        save_checkpoint(path, network, state, about)
    except OSError as error:
        show(Note(f"warning: no checkpoint, so a killed trial starts afresh: {path.parent}: {error.strerror}"))
        return False
    return True


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """Data as JSON gives it back (tuples are lists there)."""
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


@contextmanager
def _measured(trial: optuna.Trial, device: torch.device, start: float) -> Iterator[None]:
    """Store how long the attempt took and its peak of memory, whatever becomes of it but the loss of its lease."""
    reset_peak_memory(device)
    try:
        yield
    except LeaseLostError:
        raise
    except BaseException:
        _store(trial, device, start)
        raise
    else:
        _store(trial, device, start)


def _store(trial: optuna.Trial, device: torch.device, start: float) -> None:
    trial.set_user_attr("seconds", round(time.perf_counter() - start, 3))
    trial.set_user_attr("peak_memory_bytes", peak_memory(device))
