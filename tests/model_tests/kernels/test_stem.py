"""The fused stem: values, choices and gradients, every number of threads, what is not finite, nothing else written."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from model.kernels import stem
from model.kernels.library import library
from support.memory import margins_around_empty

pytestmark = pytest.mark.skipif(
    library(stem.SOURCE) is None, reason="needs a C++ compiler and a processor with AVX512_BF16"
)

SHAPES = [  # images, inputs, outputs, height, width
    (1, 3, 8, 2, 2), (3, 3, 96, 32, 32), (2, 1, 29, 6, 10), (7, 7, 50, 2, 6), (3, 4, 133, 4, 2), (40, 3, 72, 4, 8),
    (2, 5, 333, 8, 4), (1, 2, 17, 64, 2), (2, 6, 3072, 4, 4),
]  # fmt: skip
"""Odd outputs, strips of every number of vectors, more images than tasks, one column of windows."""

ROUNDING = 4e-3
"""Relative error in norm of a result in bfloat16; it keeps 8 bits."""

SUMS = 1e-5
"""Relative error in norm of float32 sums: gradients of filters and bias."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def data(n: int, inputs: int, outputs: int, height: int, width: int, pooled: bool) -> tuple[nn.Conv2d, Tensor, Tensor]:
    """A convolution, images, and a gradient of its output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(n + inputs)
        conv = nn.Conv2d(inputs, outputs, 3, padding=1).to(memory_format=torch.channels_last)
        x = torch.randn(n, inputs, height, width).bfloat16().contiguous(memory_format=torch.channels_last)
        size = (n, outputs, height // 2, width // 2) if pooled else (n, outputs, height, width)
        grad = torch.randn(size).bfloat16().contiguous(memory_format=torch.channels_last)
    return conv, x, grad


def results(conv: nn.Conv2d, x: Tensor, grad: Tensor, pooled: bool) -> list[Tensor]:
    """Output and gradients of weight and bias."""
    y = stem.stem(x, conv, pooled)
    return [y.detach(), *torch.autograd.grad(y, [*conv.parameters()], grad)]


def plain(conv: nn.Conv2d, x: Tensor, grad: Tensor, pooled: bool) -> list[Tensor]:
    """The same in float64, but for the rounding of parameters and of what is pooled; choices are those of the stem."""
    weight, bias = (parameter.detach().bfloat16().double().requires_grad_() for parameter in conv.parameters())
    y = F.conv2d(x.double(), weight, bias, padding=1)
    if pooled:
        pieces = y.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # n, outputs, height, width, 4
        argmax = stem.convolution(x, conv.weight.detach(), conv.bias, True)[1]
        assert argmax is not None
        y = pieces.gather(4, argmax.long()[..., None])[..., 0]
        assert max(errors([y.detach()], [pieces.detach().amax(4)])) < ROUNDING  # the largest but for roundings
    return [y.detach(), *torch.autograd.grad(y, [weight, bias], grad.double())]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 7), st.integers(1, 200), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3),
    st.booleans(),
)  # fmt: skip
def test_equals_a_convolution_in_float64(
    images: int, inputs: int, outputs: int, height: int, width: int, threads: int, pooled: bool
) -> None:
    torch.set_num_threads(threads)
    case = data(images, inputs, outputs, 2 * height, 2 * width, pooled)
    y, *gradients = errors(results(*case, pooled), plain(*case, pooled))
    assert y < ROUNDING
    assert max(gradients) < SUMS


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_large_shapes_and_any_number_of_threads(shape: tuple[int, int, int, int, int], pooled: bool) -> None:
    case, by_threads = data(*shape, pooled), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        by_threads.append(results(*case, pooled))
    y, *gradients = errors(by_threads[0], plain(*case, pooled))
    assert y < ROUNDING
    assert max(gradients) < SUMS
    for others in by_threads[1:]:
        assert all(map(torch.equal, by_threads[0], others))


@pytest.mark.parametrize("shape", SHAPES)
def test_exactly_the_values_and_choices_of_torch(shape: tuple[int, int, int, int, int]) -> None:
    """Of whole numbers, whose sums are exact in any order; rounded, they hold many ties."""
    conv, x, _ = data(*shape, True)
    x = (x * 8).round()
    conv.weight.data = (conv.weight.data * 40).round()
    assert conv.bias is not None
    conv.bias.data = (conv.bias.data * 40).round()
    full = F.conv2d(x, conv.weight.bfloat16(), conv.bias.bfloat16(), padding=1)
    pooled, indices = F.max_pool2d(full, 2, return_indices=True)
    width = shape[-1]
    y, argmax = stem.convolution(x, conv.weight.detach(), conv.bias, True)
    assert argmax is not None
    assert torch.equal(y, pooled)
    assert torch.equal(argmax.long(), indices // width % 2 * 2 + indices % width % 2)
    assert torch.equal(stem.convolution(x, conv.weight.detach(), conv.bias, False)[0], full)


def test_the_first_of_equals() -> None:
    conv, x, _ = data(2, 3, 40, 4, 4, True)
    conv.weight.data.zero_()
    y, argmax = stem.convolution(x, conv.weight.detach(), conv.bias, True)
    assert argmax is not None
    assert conv.bias is not None
    assert torch.equal(y, conv.bias.bfloat16()[:, None, None].expand_as(y))
    assert not argmax.any()


def test_weights_in_any_memory_format_and_no_bias() -> None:
    conv, x, grad = data(3, 3, 40, 8, 8, True)
    first = results(conv, x, grad, True)
    conv.weight.data = conv.weight.data.contiguous()
    assert all(map(torch.equal, first, results(conv, x.contiguous(), grad.contiguous(), True)))
    assert conv.bias is not None
    conv.bias.data.zero_()
    bare = nn.Conv2d(3, 40, 3, padding=1, bias=False)
    bare.weight = conv.weight
    assert torch.equal(stem.stem(x, conv, True), stem.stem(x, bare, True))
    stem.stem(x, bare, True).backward(grad)  # type: ignore[no-untyped-call]
    assert bare.weight.grad is not None
    assert torch.equal(bare.weight.grad, results(conv, x, grad, True)[1])


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """What PyTorch's convolution and pool make of an image; filters reach further, as padding is multiplied too."""
    for tensor, pooled in itertools.product(range(3), (True, False)):
        conv, x, grad = data(2, 3, 40, 8, 8, pooled)
        (x, conv.weight.data, grad)[tensor][1, 2, 1, 2] = bad
        full = F.conv2d(x, conv.weight.bfloat16(), conv.bias.bfloat16(), padding=1)  # type: ignore[union-attr]
        expected = F.max_pool2d(full, 2) if pooled else full
        y, grad_weight, grad_bias = results(conv, x, grad, pooled)
        if tensor == 0:
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.isinf(), expected.isinf())
        assert not y[~expected.isfinite()].isfinite().any()
        assert y.isfinite().all() == (tensor == 2 or bool(expected.isfinite().all()))
        assert (tensor == 2) == (not grad_bias.isfinite().all())
        if tensor == 2:
            assert not grad_weight[2].isfinite().all()


def test_a_negative_nan_wins() -> None:
    conv, x, _ = data(1, 3, 33, 2, 2, True)
    x.view(torch.int16)[0, 0, 0, 0] = -1
    assert stem.stem(x, conv, True).isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("pooled", [True, False])
def test_neighbours_in_memory_are_untouched(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int, int], threads: int, pooled: bool
) -> None:
    """Results are cut from larger pieces, whose margins stay as they were."""
    conv, x, grad = data(*shape, pooled)
    torch.set_num_threads(threads)
    with margins_around_empty(monkeypatch) as margins:
        _, argmax = stem.convolution(x, conv.weight.data, conv.bias, pooled)
        stem.gradient_of_weight(x, grad, argmax)
    assert len(margins) == 2 * (4 if pooled else 3)
    assert all((margin == 7).all() for margin in margins)


def test_takes_images_alone() -> None:
    conv, x, _ = data(2, 3, 16, 8, 8, True)
    assert stem.supports(x, conv)
    assert not stem.supports(x.float(), conv)
    with torch.autocast("cpu", torch.bfloat16):
        assert stem.supports(x.float(), conv)
    assert not stem.supports(x[:, :, :7], conv)
    assert not stem.supports(x.requires_grad_(), conv)
    conv, x, _ = data(2, 8, 16, 8, 8, True)
    assert not stem.supports(x, conv)
