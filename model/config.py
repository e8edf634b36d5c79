"""Frozen descriptions of a network and of its training. Plain data: importing this does not import torch."""

from dataclasses import dataclass
from typing import Literal

from data.errors import UserError

Activation = Literal["relu", "leaky_relu", "gelu", "silu"]
PoolPlace = Literal["branch", "conv", "sum"]
Optimizer = Literal["muon", "sgd", "adamw"]
Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]


class ConfigError(UserError, ValueError):
    """A configuration that does not describe a network or a training; its text is one line for the user."""


@dataclass(frozen=True)
class NetworkConfig:
    """A block network.

    Attributes:
        widths: output channels of each block; as many as there are blocks.
        convs: independent convolutional branches of every block.
        pooled: for each block, whether it halves the image.
        pool_place: where a pooled block's 2x2 max-pool is: at the end of every branch, as in the public solution
            (``branch``); right after the convolution, so that norm and activation see a quarter of the
            pixels (``conv``); or after the weighted sum (``sum``).
        activation: in the branches and between the output block's layers.
        shortcut: add a block's input to its output if their shapes match.
        head: widths of the output block's hidden layers; empty for one linear layer.
        classes: number of logits.
        image_size: height and width of the input, in pixels.
    """

    widths: tuple[int, ...]
    convs: int
    pooled: tuple[bool, ...]
    pool_place: PoolPlace = "conv"
    activation: Activation = "relu"
    shortcut: bool = False
    head: tuple[int, ...] = ()
    classes: int = 10
    image_size: int = 32

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ConfigError(f"a network needs at least one block, each of width 1 or more; got {self.widths}")
        if self.convs < 1:
            raise ConfigError(f"a block needs at least one convolution, got {self.convs}")
        if len(self.pooled) != len(self.widths):
            raise ConfigError(f"{len(self.widths)} blocks but {len(self.pooled)} entries that say which are pooled")
        if self.image_size >> sum(self.pooled) < 1:
            raise ConfigError(
                f"{sum(self.pooled)} pooled blocks would shrink a {self.image_size}-pixel image to nothing; "
                f"at most {self.image_size.bit_length() - 1} fit"
            )


@dataclass(frozen=True)
class FitConfig:
    """How one network is trained.

    Attributes:
        epochs: full length of the training; the learning rate's schedule is stretched over it.
        batch_size: images in a step.
        optimizer: ``muon`` (see `model.muon`: filters by Muon, the rest by SGD), ``sgd`` (Nesterov momentum) or
            ``adamw``.
        lr: peak learning rate; with ``muon`` that of the filters.
        rest_lr: with ``muon``, peak learning rate of all but the filters.
        momentum: of SGD.
        weight_decay: of weights with two or more dimensions; biases and norms are left alone, with ``muon`` filters
            too.
        label_smoothing: share of the target spread over all classes.
        augment: augmentation strength in [0, 1]; see `data.augment.augment_config`.
        warmup: share of the steps in which the rate climbs to its peak.
        schedule: how the rate falls from there to 0.
        clip_norm: gradients longer than this are shortened to it; 0: never.
        precision: ``auto`` takes bfloat16 if the device gains from it.
        seed: of initial weights, order of images and augmentation.
    """

    epochs: int
    batch_size: int = 128
    optimizer: Optimizer = "muon"
    lr: float = 0.1
    rest_lr: float = 0.3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    augment: float = 0.25
    warmup: float = 0.2
    schedule: Schedule = "linear"
    clip_norm: float = 5.0
    precision: Precision = "auto"
    seed: int = 0


PRESETS: dict[str, NetworkConfig] = {
    "seed-basic": NetworkConfig(
        widths=(10,) * 4,
        convs=4,
        pooled=(False,) * 4,
        pool_place="branch",
        activation="relu",
        head=(10,),
    ),
    "seed-advanced": NetworkConfig(
        widths=(512,) * 5,
        convs=5,
        pooled=(True,) * 5,
        pool_place="branch",
        activation="leaky_relu",
        head=(512, 512, 512),
    ),
}
"""The two hand-tuned networks of the public solution: 12,728 and 48,096,818 parameters."""
