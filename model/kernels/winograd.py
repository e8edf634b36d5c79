"""3x3 convolutions on the CPU in bfloat16 by Winograd's algorithm: 16 products instead of 36.

F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015, arXiv:1509.09308;
``winograd.cpp`` says how. Against PyTorch's own convolutions, gradients included, it takes about half of the time
(1.7 to 5 times as fast, benchmarks/results/2026-11-22-winograd); its error in norm is 4e-3; theirs is 2e-3, which
bfloat16 causes in any such sum. It needs a compiler (`model.kernels.library`) and a processor that multiplies
bfloat16 (AVX512_BF16).
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

SOURCE = Path(__file__).with_name("winograd.cpp")

LEAST_CHANNELS = 8
"""For fewer, such as an image's, `model.kernels.stem` is faster."""


def supports(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether this kernel can compute the convolution and is worth it."""
    return convolves_in_bfloat16(x, conv) and conv.in_channels >= LEAST_CHANNELS and library(SOURCE) is not None


def winograd(x: Tensor, conv: nn.Conv2d, pooled: bool = False) -> Tensor:
    """A 3x3 convolution of stride 1 and padding 1 in bfloat16, channels last, optionally with a 2x2 max-pool.

    The windows of the pool are the tiles of the algorithm: a quarter of the output is written, and a quarter of
    its gradient read.

    Args:
        x: (n, channels, height, width), height and width even.
        conv: float32 weights (outputs, channels, 3, 3) and bias (outputs,).
        pooled: `torch.nn.functional.max_pool2d` follows; of equal pixels the same one is chosen.

    Returns:
        bfloat16, (n, outputs, height, width), or half as high and wide.
    """
    return cast(Tensor, _Winograd.apply(x, conv.weight, conv.bias, pooled))


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pooled: bool) -> Tensor:
        x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        n, _, height, width = x.shape
        argmax = empty_activations(n, len(weight), height // 2, width // 2, torch.uint8) if pooled else None
        ctx.save_for_backward(x, weight, argmax)
        return convolution(x, weight, bias, argmax)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, argmax = ctx.saved_tensors
        grad = grads[0].to(torch.bfloat16, memory_format=torch.channels_last)
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_x = gradient_of_input(grad, weight, argmax) if need_x else None
        grad_weight, grad_bias = gradient_of_weight(x, grad, argmax) if need_weight or need_bias else (None, None)
        return grad_x, grad_weight, grad_bias if need_bias else None, None


_convolution_scratch = entry(SOURCE, "winograd_scratch", c_int64, shape=int64s(9), backward=c_int64, threads=c_int64)

_convolution = entry(
    SOURCE,
    "winograd",
    None,
    shape=int64s(9),
    backward=c_int64,
    threads=c_int64,
    x=activations(torch.bfloat16),
    weight=TensorArgument(torch.float32, 4, "any"),
    bias=vector(optional=True),
    y=activations(torch.bfloat16),
    argmax=activations(torch.uint8, optional=True),
    scratch=TensorArgument(torch.uint8, 1),
)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, argmax: Tensor | None = None) -> Tensor:
    """The convolution of x; with ``argmax``, a pool follows and writes there which pixels it chose."""
    n, _, height, width = x.shape
    out_height, out_width = (height, width) if argmax is None else (height // 2, width // 2)
    y = empty_activations(n, len(weight), out_height, out_width, torch.bfloat16)
    shape = _shape_and_strides(n, height, width, weight)
    threads = torch.get_num_threads()
    scratch = _scratch(_convolution_scratch(shape=shape, backward=False, threads=threads))
    _convolution(
        shape=shape,
        backward=False,
        threads=threads,
        x=x,
        weight=weight,
        bias=bias,
        y=y,
        argmax=argmax,
        scratch=scratch,
    )
    return y


def gradient_of_input(grad: Tensor, weight: Tensor, argmax: Tensor | None = None) -> Tensor:
    """The gradient of x, from that of the output; ``argmax`` as `convolution` has written it."""
    n, _, height, width = grad.shape
    if argmax is not None:
        height, width = 2 * height, 2 * width
    grad_x = empty_activations(n, weight.shape[1], height, width, torch.bfloat16)
    shape = _shape_and_strides(n, height, width, weight)
    threads = torch.get_num_threads()
    scratch = _scratch(_convolution_scratch(shape=shape, backward=True, threads=threads))
    _convolution(
        shape=shape,
        backward=True,
        threads=threads,
        x=grad,
        weight=weight,
        bias=None,
        y=grad_x,
        argmax=argmax,
        scratch=scratch,
    )
    return grad_x


_weights_scratch = entry(SOURCE, "winograd_weights_scratch", c_int64, shape=int64s(5), threads=c_int64)

_gradient_of_weight = entry(
    SOURCE,
    "winograd_weights",
    None,
    shape=int64s(5),
    threads=c_int64,
    x=activations(torch.bfloat16),
    grad=activations(torch.bfloat16),
    argmax=activations(torch.uint8, optional=True),
    grad_weight=activations(torch.float32),
    grad_bias=vector(),
    scratch=TensorArgument(torch.uint8, 1),
)


def gradient_of_weight(x: Tensor, grad: Tensor, argmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of weight (channels last) and bias, float32; ``argmax`` as `convolution` has written it."""
    n, inputs, height, width = x.shape
    outputs, threads = grad.shape[1], torch.get_num_threads()
    shape = int64s(5)(n, height, width, inputs, outputs)
    grad_weight = empty_activations(outputs, inputs, 3, 3, torch.float32)
    grad_bias = torch.empty(outputs)
    _gradient_of_weight(
        shape=shape,
        threads=threads,
        x=x,
        grad=grad,
        argmax=argmax,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        scratch=_scratch(_weights_scratch(shape=shape, threads=threads)),
    )
    return grad_weight, grad_bias


def _shape_and_strides(n: int, height: int, width: int, weight: Tensor) -> Any:
    """Size of the convolution's input, its channels and outputs, and the strides of weight (c, o, line, tap)."""
    outputs, inputs = weight.shape[:2]
    strides = weight.stride()
    return int64s(9)(n, height, width, inputs, outputs, strides[1], strides[0], strides[2], strides[3])


def _scratch(size: int) -> Tensor:
    """This many bytes of memory to work in."""
    return torch.empty(size, dtype=torch.uint8)
