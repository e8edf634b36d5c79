"""Which kernel computes what: the first that supports it, else PyTorch's own operations."""

import pytest
import torch
from torch import Tensor, nn

from model.config import PoolPlace
from model.kernels import dispatch
from model.kernels.dispatch import ConvolutionKernel, TailKernel, block_tail, convolve, plain_operations
from model.kernels.plain import plain_tail


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two candidates for each operation, of which the second supports all; the names of those that were used."""
    used: list[str] = []

    def convolution(name: str, able: bool) -> ConvolutionKernel:
        def run(x: Tensor, _: nn.Conv2d, pooled: bool) -> Tensor:
            used.append(f"{name} pooled" if pooled else name)
            return x

        return ConvolutionKernel(lambda *_: able, run)

    def tail(name: str, able: bool) -> TailKernel:
        return TailKernel(lambda *_: able, lambda *arguments: (used.append(name), plain_tail(*arguments))[1])

    monkeypatch.setattr(dispatch, "CONVOLUTIONS", (convolution("first", False), convolution("second", True)))
    monkeypatch.setattr(dispatch, "TAILS", (tail("first tail", False), tail("second tail", True)))
    return used


CONV, NORM, X, WEIGHTS = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), torch.randn(2, 4, 4, 4), torch.ones(2, 1)


@pytest.mark.parametrize(
    ("pool_place", "used", "left"),
    [(None, "second", None), ("conv", "second pooled", None), ("branch", "second", "branch"), ("sum", "second", "sum")],
)
def test_a_kernel_does_the_pool_that_comes_next(
    candidates: list[str], pool_place: PoolPlace | None, used: str, left: PoolPlace | None
) -> None:
    assert convolve(X, CONV, pool_place)[1] == left
    assert candidates == [used]


def test_a_tail_is_the_first_kernel_s_that_supports_it(candidates: list[str]) -> None:
    block_tail(X, NORM, WEIGHTS, "sum", "gelu")
    assert candidates == ["second tail"]


def test_plain_operations_use_no_kernel_and_leave_the_pool(candidates: list[str]) -> None:
    def fail() -> None:
        with plain_operations():
            out, left = convolve(X, CONV, "conv")
            assert torch.equal(out, CONV(X))
            assert left == "conv"
            block_tail(X, NORM, WEIGHTS, "conv", "gelu")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert candidates == []
    convolve(X, CONV, None)
    assert candidates == ["second"]


def test_what_is_traced_uses_no_kernel(candidates: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    convolve(X, CONV, "conv")
    block_tail(X, NORM, WEIGHTS, "conv", "gelu")
    assert candidates == []
