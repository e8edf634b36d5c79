"""One attempt at a trial, from parameters to a score."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import TrialState

from data.split import Split
from model.checkpoint import CheckpointWriter
from model.cost import count_cost
from model.device import describe_device
from model.fit import FitState, fit, start_state
from model.network import BlockNetwork, build_network
from model.quality import latency
from model.result import EpochResult
from search.artifacts.mirror import Mirror
from search.artifacts.resume import CheckpointSource, resume_training, training_identity
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


@dataclass(frozen=True)
class TrialContext:
    """What one attempt at a trial needs.

    Attributes:
        attempt: the trial and its lease; what is measured goes to its notes.
        config: of the study.
        split: images, on the device to train on.
        checkpoints: writes the trial's checkpoints.
        mirror: may have the checkpoint of an earlier attempt on another machine.
        heartbeat: of the worker; gets the progress, and knows whether the lease was lost.
        stop: whether the process was asked to stop.
        show: gets events.
    """

    attempt: Attempt
    config: StudyConfig
    split: Split
    checkpoints: CheckpointWriter
    mirror: Mirror
    heartbeat: Heartbeat
    stop: StopRequest
    show: Show


def run_trial(context: TrialContext) -> TrialResult:
    """Sample, build, train and prune one configuration, resuming from an earlier attempt's checkpoint if there is one.

    The caller stores whether and how this ended, with the attempt's notes. The last checkpoint may still be being
    written when a result is returned, but not after an error.

    Raises:
        StoppedError: the process was asked to stop.
        LeaseLostError: the lease went to another worker.
        NonFiniteLossError: the training diverged.
        Exception: anything that a network raises.
    """
    attempt, config, split, show = context.attempt, context.config, context.split, context.show
    trial, device = attempt.trial, split.fit_images.device
    with _recorded(context) as curve:
        with attempt.batched_writes():
            settings = sample(config.space, trial)
            seed = trial_seed(config, attempt.lease.slot, attempt.lease.start)
            chosen = trial_config(settings, config.trial.epochs, seed, classes=len(split.classes))
            cost = count_cost(chosen.network)
            for name, value in ((CONFIG, asdict(chosen)), (PARAMETERS, cost.parameters), (FLOPS, cost.flops)):
                trial.set_user_attr(name, value)
            trial.set_user_attr(DEVICE, describe_device(device))
        epochs = chosen.fit.epochs
        show(TrialStarted(trial.number, trial.params, cost.parameters, epochs))
        context.heartbeat.progress = TrialProgress(trial.number, 0, epochs)

        identity = training_identity(chosen, split)
        network = build_network(chosen.network, chosen.fit.seed, device)
        state = start_state(network, chosen.fit, device)
        curve += _resumed_curve(context, identity, network, state)
        for result in curve[:-1]:
            attempt.report(result.epoch, result.validation_accuracy)
        if curve and _report_and_prune(context, curve[-1], epochs):
            return TrialResult(TrialState.PRUNED, curve[-1].validation_accuracy, curve[-1].epoch, 0.0)

        training, seconds = fit(network, split, chosen.fit, state=state), 0.0
        while state.epoch < epochs:
            with context.stop.interrupting():
                result = next(training)
            curve.append(result)
            seconds += result.seconds
            # Before the report, also of the last epoch: a database that is away must not cost an epoch.
            rows = [finished.row() for finished in curve]
            context.checkpoints.save(network, state, {"identity": identity, "curve": rows})
            if context.heartbeat.lease_lost:
                raise LeaseLostError
            accuracy = result.validation_accuracy
            pruned = _report_and_prune(context, result, epochs)
            show(EpochFinished(trial.number, result.epoch, epochs, accuracy, result.images_per_second))
            if pruned:
                return TrialResult(TrialState.PRUNED, accuracy, result.epoch, seconds)
        second_value = _second_value(context, chosen, network)
        return TrialResult(TrialState.COMPLETE, curve[-1].validation_accuracy, epochs, seconds, second_value)


@contextmanager
def _recorded(context: TrialContext) -> Iterator[list[EpochResult]]:
    """Note the attempt's curve, speed, seconds and peak memory, however it ends.

    Yields:
        the curve, empty: the training appends to it.
    """
    notes, device = context.attempt.notes, context.split.fit_images.device
    start = time.perf_counter()
    reset_peak_memory(device)
    curve: list[EpochResult] = []
    try:
        yield curve
    except BaseException:
        context.checkpoints.wait()  # the next attempt may be about to read it
        raise
    finally:
        if curve:
            notes[CURVE] = [result.row() for result in curve]
            speeds = sorted(result.images_per_second for result in curve)
            # The median over epochs: the first one also warms up caches and kernels.
            notes[IMAGES_PER_SECOND] = round(speeds[len(speeds) // 2], 1)
        notes[SECONDS] = round(time.perf_counter() - start, 3)
        notes[PEAK_MEMORY] = peak_memory(device)


def _resumed_curve(
    context: TrialContext, identity: dict[str, Any], network: BlockNetwork, state: FitState
) -> list[EpochResult]:
    """The epochs of earlier attempts, with network and state restored to their end; none if the trial starts afresh."""
    number = context.attempt.trial.number
    elsewhere = context.attempt.lease.attempt > 1
    curve = resume_training(
        CheckpointSource(context.mirror, context.checkpoints.path, identity, elsewhere),
        network,
        state,
        lambda about: [EpochResult(**row) for row in about["curve"]],
        lambda error: context.show(
            Note(f"trial {number}: the checkpoint cannot be used and the trial starts afresh: {error}")
        ),
    )
    if curve is None:
        return []
    context.show(Note(f"trial {number} goes on after epoch {state.epoch}, from its last attempt's checkpoint"))
    return curve


def _report_and_prune(context: TrialContext, result: EpochResult, epochs: int) -> bool:
    """Report an epoch's accuracy to the study; whether the pruner stops the trial here."""
    attempt, config, slot = context.attempt, context.config, context.attempt.lease.slot
    accuracy, speed = result.validation_accuracy, round(result.images_per_second, 1)
    attempt.report(result.epoch, accuracy)
    context.heartbeat.progress = TrialProgress(attempt.trial.number, result.epoch, epochs, accuracy, speed)
    prunes = config.prunes and slot not in config.repeat_slots  # repeats measure the noise at the end
    if result.epoch == epochs or not prunes or WOULD_STOP in attempt.notes or not attempt.should_prune():
        return False
    if is_audited(config, slot):
        attempt.notes[WOULD_STOP] = result.epoch
        return False
    return True


def _second_value(context: TrialContext, chosen: TrialConfig, network: BlockNetwork) -> float | None:
    """The trained network's cost if that is an objective; a latency is measured here, for up to three seconds."""
    cost = second_objective(context.config.objective)
    if cost is None:
        return None
    if cost == "latency":
        with context.stop.interrupting():
            seconds = latency(network, LATENCY_BATCH, chosen.fit.precision, chosen.network.image_size)
        context.attempt.notes[LATENCY] = seconds
        return seconds
    counted = count_cost(chosen.network)
    return float(counted.parameters if cost == "params" else counted.flops)
