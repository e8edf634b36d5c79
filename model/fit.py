"""Training one network: a generator of epochs that knows nothing of studies."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.batches import steps_per_epoch, training_batches
from data.split import Split
from model.config import FitConfig
from model.device import autocast_dtype
from model.evaluate import evaluate
from model.result import EpochResult
from model.schedule import lr_factor


class NonFiniteLossError(ArithmeticError):
    """The training diverged: the loss is infinite or not a number."""


@dataclass
class FitState:
    """All that a training changes besides its network; `fit` keeps it up to date.

    Attributes:
        optimizer: of the network's parameters, with its momentum.
        generator: of the order of images and of augmentation; on the network's device.
        epoch: epochs done so far; 0 before the first.
    """

    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    epoch: int = 0


def start_state(network: nn.Module, config: FitConfig, device: torch.device) -> FitState:
    """The state before the first epoch of a network that lies on the device."""
    return FitState(build_optimizer(network, config), torch.Generator(device).manual_seed(config.seed))


def fit(network: nn.Module, split: Split, config: FitConfig, *, state: FitState | None = None) -> Iterator[EpochResult]:
    """Train a network on a split's fit images and yield after every epoch.

    The network lies on the split's device and is trained in place; between epochs the caller may look at it,
    save it, or stop. Same seed, device and software give the same numbers.

    Args:
        network: on the split's device.
        split: images and labels.
        config: of the whole training, also where it goes on from a state.
        state: this network's, from `start_state` or as `model.checkpoint.load_checkpoint` restored it. The training
            goes on behind its last epoch as if it had never stopped, and gives nothing where no epoch is left. It
            is up to date whenever `fit` has yielded; after an error it fits the network no more. None starts anew.

    Raises:
        NonFiniteLossError: the loss of an epoch was not finite.
    """
    images, labels = split.fit_images, split.fit_labels
    device = images.device
    dtype = autocast_dtype(config.precision, device)
    if state is None:
        state = start_state(network, config, device)
    optimizer, generator = state.optimizer, state.generator
    batch_size = min(config.batch_size, len(labels))
    epoch_steps = steps_per_epoch(len(labels), batch_size)
    steps = config.epochs * epoch_steps
    step = state.epoch * epoch_steps
    for epoch in range(state.epoch + 1, config.epochs + 1):
        start = time.perf_counter()
        network.train()
        # Sums stay on the device; reading them every step would make the device wait for the host.
        losses = torch.zeros((), device=device)
        hits = torch.zeros((), device=device)
        for batch, targets in training_batches(images, labels, batch_size, config.augment, split.mirror, generator):
            factor = lr_factor(step, steps, config.warmup, config.schedule)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * factor
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                logits = network(batch)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
            train_step(network, optimizer, loss, config.clip_norm)
            losses += loss.detach()
            hits += (logits.detach().argmax(1) == targets).sum()
            step += 1
        train_loss, train_accuracy = (losses / epoch_steps).item(), (hits / (epoch_steps * batch_size)).item()
        trained = time.perf_counter() - start
        if not math.isfinite(train_loss):
            raise NonFiniteLossError(f"loss is {train_loss} in epoch {epoch} at learning rate {config.lr:g}")
        validation = evaluate(network, split.validation_images, split.validation_labels, config.precision)
        state.epoch = epoch
        yield EpochResult(
            epoch=epoch,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            validation_loss=validation.loss,
            validation_accuracy=validation.accuracy,
            images_per_second=epoch_steps * batch_size / trained,
            lr=config.lr * factor,
            seconds=time.perf_counter() - start,
        )


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float) -> None:
    """One backward pass and one update, with the gradient's length held to ``clip_norm`` (0: left alone)."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if clip_norm:
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
    optimizer.step()


def build_optimizer(network: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """PyTorch's fused SGD (Nesterov) or AdamW; weight decay on matrices and filters only."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)
