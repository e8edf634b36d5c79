"""Whether the fast form of a network learns as well as the plain one: same configuration, same seeds, in turn.

    python -m benchmarks.training.accuracy [--seeds 5] [--epochs 4] [--images 7500] [--data-dir DIR] [--json FILE]

On the CPU: the code compiled for the processor (`model.kernels.winograd`, `model.kernels.tail`) against PyTorch's own
operations. The configuration is the one that studies/cpu.toml starts from.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data.paths import data_folder
from data.split import Split, first_images, load_split
from model.config import FitConfig, NetworkConfig
from model.device import describe_device, keep_freed_pages
from model.fit import fit
from model.kernels.dispatch import plain_operations
from model.network import build_network

NETWORK = NetworkConfig((48, 96, 96, 192, 192), 2, (True, False, True, True, False), activation="gelu")
FIT = FitConfig(epochs=4, lr=0.1, augment=0.2)


def accuracy(split: Split, config: FitConfig) -> float:
    """Validation accuracy after the last epoch."""
    return list(fit(build_network(NETWORK, config.seed), split, config))[-1].validation_accuracy


def one_seed(split: Split, config: FitConfig) -> dict[str, float]:
    """Accuracy of each form, from the same seed."""
    fast = accuracy(split, config)
    with plain_operations():
        plain = accuracy(split, config)
    return {"compiled": fast, "plain": plain}


def compared(rows: Sequence[dict[str, float]], name: str, base: str) -> str:
    """Mean difference of pairs and its standard error, in points."""
    differences = [100 * (row[name] - row[base]) for row in rows]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(rows) > 1 else float("nan")
    return f"{name} - {base}: {statistics.mean(differences):+.2f} +- {error:.2f} points (n = {len(rows)})"


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.accuracy", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=FIT.epochs)
    parser.add_argument("--images", type=int, default=7_500)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    keep_freed_pages()
    device = torch.device("cpu")
    split = first_images(load_split("cifar10", data_folder(given.data_dir), 0, device), given.images)
    rows = []
    for seed in range(given.seeds):
        rows.append(one_seed(split, replace(FIT, epochs=given.epochs, seed=seed)))
        print(
            f"seed {seed}: " + ", ".join(f"{name} {100 * value:.2f} %" for name, value in rows[-1].items()), flush=True
        )
    print(compared(rows, "compiled", "plain"))
    if given.json:
        given.json.write_text(json.dumps({"device": describe_device(device), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
