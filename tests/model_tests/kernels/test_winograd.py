"""Winograd's convolutions: values and gradients against float64, every number of threads, nothing else written."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data.split import Split
from model.config import FitConfig, NetworkConfig
from model.fit import fit
from model.kernels import winograd
from model.kernels.dispatch import plain_operations
from model.kernels.entry import empty_activations
from model.kernels.library import library
from model.network import build_network
from support.memory import margins_around_empty

pytestmark = pytest.mark.skipif(
    library(winograd.SOURCE) is None, reason="needs a C++ compiler and a processor with AVX512_BF16"
)

SHAPES = [  # images, inputs, outputs, height, width
    (1, 8, 8, 2, 2), (3, 24, 72, 16, 16), (2, 13, 29, 6, 10), (7, 17, 50, 2, 6), (3, 700, 33, 4, 4),
    (2, 40, 1500, 4, 2), (33, 64, 64, 2, 2), (65, 700, 200, 8, 8),
]  # fmt: skip
"""Odd channels, parts of long sums (above 640 inputs), filters too large to keep, rows that fill no block."""

ROUNDING = 8e-3
"""Relative error in norm; bfloat16 keeps 8 bits. Seen: 4 to 5e-3."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def data(n: int, inputs: int, outputs: int, height: int, width: int) -> tuple[nn.Conv2d, Tensor, Tensor]:
    """A convolution, an input, and a gradient of its output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(n + inputs)
        conv = nn.Conv2d(inputs, outputs, 3, padding=1).to(memory_format=torch.channels_last)
        x, grad = (
            torch.randn(n, channels, height, width).bfloat16().contiguous(memory_format=torch.channels_last)
            for channels in (inputs, outputs)
        )
    return conv, x, grad


def results(conv: nn.Conv2d, x: Tensor, grad: Tensor, exact: bool = False) -> list[Tensor]:
    """Output and gradients of input, weight and bias."""
    x = (x.double() if exact else x.clone()).requires_grad_()
    if exact:
        y = nn.functional.conv2d(x, conv.weight.double(), conv.bias.double(), padding=1)  # type: ignore[union-attr]
    else:
        y = winograd.winograd(x, conv)
    return [y.detach(), *torch.autograd.grad(y, [x, *conv.parameters()], grad.to(y.dtype))]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 70), st.integers(1, 120), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)
)
def test_equals_a_convolution_in_float64(
    images: int, inputs: int, outputs: int, height: int, width: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    case = data(images, inputs, outputs, 2 * height, 2 * width)
    # A result of a few numbers may be what is left of larger ones that cancel: their roundings are then more of it.
    assert max(errors(results(*case), results(*case, exact=True))) < 8 * ROUNDING


@pytest.mark.parametrize("shape", SHAPES)
def test_large_shapes_and_any_number_of_threads(shape: tuple[int, int, int, int, int]) -> None:
    case, by_threads = data(*shape), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        by_threads.append(results(*case))
    assert max(errors(by_threads[0], results(*case, exact=True))) < ROUNDING
    for others in by_threads[1:]:  # every sum is one thread's
        assert all(map(torch.equal, by_threads[0], others))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 70), st.integers(1, 120), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)
)
def test_with_a_pool_it_is_what_it_is_with_pytorchs_pool_after_it(
    images: int, inputs: int, outputs: int, height: int, width: int, threads: int
) -> None:
    """To the last bit: output, choices (by the gradients) and all gradients."""
    torch.set_num_threads(threads)
    conv, x, _ = data(images, inputs, outputs, 2 * height, 2 * width)
    x = (x * 2).round().bfloat16()  # so that there are ties
    conv.weight.data = (conv.weight.data * 8).round() / 8
    grad = torch.randn(images, outputs, height, width).bfloat16().contiguous(memory_format=torch.channels_last)
    found = []
    for fused in (True, False):
        leaf = x.clone().requires_grad_()
        y = winograd.winograd(leaf, conv, pooled=fused)
        y = y if fused else nn.functional.max_pool2d(y, 2)
        found.append([y.detach(), *torch.autograd.grad(y, [leaf, *conv.parameters()], grad)])
    for one, other in zip(*found, strict=True):
        assert one.equal(other)


def test_a_pool_takes_a_nan_for_the_largest() -> None:
    conv, x, _ = data(2, 24, 40, 8, 8)
    x[1, 3, 5, 2] = math.nan
    plain = nn.functional.max_pool2d(winograd.winograd(x, conv).detach(), 2)
    pooled = winograd.winograd(x, conv, pooled=True).detach()
    assert pooled.isnan().any()
    assert pooled.isnan().equal(plain.isnan())
    assert pooled.nan_to_num().equal(plain.nan_to_num())


def test_weights_in_any_memory_format() -> None:
    conv, x, grad = data(3, 24, 40, 8, 8)
    first = results(conv, x, grad)
    conv.weight.data = conv.weight.data.contiguous()
    assert all(map(torch.equal, first, results(conv, x, grad)))


def test_what_is_not_finite_stays_so() -> None:
    for bad, tensor in itertools.product((math.nan, math.inf, -math.inf), range(3)):
        conv, x, grad = data(2, 24, 40, 4, 4)
        (x, grad, conv.weight.data)[tensor][1, 3, 1, 2] = bad
        y, grad_x, grad_weight, grad_bias = results(conv, x, grad)
        hit = {0: (y, grad_weight), 1: (grad_x, grad_weight, grad_bias), 2: (y, grad_x)}[tensor]
        assert all(not result.isfinite().all() for result in hit)


@pytest.mark.parametrize("shape", SHAPES[:6])
@pytest.mark.parametrize("threads", [1, 3])
def test_neighbours_in_memory_are_untouched(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int, int], threads: int
) -> None:
    """Results and working memory are cut from larger pieces, whose margins stay as they were."""
    conv, x, grad = data(*shape)
    torch.set_num_threads(threads)
    with margins_around_empty(monkeypatch) as margins:
        winograd.convolution(x, conv.weight.data, conv.bias)
        winograd.gradient_of_input(grad, conv.weight.data)
        winograd.gradient_of_weight(x, grad)
        argmax = empty_activations(len(x), conv.out_channels, x.shape[2] // 2, x.shape[3] // 2, torch.uint8)
        pooled = winograd.convolution(x, conv.weight.data, conv.bias, argmax)
        winograd.gradient_of_input(pooled, conv.weight.data, argmax)
        winograd.gradient_of_weight(x, pooled, argmax)
    assert len(margins) == 2 * (7 + 8)
    assert all((margin == 7).all() for margin in margins)


def test_a_network_in_bfloat16_uses_it_after_its_first_block(stripes: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = winograd._Winograd.apply
    monkeypatch.setattr(winograd._Winograd, "apply", lambda *words: (calls.append(1), plain(*words))[1])
    network = NetworkConfig((8, 16, 16), 2, (True, True, False), classes=2)
    next(fit(build_network(network), stripes, FitConfig(epochs=1, batch_size=32, precision="float32")))
    assert not calls
    next(fit(build_network(network), stripes, FitConfig(epochs=1, batch_size=32, precision="bfloat16")))
    assert calls
    assert len(calls) % 2 == 0


def test_the_same_training_with_and_without_it(stripes: Split) -> None:
    network = NetworkConfig((16, 16), 2, (True, True), classes=2)
    config = FitConfig(epochs=2, batch_size=16, lr=0.05, precision="bfloat16")
    fast = list(fit(build_network(network), stripes, config))
    with plain_operations():
        slow = list(fit(build_network(network), stripes, config))
    assert [result.train_loss for result in fast] == pytest.approx([result.train_loss for result in slow], rel=0.02)
