"""The first block's convolution and the max-pool behind it on the CPU in bfloat16, as one pass of compiled code.

An image has 3 channels, so the convolution is mostly reading and writing, and four fifths of that are results that the
pool drops; ``stem.cpp`` never writes those. Its results are those of PyTorch's two operations under autocast, but for
the order of sums. It needs a compiler (`model.kernels.library`) and a processor that multiplies bfloat16 (AVX512_BF16).
"""

import ctypes
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.device import convolves_in_bfloat16
from model.kernels import library as compiled

SOURCE = Path(__file__).with_name("stem.cpp")

MOST_CHANNELS = 7
"""From 8 on `model.kernels.winograd` is faster."""


def supports(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether this convolution can be done so, and is worth it, with the pool and, less so, without it."""
    return (
        convolves_in_bfloat16(x, conv)
        and conv.in_channels <= MOST_CHANNELS
        and not (x.requires_grad and torch.is_grad_enabled())  # an image needs no gradient
        and compiled.library(SOURCE) is not None
    )


def stem(x: Tensor, conv: nn.Conv2d, pooled: bool) -> Tensor:
    """A 3x3 convolution of stride 1 and padding 1 of images, then a 2x2 max-pool, in bfloat16, channels last.

    Args:
        x: (n, channels, height, width), height and width even; it gets no gradient.
        conv: float32 weights (outputs, channels, 3, 3) and bias (outputs,).
        pooled: whether the pool follows.

    Returns:
        bfloat16, (n, outputs, height, width), or half as high and wide.
    """
    return cast(Tensor, _Stem.apply(x, conv.weight, conv.bias, pooled))


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pooled: bool) -> Tensor:
        x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        y, place = convolution(x, weight, bias, pooled)
        ctx.save_for_backward(x, place)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, place = ctx.saved_tensors
        grad = grads[0].to(torch.bfloat16, memory_format=torch.channels_last)
        grad_weight, grad_bias = gradient_of_weight(x, grad, place)
        return None, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, pooled: bool) -> tuple[Tensor, Tensor | None]:
    """The convolution; if pooled, the largest of each window, and which of its four pixels that was."""
    n, inputs, height, width = x.shape
    outputs = len(weight)
    shape = (ctypes.c_int64 * 5)(n, height, width, inputs, outputs)
    steps = (ctypes.c_int64 * 4)(*weight.stride())
    size = (n, outputs, height // 2, width // 2) if pooled else (n, outputs, height, width)
    y = torch.empty(size, dtype=torch.bfloat16, memory_format=torch.channels_last)
    place = torch.empty(size, dtype=torch.uint8, memory_format=torch.channels_last) if pooled else None
    compiled.call(SOURCE, "stem", shape, steps, torch.get_num_threads(), x, weight, bias, y, place)
    return y, place


def gradient_of_weight(x: Tensor, grad: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of weight (channels last) and bias, float32; place is there if it was pooled."""
    n, inputs, height, width = x.shape
    outputs = grad.shape[1]
    shape = (ctypes.c_int64 * 5)(n, height, width, inputs, outputs)
    grad_weight = torch.empty((outputs, inputs, 3, 3), memory_format=torch.channels_last)
    grad_bias = torch.empty(outputs)
    compiled.call(SOURCE, "stem_weights", shape, torch.get_num_threads(), x, grad, place, grad_weight, grad_bias)
    return grad_weight, grad_bias
