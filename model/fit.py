"""Training one network: a generator of epochs that knows nothing of studies."""

import math
import time
from collections.abc import Iterator

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


def fit(network: nn.Module, split: Split, config: FitConfig) -> Iterator[EpochResult]:
    """Train a network on a split's fit images and yield after every epoch.

    The network lies on the split's device and is trained in place; between epochs the caller may look at it,
    save it, or stop. Same seed, device and software give the same numbers.

    Raises:
        NonFiniteLossError: the loss of an epoch was not finite.
    """
    images, labels = split.fit_images, split.fit_labels
    device = images.device
    dtype = autocast_dtype(config.precision, device)
    generator = torch.Generator(device).manual_seed(config.seed)
    optimizer = build_optimizer(network, config)
    batch_size = min(config.batch_size, len(labels))
    epoch_steps = steps_per_epoch(len(labels), batch_size)
    steps = config.epochs * epoch_steps
    step = 0
    for epoch in range(1, config.epochs + 1):
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
