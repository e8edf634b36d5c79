"""Resuming a training from the newest checkpoint of it, on this machine or in the study's store."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from data.split import Split
from model.checkpoint import About, as_read_back, load_checkpoint, read_about
from model.config import ConfigError
from model.fit import FitState
from search.artifacts.mirror import Mirror
from search.config.settings import TrialConfig

T = TypeVar("T")


@dataclass(frozen=True)
class CheckpointSource:
    """Where the checkpoint of one training is.

    Attributes:
        mirror: has the checkpoint's copy, if there is one.
        path: of the checkpoint on this machine.
        identity: that the checkpoint was saved with (`training_identity`); one with another identity is ignored.
        elsewhere: whether another machine may have worked on this training, so that the copy is worth a look.
    """

    mirror: Mirror
    path: Path
    identity: Mapping[str, Any]
    elsewhere: bool = True


def training_identity(config: TrialConfig, split: Split) -> About:
    """What makes a training this one: its configuration and its images, in the types that JSON gives."""
    return as_read_back({"config": asdict(config), "images": split.fingerprint, "fit_images": len(split.fit_labels)})


def resume_training(
    source: CheckpointSource,
    network: nn.Module,
    state: FitState,
    read: Callable[[About], T],
    warn: Callable[[Exception], None],
) -> T | None:
    """Bring a network and its state to where the newest checkpoint of this training has them.

    Args:
        source: of the checkpoint.
        network, state: freshly made for this training.
        read: gives the curves from what was saved with the checkpoint (``about`` of `model.checkpoint`); it may raise
            KeyError and TypeError.
        warn: gets the error if the checkpoint cannot be used.

    Returns:
        what ``read`` gave; None if the training starts afresh.
    """
    about = newest_checkpoint(source)
    if about is None:
        return None
    try:
        load_checkpoint(source.path, network, state)
        return read(about)
    except (ConfigError, KeyError, TypeError) as error:
        warn(error)
        return None


def newest_checkpoint(source: CheckpointSource) -> About | None:
    """Put the newest checkpoint of a training, the local one or its copy in the store, at the source's path.

    Returns:
        what was saved with it; None if there is no checkpoint of this very training.
    """
    local = _read_own(source.path, source.identity)
    if not source.elsewhere:
        return local
    with source.mirror.downloaded(source.path) as copy:
        stored = _read_own(copy, source.identity) if copy is not None else None
        if copy is None or stored is None or (local is not None and len(local["curve"]) >= len(stored["curve"])):
            return local
        copy.replace(source.path)
        return stored


def _read_own(path: Path, identity: Mapping[str, Any]) -> About | None:
    """What was saved with a checkpoint, if it is one of the training with this identity."""
    about = read_about(path)
    usable = about is not None and about.get("identity") == identity and isinstance(about.get("curve"), list)
    return about if usable else None
