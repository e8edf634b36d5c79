"""The result of one epoch of training. Importing this does not import torch."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class EpochResult:
    """The result of one epoch of training.

    Attributes:
        epoch: from 1.
        train_loss: mean over the epoch's batches of the smoothed cross-entropy, in nats.
        train_accuracy: over the epoch's augmented images, as they were trained on.
        validation_loss: cross-entropy without smoothing, in nats.
        validation_accuracy: share of the validation images classified correctly.
        images_per_second: training alone, without validation.
        lr: learning rate of the epoch's last step.
        seconds: of the whole epoch, validation included.
        losses: of every step, in nats; what ``train_loss`` is the mean of.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    images_per_second: float
    lr: float
    seconds: float
    losses: tuple[float, ...] = ()

    def row(self) -> dict[str, Any]:
        """The numbers of the whole epoch by name, for storing; without the steps' losses."""
        return {name: value for name, value in asdict(self).items() if name != "losses"}
