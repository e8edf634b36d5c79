"""What a network costs, by arithmetic on its description: building it to count took 15 ms of every trial."""

from dataclasses import dataclass

from model.config import NetworkConfig


@dataclass(frozen=True)
class NetworkCost:
    """Cost of a network.

    Attributes:
        parameters: trainable values.
        flops: floating-point operations of one image's forward pass (a multiply-add is two), matrix products,
            convolutions and the branches' weighted sums only, as `torch.utils.flop_counter` counts them.
    """

    parameters: int
    flops: int


def count_cost(config: NetworkConfig) -> NetworkCost:
    """Parameters and forward FLOPs of a network."""
    parameters = flops = 0
    channels, size = 3, config.image_size
    for width, pooled in zip(config.widths, config.pooled, strict=True):
        branches = config.convs * width
        convolution, norm, weigh = (9 * channels + 1) * branches, 2 * branches, (channels + 1) * config.convs
        parameters += convolution + norm + weigh
        flops += 2 * 9 * channels * branches * size**2 + 2 * channels * config.convs
        summed_size = size // 2 if pooled and config.pool_place != "sum" else size
        flops += 2 * branches * summed_size**2
        channels, size = width, size // 2 if pooled else size
    for features in (*config.head, config.classes):
        parameters += (channels + 1) * features
        flops += 2 * channels * features
        channels = features
    return NetworkCost(parameters, flops)
