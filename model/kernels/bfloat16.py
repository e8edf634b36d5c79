"""Which convolutions the compiled code for bfloat16 can compute."""

import torch
from torch import Tensor, nn


def convolves_in_bfloat16(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether this is a convolution on the CPU, in bfloat16, of an even height and width."""
    return (
        x.device.type == "cpu"
        and (x.dtype == torch.bfloat16 or _casts_to_bfloat16())
        and x.shape[2] % 2 == 0
        and x.shape[3] % 2 == 0
        and conv.weight.dtype == torch.float32
    )


def _casts_to_bfloat16() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
