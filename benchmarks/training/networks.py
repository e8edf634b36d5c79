"""Which networks `benchmarks.training.throughput` measures on a device, and at which batch sizes."""

import torch

from benchmarks.training import airbench, plain
from model.config import PRESETS, NetworkConfig
from model.cost import count_cost
from model.network import count_parameters

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
