"""Training one network: a generator of epochs that knows nothing of studies."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.batches import Batches
from data.split import Split
from model.config import FitConfig, Schedule
from model.cuda_graph import Step, graphed_step
from model.device import autocast_dtype, mark, seconds_between
from model.evaluate import loss_and_accuracy
from model.muon import Muon
from model.network import Block
from model.result import EpochResult


class NonFiniteLossError(ArithmeticError):
    """The training diverged: the loss is infinite or not a number."""


@dataclass
class FitState:
    """Everything that a training changes besides its network; `fit` keeps it up to date.

    Attributes:
        optimizer: of the network's parameters, with its momentum.
        generator: of the order of images and of augmentation; on the network's device.
        epoch: epochs done so far; 0 before the first.
    """

    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    epoch: int = 0


def start_state(network: nn.Module, config: FitConfig, device: torch.device) -> FitState:
    """The state before the first epoch of a network on the device."""
    return FitState(build_optimizer(network, config), torch.Generator(device).manual_seed(config.seed))


def fit(network: nn.Module, split: Split, config: FitConfig, *, state: FitState | None = None) -> Iterator[EpochResult]:
    """Train a network on a split's fit images and yield after every epoch.

    The network is on the split's device and is trained in place; between epochs the caller may look at it,
    save it, or stop. Same seed, device and software give the same numbers.

    Args:
        network: on the split's device.
        split: images and labels.
        config: of the whole training, also if it resumes from a state.
        state: this network's, from `start_state` or as `model.checkpoint.load_checkpoint` restored it. The training
            continues after its last epoch as if it had never stopped, and yields nothing if no epoch is left. It is up
            to date whenever `fit` has yielded; after an error it no longer matches the network. None: from the start.

    Raises:
        NonFiniteLossError: the loss of an epoch was not finite.
    """
    device = split.fit_images.device
    if state is None:
        state = start_state(network, config, device)
    batches = Batches(
        split.fit_images, split.fit_labels, config.batch_size, config.augment, split.mirror, state.generator
    )
    factors = lr_factors(config, batches.steps)
    totals = _EpochTotals(torch.zeros(batches.steps, device=device), torch.zeros(1, device=device))
    step = _step(network, batches, config, factors, state, totals)
    run = graphed_step(step, device, state.generator)
    for epoch in range(state.epoch + 1, config.epochs + 1):
        start = mark(device)
        network.train()
        totals.hits.zero_()
        batches.shuffle()
        for _ in range(batches.steps):
            run()
        trained = mark(device)
        validation = loss_and_accuracy(network, split.validation_images, split.validation_labels, config.precision)
        # The epoch's one synchronisation.
        right, validation_loss, validation_accuracy, *step_losses = torch.cat(
            [totals.hits, validation, totals.losses]
        ).tolist()
        end = mark(device)
        train_loss = math.fsum(step_losses) / batches.steps
        if not math.isfinite(train_loss):
            raise NonFiniteLossError(f"loss is {train_loss} in epoch {epoch} at learning rate {config.lr:g}")
        images = batches.steps * batches.batch_size
        state.epoch = epoch
        yield EpochResult(
            epoch=epoch,
            train_loss=train_loss,
            train_accuracy=right / images,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            images_per_second=images / seconds_between(start, trained),
            lr=config.lr * factors[epoch * batches.steps - 1],
            seconds=seconds_between(start, end),
            losses=tuple(step_losses),
        )


@dataclass(frozen=True)
class _EpochTotals:
    """What the steps of an epoch add up on the device.

    Attributes:
        losses: of every step, float32 (steps,).
        hits: images classified correctly, float32 (1,).
    """

    losses: Tensor
    hits: Tensor


def _step(
    network: nn.Module,
    batches: Batches,
    config: FitConfig,
    factors: list[float],
    state: FitState,
    totals: _EpochTotals,
) -> Step:
    """A function that trains the network on the next batch.

    Everything that changes from step to step is on the device: the host only starts a step.
    """
    optimizer, device = state.optimizer, batches.labels.device
    dtype = autocast_dtype(config.precision, device)
    peaks = torch.tensor([group["peak_lr"] for group in optimizer.param_groups], device=device)
    all_rates = torch.tensor(factors, device=device)[:, None] * peaks
    number = torch.tensor([state.epoch * batches.steps], device=device)
    rates = all_rates[0].clone()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate  # a view of what `step` fills

    def step() -> None:
        rates.copy_(all_rates.index_select(0, number)[0])  # all_rates[number] would ask the host for the number
        index = number.remainder(batches.steps)
        number.add_(1)
        images, labels = batches.take()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
        train_step(network, optimizer, loss, config.clip_norm)
        totals.losses.index_copy_(0, index, loss.detach().reshape(1))
        totals.hits.add_((logits.detach().argmax(1) == labels).sum())

    return step


def lr_factors(config: FitConfig, epoch_steps: int) -> list[float]:
    """The learning rate of every step of a training, as a share of its peak."""
    steps = config.epochs * epoch_steps
    return [lr_factor(step, steps, config.warmup, config.schedule) for step in range(steps)]


def lr_factor(step: int, steps: int, warmup: float, schedule: Schedule) -> float:
    """Share of the peak learning rate at a step: linear climb, then the schedule's fall to 0.

    Args:
        step: from 0 to ``steps`` - 1.
        steps: of the whole training.
        warmup: share of the steps in which the rate climbs.
        schedule: ``linear``, ``cosine`` or ``constant``.
    """
    climb = warmup * steps
    if step + 1 < climb:
        return (step + 1) / climb
    if schedule == "constant":
        return 1.0
    done = (step + 1 - climb) / (steps - climb + 1) if steps > climb else 0.0
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float) -> None:
    """One backward pass and one update, with the gradient's length limited to ``clip_norm`` (0: not limited)."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if clip_norm:
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
    optimizer.step()


def build_optimizer(network: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """Muon, or PyTorch's fused SGD (Nesterov) or AdamW; weight decay on matrices and filters only.

    Every parameter group has its peak learning rate as ``peak_lr``.
    """
    if config.optimizer == "muon":
        filters = {block.conv.weight: block.convs for block in network.modules() if isinstance(block, Block)}
        rest = parameter_groups(network, config.rest_lr, config.weight_decay, without=filters)
        dtype = autocast_dtype(config.precision, next(network.parameters()).device) or torch.float32
        return Muon(filters, rest, config.lr, config.momentum, dtype)
    groups = parameter_groups(network, config.lr, config.weight_decay)
    if config.optimizer == "adamw":
        on_gpu = next(network.parameters()).is_cuda  # "capturable": all of its state on the device
        return torch.optim.AdamW(groups, lr=config.lr, fused=True, capturable=on_gpu)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)


def parameter_groups(
    network: nn.Module, lr: float, weight_decay: float, without: Iterable[Tensor] = ()
) -> list[dict[str, Any]]:
    """A network's parameters: matrices and filters, with weight decay, and vectors."""
    left_out = {id(parameter) for parameter in without}
    parameters = [p for p in network.parameters() if p.requires_grad and id(p) not in left_out]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "lr": lr, "peak_lr": lr},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr": lr, "peak_lr": lr},
    ]
