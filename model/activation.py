"""The activations of a network, by name."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from model.config import Activation

LEAKY_SLOPE = 0.01

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": partial(F.relu, inplace=True),
    "leaky_relu": partial(F.leaky_relu, negative_slope=LEAKY_SLOPE, inplace=True),
    "gelu": F.gelu,
    "silu": F.silu,
}


class ActivationLayer(nn.Module):
    """An activation as a layer."""

    def __init__(self, name: Activation) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)
