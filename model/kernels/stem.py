"""The first block's convolution and the max-pool after it on the CPU in bfloat16, as one pass of compiled code.

An image has 3 channels, so the convolution is mostly reading and writing, and four fifths of that are results that the
pool drops; ``stem.cpp`` never writes those. Its results are those of PyTorch's two operations under autocast, except
for the order of sums. It needs a compiler (`model.kernels.library`) and a processor that multiplies bfloat16
(AVX512_BF16).
"""

from ctypes import c_int64
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.kernels.bfloat16 import convolves_in_bfloat16
from model.kernels.entry import TensorArgument, activations, empty_activations, entry, int64s, vector
from model.kernels.library import library

SOURCE = Path(__file__).with_name("stem.cpp")

MOST_CHANNELS = 7
"""From 8 on `model.kernels.winograd` is faster."""


def supports(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether this kernel can compute the convolution and is worth it, with the pool and, less so, without it."""
    return (
        convolves_in_bfloat16(x, conv)
        and conv.in_channels <= MOST_CHANNELS
        and not (x.requires_grad and torch.is_grad_enabled())  # an image needs no gradient
        and library(SOURCE) is not None
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
        y, argmax = convolution(x, weight, bias, pooled)
        ctx.save_for_backward(x, argmax)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, argmax = ctx.saved_tensors
        grad = grads[0].to(torch.bfloat16, memory_format=torch.channels_last)
        grad_weight, grad_bias = gradient_of_weight(x, grad, argmax)
        return None, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None


_convolution = entry(
    SOURCE,
    "stem",
    None,
    shape=int64s(5),
    strides=int64s(4),
    threads=c_int64,
    x=activations(torch.bfloat16),
    weight=TensorArgument(torch.float32, 4, "any"),
    bias=vector(optional=True),
    y=activations(torch.bfloat16),
    argmax=activations(torch.uint8, optional=True),
)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, pooled: bool) -> tuple[Tensor, Tensor | None]:
    """The convolution; if pooled, the largest pixel of each 2x2 window, and which of the four it is (uint8)."""
    n, inputs, height, width = x.shape
    outputs = len(weight)
    out_height, out_width = (height // 2, width // 2) if pooled else (height, width)
    y = empty_activations(n, outputs, out_height, out_width, torch.bfloat16)
    argmax = empty_activations(n, outputs, out_height, out_width, torch.uint8) if pooled else None
    _convolution(
        shape=int64s(5)(n, height, width, inputs, outputs),
        strides=int64s(4)(*weight.stride()),
        threads=torch.get_num_threads(),
        x=x,
        weight=weight,
        bias=bias,
        y=y,
        argmax=argmax,
    )
    return y, argmax


_gradient_of_weight = entry(
    SOURCE,
    "stem_weights",
    None,
    shape=int64s(5),
    threads=c_int64,
    x=activations(torch.bfloat16),
    grad=activations(torch.bfloat16),
    argmax=activations(torch.uint8, optional=True),
    grad_weight=activations(torch.float32),
    grad_bias=vector(),
)


def gradient_of_weight(x: Tensor, grad: Tensor, argmax: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of weight (channels last) and bias, float32.

    Args:
        x: the convolution's input.
        grad: the gradient of its output, or of the pool's.
        argmax: of the pool, as `convolution` returned it; None without a pool.
    """
    n, inputs, height, width = x.shape
    outputs = grad.shape[1]
    grad_weight = empty_activations(outputs, inputs, 3, 3, torch.float32)
    grad_bias = torch.empty(outputs)
    _gradient_of_weight(
        shape=int64s(5)(n, height, width, inputs, outputs),
        threads=torch.get_num_threads(),
        x=x,
        grad=grad,
        argmax=argmax,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
    )
    return grad_weight, grad_bias
