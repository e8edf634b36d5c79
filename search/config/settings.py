"""One trial's settings by their plain names, and the frozen configuration that they resolve to."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.config import (
    PRESETS,
    Activation,
    ConfigError,
    FitConfig,
    NetworkConfig,
    Optimizer,
    PoolPlace,
    Precision,
    Schedule,
)

MAX_BLOCKS = 16
WIDTH_STEP = 8
"""Grown widths are rounded to multiples of this, which suits vector units and tensor cores."""

Width = Annotated[int, Field(ge=1, le=4096)]


class TrialSettings(BaseModel):
    """Every name that a study file's ``[space]`` may hold, with its default.

    The first group describes the network, the second its training (see `model.config` for each term).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: Literal["none", "seed-basic", "seed-advanced"] = "none"
    """A preset network; the network's other settings are then ignored."""
    blocks: int = Field(default=4, ge=1, le=MAX_BLOCKS)
    convs: int = Field(default=2, ge=1, le=16)
    width: Width = 48
    """Channels of the first block."""
    width_growth: float = Field(default=2.0, ge=0.25, le=4)
    """Factor from a pooled block's width to the next block's, rounded to a multiple of eight."""
    block_widths: tuple[Width, ...] | None = None
    """The width of each block; replaces ``width`` and ``width_growth``."""
    max_width: Width = 512
    pools: int = Field(default=3, ge=0, le=MAX_BLOCKS)
    """Blocks that halve the image: spread evenly over the blocks, starting with the first."""
    pool_place: PoolPlace = "conv"
    activation: Activation = "relu"
    shortcut: bool = False
    head_layers: int = Field(default=1, ge=1, le=8)
    """Fully connected layers of the output block, including the last one."""

    batch_size: int = Field(default=128, ge=1, le=65536)
    optimizer: Optimizer = "muon"
    lr: float = Field(default=0.1, gt=0, le=100)
    rest_lr: float = Field(default=0.3, gt=0, le=100)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0, le=10)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    augment: float = Field(default=0.25, ge=0, le=1)
    warmup: float = Field(default=0.2, ge=0, le=1)
    schedule: Schedule = "linear"
    clip_norm: float = Field(default=5.0, ge=0)
    precision: Precision = "auto"


@dataclass(frozen=True)
class TrialConfig:
    """Everything that determines one trial's result on given images."""

    network: NetworkConfig
    fit: FitConfig


def trial_config(settings: TrialSettings, epochs: int, seed: int, classes: int) -> TrialConfig:
    """Resolve plain names into a network and its training.

    Raises:
        ConfigError: the names do not describe a network; the text says why.
    """
    fit = FitConfig(
        epochs=epochs,
        batch_size=settings.batch_size,
        optimizer=settings.optimizer,
        lr=settings.lr,
        rest_lr=settings.rest_lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        label_smoothing=settings.label_smoothing,
        augment=settings.augment,
        warmup=settings.warmup,
        schedule=settings.schedule,
        clip_norm=settings.clip_norm,
        precision=settings.precision,
        seed=seed,
    )
    return TrialConfig(network_config(settings, classes), fit)


def network_config(settings: TrialSettings, classes: int) -> NetworkConfig:
    """The network that the settings describe."""
    if settings.preset != "none":
        preset = PRESETS[settings.preset]
        return NetworkConfig(**{**vars(preset), "classes": classes})
    if settings.pools > settings.blocks:
        raise ConfigError(f"pools = {settings.pools} needs at least as many blocks, got {settings.blocks}")
    pooled = pooled_blocks(settings.blocks, settings.pools)
    widths = settings.block_widths or grown_widths(settings.width, settings.width_growth, settings.max_width, pooled)
    if len(widths) != settings.blocks:
        raise ConfigError(f"{settings.blocks} blocks but {len(widths)} block widths")
    return NetworkConfig(
        widths=widths,
        convs=settings.convs,
        pooled=pooled,
        pool_place=settings.pool_place,
        activation=settings.activation,
        shortcut=settings.shortcut,
        head=(widths[-1],) * (settings.head_layers - 1),
        classes=classes,
    )


def pooled_blocks(blocks: int, pools: int) -> tuple[bool, ...]:
    """Which blocks halve the image: ``pools`` of them, evenly spread, starting with the first.

    Pools come early because a block's cost falls fourfold after each.
    """
    done = [-(-block * pools // blocks) for block in range(blocks + 1)]
    return tuple(after > before for before, after in itertools.pairwise(done))


def grown_widths(width: int, growth: float, max_width: int, pooled: tuple[bool, ...]) -> tuple[int, ...]:
    """Each block's width: the first as given, then multiplied by ``growth`` after every pooled block."""
    widths, exact = [], float(width)
    for block, pools_here in enumerate(pooled):
        rounded = width if block == 0 else max(WIDTH_STEP, round(exact / WIDTH_STEP) * WIDTH_STEP)
        widths.append(min(rounded, max_width))
        exact *= growth if pools_here else 1
    return tuple(widths)


def settings_from(values: Mapping[str, Any]) -> TrialSettings:
    """Validated settings from plain values; pydantic's `ValidationError` if one is wrong."""
    return TrialSettings.model_validate(dict(values))
