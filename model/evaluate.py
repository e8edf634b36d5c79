"""Loss and accuracy of a network over a set of images."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import Precision
from model.device import autocast_dtype

CPU_BATCH_SIZE, GPU_BATCH_SIZE = 500, 2_500
"""Images in a pass: activations that stay in a CPU's cache; on a GPU, few and large kernels."""


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy (nats, without label smoothing) and share of images classified correctly."""

    loss: float
    accuracy: float


@contextlib.contextmanager
def inference(network: nn.Module, precision: Precision, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients and the precision's autocast, within the context; the mode is restored."""
    was_training = network.training
    dtype = autocast_dtype(precision, device)
    network.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        network.train(was_training)


def predict_logits(network: nn.Module, images: Tensor, precision: Precision = "auto") -> Tensor:
    """Logits (float32, (n, classes)) of uint8 images (n, 3, h, w), in eval mode; the mode is restored."""
    with inference(network, precision, images.device):
        batches = torch.split(images, CPU_BATCH_SIZE if images.device.type == "cpu" else GPU_BATCH_SIZE)
        return torch.cat([network(batch) for batch in batches]).float()


def loss_and_accuracy(network: nn.Module, images: Tensor, labels: Tensor, precision: Precision = "auto") -> Tensor:
    """Loss and accuracy as in `evaluate`, float32 (2,) on the device: the host need not wait."""
    logits = predict_logits(network, images, precision)
    return torch.stack([F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()])


def evaluate(network: nn.Module, images: Tensor, labels: Tensor, precision: Precision = "auto") -> Evaluation:
    """Evaluate a network on uint8 images (n, 3, h, w) and int64 labels (n,); one synchronisation."""
    loss, accuracy = loss_and_accuracy(network, images, labels, precision).tolist()
    return Evaluation(loss, accuracy)
