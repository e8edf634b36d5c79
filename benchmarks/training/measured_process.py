"""One training in a process of its own, measured when its parent says so."""

import contextlib
import multiprocessing
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from benchmarks.training import airbench, plain
from benchmarks.training.networks import AIRBENCH, networks
from data import cifar10
from data.images import IMAGE_SIZE, LabelledImages
from data.split import Split, divide, first_images
from model.config import FitConfig
from model.device import keep_freed_pages, resolve_device
from model.fit import fit
from model.network import build_network
from search.worker.memory import peak_memory, reset_peak_memory

RANDOM_IMAGES = 10_000
VALIDATION_IMAGES = 10
SETTLE_SECONDS = 0.2
"""Between two measurements: the plain loop's loaders go on for this long after its last step."""

STOP_SECONDS = 60
"""Seconds for a process to end by itself: freeing gigabytes takes some, and a killed one leaves semaphores behind."""

# The rate climbs over a fifth of the epochs, so it stays low enough that nothing diverges, even on random images.
FIT = FitConfig(epochs=100_000, optimizer="adamw", augment=0.5)


class Training(Protocol):
    """Something that can be measured again and again."""

    def warm_up(self) -> None:
        """Do what happens only once."""

    def measure(self, seconds: float) -> float:
        """Images a second, over that many seconds or a little longer."""


class OurTraining:
    """`fit`, epoch after epoch; three epochs or so make a measurement.

    Args:
        network: on the split's device.
        split: epochs are made of its first images.
        config: with more epochs than are ever trained.
        seconds: of a measurement.
    """

    def __init__(self, network: nn.Module, split: Split, config: FitConfig, seconds: float) -> None:
        self._network, self._config, self._seconds = network, config, seconds
        few = slice(VALIDATION_IMAGES)
        self._split = replace(
            split, validation_images=split.validation_images[few], validation_labels=split.validation_labels[few]
        )

    def warm_up(self) -> None:
        """Learn the pace from epochs of one step, and begin the real ones with one that does not count."""
        batch = self._config.batch_size
        short = first_images(self._split, batch)
        *_, last = fit(self._network, short, replace(self._config, epochs=2))
        steps = max(1, round(last.images_per_second * self._seconds / 3 / batch))
        self._epochs = fit(self._network, first_images(self._split, steps * batch), self._config)
        self._images = min(steps, len(self._split.fit_labels) // batch) * batch
        next(self._epochs)

    def measure(self, seconds: float) -> float:
        """Images a second by the epochs' own count: validation and the time between epochs are left out."""
        images, spent = 0, 0.0
        while spent < seconds:
            images += self._images
            spent += self._images / next(self._epochs).images_per_second
        return images / spent


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        network: by name.
        ours: or the reference.
        batch: images in a step.
        device: by name.
        data_dir: where CIFAR-10 lies; None for random images.
        seconds: of a measurement.
    """

    network: str
    ours: bool
    batch: int
    device: str
    data_dir: Path | None
    seconds: float


@dataclass(frozen=True)
class Reading:
    """One measurement, and the peak of memory so far, in bytes."""

    images_per_second: float
    peak_memory: int


def load_images(data_dir: Path | None) -> LabelledImages:
    """CIFAR-10's training images, or random ones."""
    if data_dir is not None:
        return cifar10.load_training_images(data_dir)
    generator = torch.Generator().manual_seed(0)
    shape = (RANDOM_IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return LabelledImages(images, torch.arange(RANDOM_IMAGES) % 10, tuple("0123456789"), mirror=True)


def prepare(job: Job, device: torch.device) -> Training:
    """Load what a job needs."""
    if job.ours:
        return prepare_ours(job, device)
    if job.network == AIRBENCH:
        source = load_images(job.data_dir)
        return airbench.AirbenchTrainer(airbench.AirbenchNetwork(source.images[:5000]), source, device)
    network = plain.PlainNetwork(networks(device)[job.network])
    if job.data_dir is not None:
        images = plain.cifar10_images(job.data_dir)
    else:
        images = plain.ImagesInMemory(load_images(None), plain.plain_transform())
    return plain.PlainTrainer(network, images, job.batch, device)


def prepare_ours(job: Job, device: torch.device) -> Training:
    """Prepare as a worker does (`search.worker.torch_runner.open_torch_runner`)."""
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        keep_freed_pages()
    else:
        torch.cuda.set_device(device)
    split = divide(load_images(job.data_dir), 0, device)
    if job.network == AIRBENCH:
        network: nn.Module = airbench.AirbenchNetwork(split.fit_images[:5000].cpu())
        network = network.to(device).to(memory_format=torch.channels_last)
        return OurTraining(network, split, replace(airbench.FIT, batch_size=job.batch), job.seconds)
    network = build_network(networks(device)[job.network], device=device)
    return OurTraining(network, split, replace(FIT, batch_size=job.batch), job.seconds)


def serve(job: Job, pipe: Connection) -> None:
    """The process itself: get ready, then measure at every message, until the pipe is closed."""
    # This process was spawned, and would spawn the plain loop's loaders too, which costs seconds an epoch. Go back to
    # this Python's default.
    multiprocessing.set_start_method(None, force=True)
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        try:
            device = resolve_device(job.device)
            training = prepare(job, device)
            reset_peak_memory(device)
            pipe.send("ready")
            pipe.recv()
            training.warm_up()
            pipe.send("warm")
            while True:
                pipe.recv()
                pipe.send(Reading(training.measure(job.seconds), peak_memory(device)))
        except (EOFError, BrokenPipeError):
            raise
        except Exception:  # noqa: BLE001  (told to the parent)
            pipe.send(traceback.format_exc())


class MeasuredProcess:
    """The parent's side of one measured process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Not a daemon: daemons may not have children, and the plain loop's loaders are its children.
        self._process = context.Process(target=serve, args=(job, theirs))
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Wait until it has loaded what it needs."""
        self._answer("ready")

    def warm_up(self) -> None:
        """Go through the first steps."""
        self._pipe.send("warm up")
        self._answer("warm")

    def measure(self) -> Reading:
        """One round."""
        time.sleep(SETTLE_SECONDS)
        self._pipe.send("measure")
        answer = self._answer()
        assert isinstance(answer, Reading)
        return answer

    def release(self) -> None:
        """Let the process end by itself, while others are being released."""
        self._pipe.close()

    def stop(self) -> None:
        """Wait until it has ended; kill it if it does not."""
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self, expected: str | None = None) -> object:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(STOP_SECONDS)
            raise RuntimeError(f"{self._job} ended with status {self._process.exitcode}") from None
        if isinstance(answer, str) and answer != expected:
            raise RuntimeError(f"{self._job} failed:\n{answer}")
        return answer
