"""What a network costs, counted on the meta device: nothing is allocated and nothing runs."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import NetworkConfig
from model.network import BlockNetwork, count_parameters


@dataclass(frozen=True)
class Cost:
    """Cost of a network.

    Attributes:
        parameters: trainable values.
        flops: floating-point operations of one image's forward pass (a multiply-add is two), matrix products and
            convolutions only, as `torch.utils.flop_counter` counts them.
    """

    parameters: int
    flops: int


def count_cost(config: NetworkConfig) -> Cost:
    """Parameters and forward FLOPs of a network."""
    with torch.device("meta"):
        network = BlockNetwork(config).eval()
        image = torch.empty(1, 3, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(image)
    return Cost(count_parameters(network), counter.get_total_flops())
