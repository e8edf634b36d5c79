"""The compiled tail of a block against the same function in PyTorch's own operations."""

import copy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.config import Activation, NetworkConfig, PoolPlace
from model.kernels import library as compiled
from model.kernels.dispatch import plain_operations
from model.kernels.library import library
from model.kernels.plain import plain_tail
from model.kernels.tail import SOURCE, _Tail, compiled_tail, supports
from model.network import build_network

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine"
)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and a library that is looked for anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    yield tmp_path
    library.cache_clear()


def norm_of(channels: int, seed: int) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(channels)
    for values in (norm.weight, norm.bias, norm.running_mean):
        assert values is not None
        values.data.copy_(torch.randn(channels, generator=generator))
    assert norm.running_var is not None
    norm.running_var.copy_(0.5 + torch.rand(channels, generator=generator))
    return norm


def error(value: Tensor, truth: Tensor) -> float:
    """Relative to the truth's size; or to a tenth, where the truth is what is left of larger numbers that cancel."""
    difference = (value.double() - truth.double()).norm()
    return float(difference / truth.double().norm().clamp_min(0.1 * truth.numel() ** 0.5))


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(
    images=st.integers(3, 7),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    groups=st.integers(1, 4),
    channels=st.integers(1, 40),
    pool=st.sampled_from([None, "conv", "branch"]),
    activation=st.sampled_from(["relu", "leaky_relu", "gelu", "silu"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    training=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_equals_the_plain_tail_in_float64(
    images: int,
    size: tuple[int, int],
    groups: int,
    channels: int,
    pool: PoolPlace | None,
    activation: Activation,
    dtype: torch.dtype,
    training: bool,
    threads: int,
    seed: int,
) -> None:
    """Values, channel means, gradients and running statistics."""
    generator = torch.Generator().manual_seed(seed)
    height, width = 2 * size[0], 2 * size[1]
    x = (2 * torch.randn(images, groups * channels, height, width, generator=generator) + 0.5).to(dtype)
    weights = torch.rand(images, groups, generator=generator).softmax(1)
    before, results = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for way, exact in ((compiled_tail, False), (plain_tail, True)):
            norm = norm_of(groups * channels, seed).train(training)
            norm = norm.double() if exact else norm
            inputs = [x.double() if exact else x.clone(), weights.double() if exact else weights.clone()]
            assert exact or supports(inputs[0], norm.train(), pool)
            norm.train(training)
            inputs = [value.requires_grad_(training) for value in inputs]
            with torch.set_grad_enabled(training):
                out, means = way(inputs[0], norm, inputs[1], pool, activation)
            found = [out, means, norm.running_mean, norm.running_var, norm.num_batches_tracked]
            if training:
                along = torch.Generator().manual_seed(seed)
                directions = [torch.randn(t.shape, generator=along).to(dtype).to(t.dtype) for t in (out, means)]
                found += torch.autograd.grad([out, means], [*inputs, norm.weight, norm.bias], directions)
            assert exact or (out.dtype, means.dtype) == (dtype, torch.float32)
            results.append([value.detach() for value in found if value is not None])
    finally:
        torch.set_num_threads(before)
    # One rounding of a result to bfloat16 is 2e-3. With a norm over as few as three values its gradient is a small
    # difference of large numbers: 1.4e-2 was the largest seen in some thousand examples, 5.2e-5 in float32.
    rounding = 2e-4 if dtype == torch.float32 else 4e-2
    for fast, plain in zip(*results, strict=True):
        assert error(fast, plain) < rounding


@needs_compiler
@pytest.mark.parametrize("pool", [None, "conv", "branch"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "silu"])
def test_a_nan_stays_one(pool: PoolPlace | None, activation: Activation) -> None:
    x = torch.randn(2, 20, 4, 4)
    x[1, 3, 2, 1] = torch.nan
    for training in (True, False):
        with torch.no_grad():
            out, means = compiled_tail(x, norm_of(20, 0).train(training), torch.rand(2, 2), pool, activation)
        assert out[1].isnan().any()
        assert means[1].isnan().any()


@needs_compiler
def test_an_image_of_one_pixel() -> None:
    x = torch.randn(4, 6, 1, 1)
    results = [
        way(x, norm_of(6, 0), torch.rand(4, 2).fill_(0.5), None, "gelu")[0] for way in (compiled_tail, plain_tail)
    ]
    torch.testing.assert_close(*results)


@needs_compiler
def test_the_first_of_equals_takes_the_gradient_of_a_pool() -> None:
    x = torch.zeros(2, 4, 2, 2, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for way, value in ((compiled_tail, x), (plain_tail, y)):
        way(value, norm_of(4, 0), torch.ones(2, 1), "conv", "gelu")[0].sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad)


@needs_compiler
def test_a_network_uses_it_in_training_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = _Tail.apply
    monkeypatch.setattr(_Tail, "apply", lambda *words: (calls.append(1), plain(*words))[1])
    network = build_network(NetworkConfig((8, 8), 2, (True, False)))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    network(images).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        network.eval()(images)
    assert len(calls) == 4
    network(images).sum().backward()  # gradients of a network in evaluation mode are PyTorch's
    assert len(calls) == 4


@needs_compiler
def test_same_training_with_and_without_it() -> None:
    config = NetworkConfig((8, 16), 3, (True, True), activation="gelu")
    first = build_network(config)
    second = copy.deepcopy(first)
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    losses = []
    for network, operations in ((first, nullcontext), (second, plain_operations)):
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        with operations():
            for _ in range(5):
                loss = network(images).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_without_a_compiler_the_plain_operations_serve(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    assert library(SOURCE) is None
    assert build_network(NetworkConfig((8,), 1, (True,)))(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_compiler_that_fails_is_none(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "c++"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.setenv("CXX", str(broken))
    assert library(SOURCE) is None


@needs_compiler
def test_compiled_once_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[list[str]] = []
    plain: Callable[..., subprocess.CompletedProcess[bytes]] = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda words, **rest: (runs.append(words), plain(words, **rest))[1])
    assert library(SOURCE) is not None
    library.cache_clear()
    assert library(SOURCE) is not None
    assert sum("-shared" in words for words in runs) == 1
    assert [path.suffix for path in (fresh / "block-search" / "compiled").iterdir()] == [".so"]
    # Another processor or source is another library.
    monkeypatch.setattr(compiled, "_processor", lambda: "another")
    library.cache_clear()
    assert library(SOURCE) is not None
    assert sum("-shared" in words for words in runs) == 2


@needs_compiler
def test_another_header_is_another_library(fresh: Path) -> None:
    copies = [fresh / file.name for file in (SOURCE, SOURCE.with_name("common.h"))]
    for copy_of in copies:
        copy_of.write_bytes(SOURCE.with_name(copy_of.name).read_bytes())
    for kept in (1, 2):
        library.cache_clear()
        assert library(copies[0]) is not None
        assert len([*(fresh / "block-search" / "compiled").iterdir()]) == kept
        copies[1].write_text(copies[1].read_text() + "// changed\n")


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_hindrance(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    assert library(SOURCE) is not None
