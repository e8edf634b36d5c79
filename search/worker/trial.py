"""One attempt at a trial, from parameters to a score."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from optuna.trial import TrialState

from data.split import Split
from model.checkpoint import CheckpointWriter, as_read_back, load_checkpoint
from model.config import ConfigError
from model.cost import count_cost
from model.device import describe_device
from model.fit import fit, start_state
from model.network import BlockNetwork, build_network
from model.quality import latency
from model.result import EpochResult
from search.artifacts.mirror import Mirror
from search.attributes import (
    CONFIG,
    CURVE,
    DEVICE,
    FLOPS,
    IMAGES_PER_SECOND,
    LATENCY,
    PARAMETERS,
    PEAK_MEMORY,
    SECONDS,
    WOULD_STOP,
)
from search.config.objective import LATENCY_BATCH, second_objective
from search.config.settings import TrialConfig, trial_config
from search.config.space import sample
from search.config.study_file import StudyConfig
from search.events import EpochFinished, Note, Show, TrialStarted
from search.ledger.attempts import Attempt
from search.ledger.heartbeat import Heartbeat, TrialProgress
from search.ledger.leases import LeaseLostError
from search.samplers.slots import is_audited, trial_seed
from search.worker.memory import peak_memory, reset_peak_memory
from search.worker.runner import TrialResult
from search.worker.stop import StopRequest


def run_attempt(
    attempt: Attempt,
    config: StudyConfig,
    split: Split,
    checkpoints: CheckpointWriter,
    files: Mirror,
    heart: Heartbeat,
    stop: StopRequest,
    show: Show,
) -> TrialResult:
    """Sample, build, train and prune one configuration, going on from an earlier attempt's checkpoint if one is there.

    Whether and how this ended is for the caller to store, with what was measured, which is among the attempt's notes.
    The last checkpoint may still be being written when a result is returned, and not after an error.

    Raises:
        StoppedError: somebody wants this process to go.
        LeaseLostError: the lease went to another worker.
        NonFiniteLossError: the training diverged.
        Exception: whatever a network does.
    """
    trial, device = attempt.trial, split.fit_images.device
    with _measured(attempt, device):
        with attempt.batched_writes():
            settings = sample(config.space, trial)
            seed = trial_seed(config, attempt.lease.slot, attempt.lease.start)
            chosen = trial_config(settings, config.trial.epochs, seed, classes=len(split.classes))
            cost = count_cost(chosen.network)
            trial.set_user_attr(CONFIG, asdict(chosen))
            trial.set_user_attr(PARAMETERS, cost.parameters)
            trial.set_user_attr(FLOPS, cost.flops)
            trial.set_user_attr(DEVICE, describe_device(device))
        show(TrialStarted(trial.number, trial.params, cost.parameters, chosen.fit.epochs))
        heart.progress = TrialProgress(trial.number, 0, chosen.fit.epochs)
        curve: list[EpochResult] = []
        try:
            return _train(attempt, config, chosen, split, checkpoints, files, heart, stop, show, curve)
        except BaseException:
            checkpoints.wait()  # whoever goes on with this trial may be about to read it
            raise
        finally:
            if curve:
                attempt.notes[CURVE] = [result.row() for result in curve]
                speeds = sorted(result.images_per_second for result in curve)
                # The median over epochs: the first one also warms up caches and kernels.
                attempt.notes[IMAGES_PER_SECOND] = round(speeds[len(speeds) // 2], 1)


def _train(
    attempt: Attempt,
    config: StudyConfig,
    chosen: TrialConfig,
    split: Split,
    checkpoints: CheckpointWriter,
    files: Mirror,
    heart: Heartbeat,
    stop: StopRequest,
    show: Show,
    curve: list[EpochResult],
) -> TrialResult:
    trial, epochs, device = attempt.trial, chosen.fit.epochs, split.fit_images.device
    identity = as_read_back(
        {"config": asdict(chosen), "images": split.fingerprint, "fit_images": len(split.fit_labels)}
    )
    network = build_network(chosen.network, chosen.fit.seed, device)
    state = start_state(network, chosen.fit, device)
    about = files.newest(checkpoints.path, identity, elsewhere=attempt.lease.attempt > 1)
    if about is not None:
        try:
            load_checkpoint(checkpoints.path, network, state)
            curve += [EpochResult(**result) for result in about["curve"]]
        except (ConfigError, KeyError, TypeError) as error:
            show(Note(f"trial {trial.number}: the checkpoint cannot be used and the trial starts afresh: {error}"))
        else:
            show(Note(f"trial {trial.number} goes on after epoch {state.epoch}, from its last attempt's checkpoint"))

    audited = is_audited(config, attempt.lease.slot)
    prunes = config.prunes and attempt.lease.slot not in config.repeat_slots  # which shall tell the noise at the end

    def stop_here(result: EpochResult) -> bool:
        """Whether the pruner stops the trial after this epoch, now reported."""
        attempt.report(result.epoch, result.validation_accuracy)
        heart.progress = TrialProgress(
            trial.number, result.epoch, epochs, result.validation_accuracy, round(result.images_per_second, 1)
        )
        if result.epoch == epochs or not prunes or WOULD_STOP in attempt.notes or not attempt.should_prune():
            return False
        if audited:
            attempt.notes[WOULD_STOP] = result.epoch
        return not audited

    for result in curve[:-1]:
        attempt.report(result.epoch, result.validation_accuracy)
    if curve and stop_here(curve[-1]):
        return TrialResult(TrialState.PRUNED, curve[-1].validation_accuracy, curve[-1].epoch, 0.0)
    trainer = fit(network, split, chosen.fit, state=state)
    trained = 0.0
    while state.epoch < epochs:
        with stop.interrupting():
            result = next(trainer)
        curve.append(result)
        trained += result.seconds
        # Before the report, also of the last epoch: a database that is away must not cost an epoch.
        checkpoints.save(network, state, {"identity": identity, "curve": [done.row() for done in curve]})
        if heart.lease_lost:
            raise LeaseLostError
        pruned = stop_here(result)
        show(EpochFinished(trial.number, result.epoch, epochs, result.validation_accuracy, result.images_per_second))
        if pruned:
            return TrialResult(TrialState.PRUNED, result.validation_accuracy, result.epoch, trained)
    cost = _second_value(attempt, config, chosen, network, stop)
    return TrialResult(TrialState.COMPLETE, curve[-1].validation_accuracy, epochs, trained, cost)


def _second_value(
    attempt: Attempt, config: StudyConfig, chosen: TrialConfig, network: BlockNetwork, stop: StopRequest
) -> float | None:
    """The trained network's cost where that is an objective; a latency is measured here, for up to three seconds."""
    cost = second_objective(config.objective)
    if cost is None:
        return None
    if cost == "latency":
        with stop.interrupting():
            seconds = latency(network, LATENCY_BATCH, chosen.fit.precision, chosen.network.image_size)
        attempt.notes[LATENCY] = seconds
        return seconds
    counted = count_cost(chosen.network)
    return float(counted.parameters if cost == "params" else counted.flops)


@contextmanager
def _measured(attempt: Attempt, device: torch.device) -> Iterator[None]:
    """Note how long the attempt took and its peak of memory, whatever becomes of it."""
    start = time.perf_counter()
    reset_peak_memory(device)
    try:
        yield
    finally:
        attempt.notes[SECONDS] = round(time.perf_counter() - start, 3)
        attempt.notes[PEAK_MEMORY] = peak_memory(device)
