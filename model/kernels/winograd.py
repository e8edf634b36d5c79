"""3x3 convolutions on the CPU in bfloat16 by Winograd's algorithm: 16 products in place of 36.

F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015, arXiv:1509.09308;
``winograd.cpp`` says how. Against PyTorch's own convolutions, gradients included, it takes about half of the time
(1.7 to 5 times as fast, benchmarks/results/2026-11-22-winograd); its error in norm is 4e-3 where theirs is 2e-3, which
is what bfloat16 leaves of any such sum. It needs a compiler (`model.kernels.library`) and a processor that multiplies
bfloat16 (AVX512_BF16).
"""

import ctypes
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.device import convolves_in_bfloat16
from model.kernels import library as compiled

SOURCE = Path(__file__).with_name("winograd.cpp")

LEAST_CHANNELS = 8
"""Of fewer, such as an image's, `model.kernels.stem` is faster."""


def supports(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether this convolution can be done so, and is worth it."""
    return (
        convolves_in_bfloat16(x, conv) and conv.in_channels >= LEAST_CHANNELS and compiled.library(SOURCE) is not None
    )


def winograd(x: Tensor, conv: nn.Conv2d, pooled: bool = False) -> Tensor:
    """A 3x3 convolution of stride 1 and padding 1 in bfloat16, channels last, where wanted with a 2x2 max-pool.

    The windows of the pool are the tiles of the algorithm: a quarter of the output is written, and of its gradient
    read.

    Args:
        x: (n, channels, height, width), height and width even.
        conv: float32 weights (outputs, channels, 3, 3) and bias (outputs,).
        pooled: as `torch.nn.functional.max_pool2d` behind it, also in which of equals it chooses.

    Returns:
        bfloat16, (n, outputs, height, width), or half as high and wide.
    """
    return cast(Tensor, _Winograd.apply(x, conv.weight, conv.bias, pooled))


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pooled: bool) -> Tensor:
        x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        n, _, height, width = x.shape
        place = _empty(n, len(weight), height // 2, width // 2, torch.uint8) if pooled else None
        ctx.save_for_backward(x, weight, place)
        return convolution(x, weight, bias, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, place = ctx.saved_tensors
        grad = grads[0].to(torch.bfloat16, memory_format=torch.channels_last)
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_x = gradient_of_input(grad, weight, place) if need_x else None
        grad_weight, grad_bias = gradient_of_weight(x, grad, place) if need_weight or need_bias else (None, None)
        return grad_x, grad_weight, grad_bias if need_bias else None, None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor | None = None) -> Tensor:
    """The convolution of x, where ``place`` is given with a pool, whose choices are written there."""
    n, _, height, width = x.shape
    if place is not None:
        height, width = height // 2, width // 2
    y = _empty(n, len(weight), height, width, torch.bfloat16)
    _convolve(x, weight, bias, y, place, x.shape, backward=False)
    return y


def gradient_of_input(grad: Tensor, weight: Tensor, place: Tensor | None = None) -> Tensor:
    """The gradient of x, from that of the output; ``place`` as `convolution` has written it."""
    n, _, height, width = grad.shape
    if place is not None:
        height, width = 2 * height, 2 * width
    x = _empty(n, weight.shape[1], height, width, torch.bfloat16)
    _convolve(grad, weight, None, x, place, x.shape, backward=True)
    return x


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, place: Tensor | None, size: torch.Size, backward: bool
) -> None:
    n, _, height, width = size
    outputs, inputs = weight.shape[:2]
    steps = weight.stride()
    shape = (ctypes.c_int64 * 9)(n, height, width, inputs, outputs, steps[1], steps[0], steps[2], steps[3])
    threads = torch.get_num_threads()
    scratch = _scratch("winograd_scratch", shape, int(backward), threads)
    compiled.call(SOURCE, "winograd", shape, int(backward), threads, x, weight, bias, y, place, scratch)


def gradient_of_weight(x: Tensor, grad: Tensor, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of weight (channels last) and bias, float32; ``place`` as `convolution` has written it."""
    n, inputs, height, width = x.shape
    outputs, threads = grad.shape[1], torch.get_num_threads()
    shape = (ctypes.c_int64 * 5)(n, height, width, inputs, outputs)
    grad_weight = torch.empty(outputs, inputs, 3, 3, memory_format=torch.channels_last)
    grad_bias = torch.empty(outputs)
    scratch = _scratch("winograd_weights_scratch", shape, threads)
    compiled.call(SOURCE, "winograd_weights", shape, threads, x, grad, place, grad_weight, grad_bias, scratch)
    return grad_weight, grad_bias


def _empty(n: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, channels, height, width, dtype=dtype, memory_format=torch.channels_last)


def _scratch(entry: str, shape: Any, *numbers: int) -> Tensor:
    """Memory to work in, as much as the code asks for."""
    code = compiled.library(SOURCE)
    assert code is not None
    function = getattr(code, entry)
    function.restype = ctypes.c_int64
    return torch.empty(function(shape, *map(ctypes.c_int64, numbers)), dtype=torch.uint8)
