"""Training speed of our `fit` and of plain loops, on one device, in turns.

    python -m benchmarks.training.throughput --device cpu|cuda [--json FILE] [--networks small,typical] [--rounds 5]

ours         `model.fit.fit` with a study's settings but AdamW, as the reference has it, precision auto, augmentation
             0.5 (flip and crop as the reference has them, and more); its own count of images a second
reference    `benchmarks.training.plain`: the public solution's loop, at its batch of 64 and at ours; on a GPU, for
             airbench94's network, `benchmarks.training.airbench`

Each of them is a process of its own, which lives through all rounds and waits on a pipe while another one is measured:
they share no allocator, no settings and no peak of memory. The order is reversed every round. Images are CIFAR-10 if
``--data-dir`` has it, else random ones of the same shape.

FLOP/s are those of the model: three times the forward pass's convolutions and matrix products (once forward, twice
back), times images a second. The share of the peak is of what large square matrix products reach in the dtype that we
compute in, measured first. Memory is ours: the allocator's peak on a GPU, else the process's resident peak, which
includes PyTorch itself and the loading of the images.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.measured_process import Job, MeasuredProcess, Reading
from benchmarks.training.networks import AIRBENCH, batch_sizes, cost, networks
from data import cifar10
from data.errors import DataError
from data.paths import data_folder
from model.config import ConfigError
from model.device import autocast_dtype, describe_device, resolve_device
from model.saved import write_json
from search.host.environment import environment


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 15) -> float:
    """FLOP/s of large square matrix products; the median."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
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
    processes: dict[str, MeasuredProcess] = {}
    readings: dict[str, list[Reading]] = {name: [] for name in jobs}
    try:
        for name, job in jobs.items():
            processes[name] = MeasuredProcess(job)
        for process in processes.values():
            process.wait()
        for process in processes.values():
            process.warm_up()
        for number in range(rounds):
            for name in list(jobs)[:: -1 if number % 2 else 1]:
                readings[name].append(processes[name].measure())
    finally:
        for process in processes.values():
            process.release()
        for process in processes.values():
            process.stop()
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
    """Versions of what decides speed, and the time."""
    installed = environment()
    return {
        **{name: installed[name] for name in ("python", "torch", "torchvision", "commit")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def arguments_of(words: Sequence[str]) -> tuple[argparse.Namespace, torch.device, list[str]]:
    """The options, the device and the networks; ends the process if they make no sense."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.throughput", description=__doc__)
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
    known = [*networks(device), *([AIRBENCH] if device.type == "cuda" else [])]
    chosen = arguments.networks.split(",") if arguments.networks else known
    if unknown := sorted(set(chosen) - set(known)):
        parser.error(f"no network {unknown[0]!r} on {device.type}; choose of {', '.join(known)}")
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
