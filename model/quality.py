"""What a classifier is worth on given images, and how long it takes for them."""

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import Precision
from model.device import mark, seconds_between
from model.evaluate import inference, predict_logits

CALIBRATION_BINS = 15
WARM_UP_PASSES, TIMED_PASSES = 10, 100
LATENCY_SECONDS = 2.5
"""After this time `latency` begins no further pass."""


@dataclass(frozen=True)
class Quality:
    """What a classifier is worth on a set of images.

    Attributes:
        accuracy: share of the images classified correctly.
        loss: mean cross-entropy without label smoothing, in nats.
        per_class: accuracy on the images of each class; None for a class without images.
        confusion: numbers of images, a row for each true class, a column for each predicted one.
        calibration_error: expected calibration error, in [0, 1]: by how much the probability of the predicted class
            misses the share of right predictions, averaged over images that are binned by it (15 bins of equal
            width). Source: Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv:1706.04599.
        images: their number.
    """

    accuracy: float
    loss: float
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    calibration_error: float
    images: int


class Mirrored(nn.Module):
    """A network whose logits (float32) are the mean of those of an image and of its mirror image.

    This is test-time augmentation; two passes instead of one.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training  # the wrapper is new, the network keeps its mode

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images).float() + self.network(images.flip(-1)).float()
        return logits / 2


def as_predictor(network: nn.Module, flip: bool) -> nn.Module:
    """The module that predicts: the network itself, or with ``flip`` the network with test-time augmentation."""
    return Mirrored(network) if flip else network


def logits_of(network: nn.Module, images: Tensor, precision: Precision = "auto", flip: bool = False) -> Tensor:
    """Logits (float32, (n, classes)) of uint8 images (n, 3, h, w), in batches; the network's mode is restored.

    Args:
        network: on the images' device.
        images: any number of them.
        precision: of the passes.
        flip: average the logits of every image with those of its mirror image.
    """
    return predict_logits(as_predictor(network, flip), images, precision)


def assess(predictor: nn.Module, images: Tensor, labels: Tensor, precision: Precision, classes: int) -> Quality:
    """Measure a classifier on labelled images.

    Args:
        predictor: a network, or what `as_predictor` makes of it, on the images' device.
        images: uint8, (n, 3, h, w).
        labels: int64, (n,), in [0, classes).
        precision: of the passes.
        classes: how many there are.

    Raises:
        ValueError: there are no images.
    """
    if not len(labels):
        raise ValueError("a classifier cannot be assessed on no images")
    logits = logits_of(predictor, images, precision)
    predicted = logits.argmax(1)
    counts = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
    confusion: list[list[int]] = counts.tolist()
    return Quality(
        accuracy=sum(row[label] for label, row in enumerate(confusion)) / len(labels),
        loss=F.cross_entropy(logits, labels).item(),
        per_class=tuple(row[label] / sum(row) if any(row) else None for label, row in enumerate(confusion)),
        confusion=tuple(map(tuple, confusion)),
        calibration_error=_calibration_error(logits, predicted == labels),
        images=len(labels),
    )


def _calibration_error(logits: Tensor, hits: Tensor) -> float:
    """Expected calibration error of logits (n, classes) and of whether each was right (bool, (n,))."""
    confidence = logits.double().softmax(1).amax(1)
    # Bin b holds the confidences in (b / bins, (b + 1) / bins].
    edges = torch.arange(1, CALIBRATION_BINS, dtype=torch.float64, device=logits.device) / CALIBRATION_BINS
    gaps = torch.bincount(torch.bucketize(confidence, edges), weights=hits.double() - confidence)
    return float(gaps.abs().sum()) / len(hits)


def latency(network: nn.Module, batch: int, precision: Precision = "auto", size: int = 32) -> float:
    """Median seconds of a forward pass of a batch, on the network's device, from images that are there.

    Takes about three seconds at most, or two passes if these take longer.

    Args:
        network: left in its mode.
        batch: images in a pass.
        precision: of the pass.
        size: height and width of the images.
    """
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator, device=device)
    began = time.perf_counter()

    def passes(most: int, until: float) -> list[float]:
        """Seconds of each of at most this many passes; fewer if time is up, but at least one."""
        taken: list[float] = []
        while not taken or (len(taken) < most and time.perf_counter() - began < until):
            start = mark(device)
            network(images)
            taken.append(seconds_between(start, mark(device)))
        return taken

    with inference(network, precision, device):
        passes(WARM_UP_PASSES, LATENCY_SECONDS / 5)  # memory is allocated, algorithms are chosen, clocks rise
        return median(passes(TIMED_PASSES, LATENCY_SECONDS))
