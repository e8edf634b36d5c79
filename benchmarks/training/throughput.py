"""Training speed of our `fit` beside plain loops, on one device, in turns.

    python -m benchmarks.training.throughput --device cpu|cuda [--json FILE] [--networks small,typical] [--rounds 5]

ours         `model.fit.fit` with a study's settings but AdamW, as the reference has it, precision auto, augmentation
             0.5 (flip and crop as the reference has them, and more); its own count of images a second
reference    `benchmarks.training.plain`: the public solution's loop, at its batch of 64 and at ours; on a GPU, for
airbench94's
             network, `benchmarks.training.airbench`

Each of them is a process of its own which lives through all rounds and waits on a pipe while another one is
measured: neither shares an allocator, its settings or a peak of memory with the other. The order is turned about every
round. Images are CIFAR-10 where ``--data-dir`` has it, else random ones of the same shape.

FLOP/s are those of the model: three times the forward pass's convolutions and matrix products (once forward, twice
back), times images a second. The share of the peak is of what large square matrix products reach in the dtype that we
compute in, measured first. Memory is ours: the allocator's peak on a GPU, else the process's resident peak, which has
PyTorch itself and the loading of the images in it.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from benchmarks.training import airbench, plain
from data import cifar10
from data.errors import DataError
from data.images import IMAGE_SIZE, LabelledImages
from data.paths import data_folder
from data.split import Split, divide, first_images
from model.config import PRESETS, ConfigError, FitConfig, NetworkConfig
from model.cost import count_cost
from model.device import autocast_dtype, describe_device, keep_freed_pages, resolve_device
from model.fit import fit
from model.network import build_network, count_parameters
from model.saved import write_json
from search.host.environment import environment
from search.worker.memory import peak_memory, reset_peak_memory

POOLS3, POOLS4, POOLS6 = (True,) * 3, (True, True, True, False), (True, False) * 3

SIZES: dict[str, dict[str, NetworkConfig]] = {
    # Within the ranges of studies/cpu.toml and, for a GPU, of studies/cifar10.toml.
    "cpu": {
        "small": NetworkConfig((24, 32, 48), 2, POOLS3, "conv", "gelu"),
        "typical": NetworkConfig((48, 96, 192, 192), 2, POOLS4, "conv", "gelu"),
        "large": NetworkConfig((48, 48, 96, 96, 192, 192), 3, POOLS6, "conv", "gelu"),
    },
    "cuda": {
        "small": NetworkConfig((32, 48, 64), 2, POOLS3, "conv", "gelu"),
        "typical": NetworkConfig((64, 128, 256, 256), 2, POOLS4, "conv", "gelu"),
        "large": NetworkConfig((96, 96, 192, 192, 384, 384), 3, POOLS6, "conv", "gelu"),
    },
}
AIRBENCH = "airbench94"

BATCH_SIZE = {"cpu": 128, "cuda": 512}
SMALL_BATCH = {("cpu", "seed-advanced"): 64}
"""A step of 64 of its images takes seconds on a CPU, and memory by the gigabyte."""

RANDOM_IMAGES = 10_000
VALIDATION_IMAGES = 10
SETTLE_SECONDS = 0.2
"""Between two measurements: the plain loop's loaders go on for so long after its last step."""

STOP_SECONDS = 60
"""Gigabytes, loaders and PyTorch take seconds to go; a process that is killed leaves semaphores behind."""

# The rate climbs over a fifth of the epochs: it stays so low that nothing diverges, also on random images.
FIT = FitConfig(epochs=100_000, optimizer="adamw", augment=0.5)


class Training(Protocol):
    """Something that can be measured again and again."""

    def warm_up(self) -> None:
        """All that happens only once."""

    def measure(self, seconds: float) -> float:
        """Images a second, over that long or a little longer."""


class OurTraining:
    """`fit`, epoch after epoch; three epochs or so make a measurement.

    Args:
        network: on the split's device.
        split: epochs are made of its first images.
        config: with more epochs than will be asked for.
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
        """By the epochs' own count: validation and what lies between epochs are left out."""
        images, spent = 0, 0.0
        while spent < seconds:
            images += self._images
            spent += self._images / next(self._epochs).images_per_second
        return images / spent


# One measured process


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
    """As a worker's seat does (`search.worker.torch_runner.open_torch_runner`)."""
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
    """Be the process: get ready, then measure at every word, until the pipe is closed."""
    # This process was spawned, and would spawn the plain loop's loaders too, at seconds an epoch; as anywhere else they
    # shall come as this Python makes them by default.
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


class Meter:
    """The parent's hand on one measured process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # No daemon: those may not have children, and the plain loop's loaders are its children.
        self._process = context.Process(target=serve, args=(job, theirs))
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it has loaded what it needs."""
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
        """Let the process end by itself; it may do so while others are told."""
        self._pipe.close()

    def stop(self) -> None:
        """Wait until it has ended, and see to it."""
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


# All of them


def networks(device: torch.device) -> dict[str, NetworkConfig]:
    """What is measured on a device, but for airbench94."""
    return {**PRESETS, **SIZES[device.type]}


def batch_sizes(network: str, device: torch.device) -> tuple[int, int]:
    """Ours and the reference's own."""
    if network == AIRBENCH:
        return airbench.BATCH_SIZE, airbench.BATCH_SIZE
    return SMALL_BATCH.get((device.type, network), BATCH_SIZE[device.type]), plain.BATCH_SIZE


def cost(network: str, device: torch.device) -> tuple[int, int]:
    """Parameters and forward FLOPs of an image."""
    if network == AIRBENCH:
        return count_parameters(airbench.AirbenchNetwork()), airbench.count_flops()
    counted = count_cost(networks(device)[network])
    return counted.parameters, counted.flops


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 15) -> float:
    """FLOP/s of large square matrix products; the median."""
    size = 8192 if device.type == "cuda" else 2048
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(one)
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        torch.mm(one, other, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[3:])


def measure(network: str, device: torch.device, data_dir: Path | None, rounds: int, seconds: float) -> dict[str, Any]:
    """All rounds of one network: what its row says of speed and memory."""
    batch, own = batch_sizes(network, device)
    jobs = {"ours": Job(network, True, batch, str(device), data_dir, seconds)}
    jobs["reference"] = replace(jobs["ours"], ours=False, batch=own)
    if own != batch:
        jobs["same_batch"] = replace(jobs["reference"], batch=batch)
    meters: dict[str, Meter] = {}
    readings: dict[str, list[Reading]] = {name: [] for name in jobs}
    try:
        for name, job in jobs.items():
            meters[name] = Meter(job)
        for meter in meters.values():
            meter.wait()
        for meter in meters.values():
            meter.warm_up()
        for number in range(rounds):
            for name in list(jobs)[:: -1 if number % 2 else 1]:
                readings[name].append(meters[name].measure())
    finally:
        for meter in meters.values():
            meter.release()
        for meter in meters.values():
            meter.stop()
    rates = {name: [reading.images_per_second for reading in values] for name, values in readings.items()}
    rates.setdefault("same_batch", rates["reference"])
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "network": network,
        "batch": batch,
        "ours_images_per_second": medians["ours"],
        "reference_images_per_second": medians["reference"],
        "ratio": medians["ours"] / medians["reference"],
        "peak_memory_bytes": max(reading.peak_memory for reading in readings["ours"]),
        "reference_batch": own,
        "reference_images_per_second_same_batch": medians["same_batch"],
        "ratio_same_batch": medians["ours"] / medians["same_batch"],
        "n": rounds,
        "ours_rounds": rates["ours"],
        "reference_rounds": rates["reference"],
        "reference_rounds_same_batch": rates["same_batch"],
    }


def with_flops(row: dict[str, Any], device: torch.device, matrix_flops: float) -> dict[str, Any]:
    """A row with what its speed means for the device."""
    parameters, forward = cost(row["network"], device)
    achieved = 3 * forward * row["ours_images_per_second"]
    return {
        **row,
        "achieved_flops": achieved,
        "share_of_peak": achieved / matrix_flops,
        "parameters": parameters,
        "forward_flops_per_image": forward,
    }


HEAD = (
    f"{'network':14} {'batch':>5} {'ours':>10} {'reference':>10} {'ratio':>6} {'same batch':>10} {'ratio':>6} "
    f"{'GFLOP/s':>9} {'of peak':>7} {'memory':>9}"
)


def line(row: dict[str, Any]) -> str:
    """A row as a person reads it."""
    return (
        f"{row['network']:14} {row['batch']:5} {row['ours_images_per_second']:10,.1f} "
        f"{row['reference_images_per_second']:10,.1f} {row['ratio']:6.2f} "
        f"{row['reference_images_per_second_same_batch']:10,.1f} {row['ratio_same_batch']:6.2f} "
        f"{row['achieved_flops'] / 1e9:9,.1f} {row['share_of_peak']:7.1%} {row['peak_memory_bytes'] / 2**20:5,.0f} MiB"
    )


def versions() -> dict[str, str]:
    """Of what decides speed, and when it was."""
    there = environment()
    return {
        **{name: there[name] for name in ("python", "torch", "torchvision", "commit")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def arguments_of(words: Sequence[str]) -> tuple[argparse.Namespace, torch.device, list[str]]:
    """What was asked for, the device and the networks; ends the process where that makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--networks", help="some of them, with commas in between")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a measurement")
    parser.add_argument("--data-dir", type=Path, help="default: $SEARCH_DATA_DIR, else the user's cache folder")
    arguments = parser.parse_args(words)
    try:
        device = resolve_device(arguments.device)
    except ConfigError as error:
        parser.error(str(error))
    there = [*networks(device), *([AIRBENCH] if device.type == "cuda" else [])]
    chosen = arguments.networks.split(",") if arguments.networks else there
    if unknown := sorted(set(chosen) - set(there)):
        parser.error(f"no network {unknown[0]!r} on {device.type}; choose of {', '.join(there)}")
    if arguments.rounds < 1:
        parser.error("at least one round")
    return arguments, device, list(dict.fromkeys(chosen))


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a line for each network, and write them all."""
    start = time.perf_counter()
    words = sys.argv[1:] if words is None else words
    arguments, device, chosen = arguments_of(words)
    data_dir: Path | None = data_folder(arguments.data_dir)
    assert data_dir is not None
    if not cifar10.is_present(data_dir):
        data_dir = None
    else:
        try:
            cifar10.verify(data_dir)
        except DataError as error:
            raise SystemExit(f"error: {error}") from None
    dtype = autocast_dtype("auto", device) or torch.float32
    matrix_flops = matrix_rate(device, dtype)
    rows: list[dict[str, Any]] = []
    result = {
        "command": " ".join(["python -m benchmarks.training.throughput", *words]),
        "device": describe_device(device),
        "versions": versions(),
        "images": "cifar10" if data_dir else "random",
        "dtype": str(dtype).removeprefix("torch."),
        "matrix_flops": matrix_flops,
        "rows": rows,
    }
    print(f"{result['device']}, {matrix_flops / 1e9:,.0f} GFLOP/s in {result['dtype']} matrix products")
    print(f"{result['images']} images; images a second, medians of {arguments.rounds} rounds in turns")
    print(HEAD, flush=True)
    for network in chosen:
        row = measure(network, device, data_dir, arguments.rounds, arguments.seconds)
        rows.append(with_flops(row, device, matrix_flops))
        print(line(rows[-1]), flush=True)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.json, {**result, "seconds": round(time.perf_counter() - start, 1)})
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
