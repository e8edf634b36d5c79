"""One training of the finale: from its configuration to a network, going on from its checkpoint after a kill."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim.swa_utils import AveragedModel

from data.errors import first_line
from data.split import Split
from model.checkpoint import CheckpointWriter, as_read_back, load_checkpoint
from model.config import ConfigError
from model.device import tuned_for_long_training
from model.fit import fit, start_state
from model.network import BlockNetwork, build_network
from model.result import EpochResult
from search.artifacts.mirror import Mirror
from search.config.settings import TrialConfig

MOST_POINTS = 1000
"""Points that a training's loss curve is thinned to, each the mean of as many steps."""

AVERAGED_SHARE = 0.2
"""The last part of a training, whose epochs' weights are averaged (Izmailov et al., arXiv:1803.05407)."""


@dataclass(frozen=True)
class Trained:
    """A network at the end of its training.

    Attributes:
        network: as the last step left it.
        average: with weights and norm statistics averaged over the ends of the last fifth of the epochs.
        curve: an `EpochResult.row` an epoch.
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
    files: Mirror,
    expected: float,
    told: Callable[[EpochResult], None],
    warn: Callable[[str], None],
) -> Trained:
    """Train a network from scratch, or from where a process that died had brought it: on the CPU to the same bits.

    Args:
        config: of network and training.
        split: on the device to train on.
        checkpoint: file, written after every epoch; it is left there.
        files: holds its copy.
        expected: seconds that this will take.
        told: gets every epoch's result.
        warn: gets what stands in the way of checkpoints.

    Raises:
        NonFiniteLossError: the training diverged.
    """
    device, epochs = split.fit_images.device, config.fit.epochs
    identity = as_read_back(
        {"config": asdict(config), "images": split.fingerprint, "fit_images": len(split.fit_labels)}
    )
    network = build_network(config.network, config.fit.seed, device)
    # An average of nothing yet; a part of the checkpoint, as the network is.
    average = AveragedModel(network, use_buffers=True)
    both = nn.ModuleDict({"network": network, "average": average})
    state = start_state(network, config.fit, device)
    curve: list[dict[str, Any]] = []
    losses: list[list[float]] = []
    about = files.newest(checkpoint, identity)
    if about is not None:
        try:
            load_checkpoint(checkpoint, both, state)
            curve, losses = about["curve"], about["losses"]
        except (ConfigError, KeyError) as error:
            warn(f"the checkpoint {checkpoint} cannot be used, so this training starts afresh: {error}")
    writer = CheckpointWriter(
        checkpoint,
        lambda error: warn(f"no checkpoint, so a killed retrain starts afresh: {first_line(error)}"),
        files.keep_up,
    )
    averaged_after = epochs - max(1, math.floor(AVERAGED_SHARE * epochs))
    try:
        with tuned_for_long_training(network, device, expected) as fast:
            for result in fit(fast, split, config.fit, state=state):
                if result.epoch > averaged_after:
                    average.update_parameters(network)
                curve.append(result.row())
                losses += _thinned(result, epochs)
                writer.save(both, state, {"identity": identity, "curve": curve, "losses": losses})
                told(result)
    finally:
        writer.wait()
    seconds = math.fsum(row["seconds"] for row in curve)
    return Trained(network, cast(BlockNetwork, average.module), curve, losses, seconds)


def _thinned(result: EpochResult, epochs: int) -> list[list[float]]:
    """Means of an epoch's losses over windows of equal length, each with its first step's number, from 0."""
    steps = len(result.losses)
    window = max(1, math.ceil(steps * epochs / MOST_POINTS))
    before = (result.epoch - 1) * steps
    parts = [(place, result.losses[place : place + window]) for place in range(0, steps, window)]
    return [[before + place, round(math.fsum(part) / len(part), 5)] for place, part in parts]
