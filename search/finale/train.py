"""One training of the finale: from its configuration to a network, resumed from its checkpoint after a kill."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim.swa_utils import AveragedModel

from data.errors import first_line
from data.split import Split
from model.checkpoint import CheckpointWriter
from model.device import tuned_for_long_training
from model.fit import fit, start_state
from model.network import BlockNetwork, build_network
from model.result import EpochResult
from search.artifacts.mirror import Mirror
from search.artifacts.resume import CheckpointSource, resume_training, training_identity
from search.config.settings import TrialConfig

MOST_POINTS = 1000
"""At most this many points are kept of a training's loss curve, each the mean of equally many steps."""

AVERAGED_SHARE = 0.2
"""The last part of a training, whose epochs' weights are averaged (Izmailov et al., arXiv:1803.05407)."""


@dataclass(frozen=True)
class Trained:
    """A network at the end of its training.

    Attributes:
        network: as the last step left it.
        average: with weights and norm statistics averaged over the ends of the last fifth of the epochs.
        curve: one `EpochResult.row` for each epoch.
        losses: step and loss, thinned.
        seconds: of all epochs, also of those before a kill.
    """

    network: BlockNetwork
    average: BlockNetwork
    curve: list[dict[str, Any]]
    losses: list[list[float]]
    seconds: float


def train(
    config: TrialConfig,
    split: Split,
    checkpoint: Path,
    mirror: Mirror,
    expected: float,
    report: Callable[[EpochResult], None],
    warn: Callable[[str], None],
) -> Trained:
    """Train a network from scratch, or on from where a process died: on the CPU to the same bits.

    Args:
        config: of network and training.
        split: on the device to train on.
        checkpoint: file, written after every epoch; it stays.
        mirror: gets the checkpoint's copy.
        expected: seconds that this will take.
        report: gets every epoch's result.
        warn: gets the reason if no checkpoint can be written or used.

    Raises:
        NonFiniteLossError: the training diverged.
    """
    device, epochs = split.fit_images.device, config.fit.epochs
    network = build_network(config.network, config.fit.seed, device)
    # Nothing is averaged yet, but the average is a part of the checkpoint, as the network is.
    average = AveragedModel(network, use_buffers=True)
    modules = nn.ModuleDict({"network": network, "average": average})
    state = start_state(network, config.fit, device)
    source = CheckpointSource(mirror, checkpoint, training_identity(config, split))
    resumed = resume_training(
        source,
        modules,
        state,
        lambda about: (about["curve"], about["losses"]),
        lambda error: warn(f"the checkpoint {checkpoint} cannot be used, so this training starts afresh: {error}"),
    )
    curve: list[dict[str, Any]]
    losses: list[list[float]]
    curve, losses = resumed or ([], [])
    writer = CheckpointWriter(
        checkpoint,
        lambda error: warn(f"no checkpoint, so a killed retrain starts afresh: {first_line(error)}"),
        mirror.upload_if_reachable,
    )
    averaged_after = epochs - max(1, math.floor(AVERAGED_SHARE * epochs))
    try:
        with tuned_for_long_training(network, device, expected) as tuned:
            for result in fit(tuned, split, config.fit, state=state):
                if result.epoch > averaged_after:
                    average.update_parameters(network)
                curve.append(result.row())
                losses += _thinned(result, epochs)
                writer.save(modules, state, {"identity": source.identity, "curve": curve, "losses": losses})
                report(result)
    finally:
        writer.wait()
    seconds = math.fsum(row["seconds"] for row in curve)
    return Trained(network, cast(BlockNetwork, average.module), curve, losses, seconds)


def _thinned(result: EpochResult, epochs: int) -> list[list[float]]:
    """Means of an epoch's losses over windows of equal length, each with the number of its first step, from 0."""
    steps = len(result.losses)
    window = max(1, math.ceil(steps * epochs / MOST_POINTS))
    earlier_steps = (result.epoch - 1) * steps
    windows = [(first, result.losses[first : first + window]) for first in range(0, steps, window)]
    return [[earlier_steps + first, round(math.fsum(losses) / len(losses), 5)] for first, losses in windows]
