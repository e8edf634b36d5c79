import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training.plain import PlainBlock, PlainNetwork
from model.config import PRESETS, ConfigError, NetworkConfig, PoolPlace
from model.cost import NetworkCost, count_cost
from model.kernels import plain as plain_kernels
from model.kernels.dispatch import plain_operations
from model.kernels.plain import product_per_pixel, sum_of_groups, weighted_sum
from model.network import Block, BlockNetwork, build_network, count_parameters

PLACES = ("branch", "conv", "sum")
ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu")


def relative_error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach(), reference.detach()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-12))


def random_statistics(module: nn.Module) -> None:
    """Running statistics and affine weights as a trained network has them, not 0 and 1."""
    generator = torch.Generator().manual_seed(5)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            with torch.no_grad():
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) * 0.1)
                norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
                norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
                norm.bias.copy_(torch.randn(norm.num_features, generator=generator) * 0.1)


@pytest.mark.parametrize(("name", "parameters"), [("seed-basic", 12_728), ("seed-advanced", 48_096_818)])
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert count_cost(PRESETS[name]).parameters == parameters


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("place", "pooled"), [(None, False), *itertools.product(PLACES, [True])])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_block_equals_a_loop_of_branches(
    activation: str, place: str | None, pooled: bool, training: bool
) -> None:
    config = NetworkConfig((6,), 3, (pooled,), place or "conv", activation, shortcut=True)  # type: ignore[arg-type]
    torch.manual_seed(0)
    fused, plain = Block(6, 6, pooled, config), PlainBlock(6, 6, pooled, config)
    random_statistics(fused)
    plain.take(fused)
    fused.train(training)
    plain.train(training)
    x = torch.randn(4, 6, 8, 8)
    inputs = [x.clone().contiguous(memory_format=torch.channels_last).requires_grad_(), x.clone().requires_grad_()]
    (fused_out, means_out), plain_out = fused(inputs[0], inputs[0].mean((2, 3))), plain(inputs[1])
    assert relative_error(fused_out, plain_out) < 1e-5
    assert relative_error(means_out, plain_out.mean((2, 3))) < 1e-5
    direction, along_means = torch.randn_like(plain_out), torch.randn_like(means_out)
    ((fused_out * direction).sum() + (means_out * along_means).sum()).backward()
    ((plain_out * direction).sum() + (plain_out.mean((2, 3)) * along_means).sum()).backward()
    assert relative_error(inputs[0].grad, inputs[1].grad) < 1e-5  # type: ignore[arg-type]
    weight_grads = torch.cat([branch.conv.weight.grad for branch in plain.branches])  # type: ignore[union-attr,misc]
    assert relative_error(fused.conv.weight.grad, weight_grads) < 1e-5  # type: ignore[arg-type]
    norm_grads = torch.cat([branch.norm.weight.grad for branch in plain.branches])  # type: ignore[union-attr,misc]
    assert relative_error(fused.norm.weight.grad, norm_grads) < 1e-5  # type: ignore[arg-type]
    assert relative_error(fused.weigh.weight.grad, plain.weigh.weight.grad) < 1e-5  # type: ignore[arg-type]
    means = torch.cat([branch.norm.running_mean for branch in plain.branches])  # type: ignore[union-attr,misc]
    assert relative_error(fused.norm.running_mean, means) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_whole_network_equals_the_plain_one(training: bool) -> None:
    config = NetworkConfig((8, 8, 16), 4, (True, False, True), "branch", "leaky_relu", head=(12,))
    network = build_network(config, seed=3)
    random_statistics(network)
    plain = PlainNetwork(config)
    plain.take(network)
    plain.train(training)
    network.train(training)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    assert relative_error(network(images), plain((images.float() - 127.5) / 127.5)) < 1e-5


@pytest.mark.parametrize("way", [weighted_sum, product_per_pixel, sum_of_groups])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weighted_sum_takes_each_images_own_weights(
    way: Callable[[Tensor, Tensor], Tensor], layout: torch.memory_format
) -> None:
    branches, weights = torch.randn(3, 2 * 5, 4, 6), torch.randn(3, 2)
    expected = torch.stack([w[0] * b[:5] + w[1] * b[5:] for b, w in zip(branches, weights, strict=True)])
    torch.testing.assert_close(way(branches.contiguous(memory_format=layout), weights), expected)


@pytest.mark.parametrize("place", PLACES)
def test_on_a_gpu_every_block_gives_the_next_convolution_what_it_takes(
    place: PoolPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's way to sum branches, run on the CPU: dtype and layout of every block's output."""
    monkeypatch.setattr(plain_kernels, "product_per_pixel", sum_of_groups)
    network = build_network(NetworkConfig((8, 8, 16), 3, (True, False, True), place, "relu"))
    outputs: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    with plain_operations(), torch.autocast("cpu", torch.bfloat16):
        network(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)).sum().backward()
    assert [output.dtype for output in outputs] == [torch.bfloat16] * 3
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)


def test_branch_weights_sum_to_one_and_come_from_channel_means() -> None:
    block = Block(4, 3, False, NetworkConfig((3,), 5, (False,)))
    x = torch.randn(2, 4, 6, 6)
    shuffled = x.flatten(2)[:, :, torch.randperm(36)].view_as(x)  # same channel means, other places
    first, second = (block.weigh(images.mean((2, 3))).softmax(1) for images in (x, shuffled))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first.sum(1), torch.ones(2))


networks = st.builds(
    lambda widths, convs, pools, place, activation, shortcut, head: NetworkConfig(
        tuple(widths), convs, tuple(i < pools for i in range(len(widths))), place, activation, shortcut, tuple(head)
    ),
    st.lists(st.integers(1, 24), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(0, 5),
    st.sampled_from(PLACES),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    st.lists(st.integers(1, 16), max_size=2),
)


@settings(max_examples=40, deadline=None)
@given(networks)
def test_any_configuration_gives_finite_logits(config: NetworkConfig) -> None:
    network = build_network(config)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for training in (True, False):
        if training and config.image_size >> sum(config.pooled) == 1 and len(images) < 2:
            continue
        logits = network.train(training)(images)
        assert logits.shape == (2, 10)
        assert logits.isfinite().all()
    assert count_parameters(network) == count_cost(config).parameters


@settings(max_examples=40, deadline=None)
@given(networks)
def test_cost_is_what_pytorch_counts(config: NetworkConfig) -> None:
    with torch.device("meta"):
        network = BlockNetwork(config).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, 3, config.image_size, config.image_size))
    assert count_cost(config) == NetworkCost(count_parameters(network), counter.get_total_flops())


def test_too_much_pooling_is_refused_with_the_reason() -> None:
    NetworkConfig((8,) * 5, 1, (True,) * 5)
    with pytest.raises(ConfigError, match="6 pooled blocks would shrink a 32-pixel image to nothing; at most 5 fit"):
        NetworkConfig((8,) * 6, 1, (True,) * 6)


@pytest.mark.parametrize(
    ("widths", "convs", "pooled", "reason"),
    [
        ((), 1, (), "at least one block"),
        ((8,), 0, (False,), "at least one conv"),
        ((8, 8), 1, (True,), "2 blocks but 1"),
    ],
)
def test_networks_that_are_none_are_refused(
    widths: tuple[int, ...], convs: int, pooled: tuple[bool, ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        NetworkConfig(widths, convs, pooled)


def test_the_seed_alone_decides_the_weights() -> None:
    config = NetworkConfig((8, 8), 2, (True, False))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = (build_network(config, seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.conv.weight"], other["blocks.0.conv.weight"])


def test_flops_are_those_of_convolutions_and_matrix_products() -> None:
    config = NetworkConfig((8,), 2, (False,), head=(4,))
    convolution = 2 * 32 * 32 * 3 * 9 * (2 * 8)
    weigh, pool, head = 2 * 3 * 2, 2 * 32 * 32 * 2 * 8, 2 * 8 * 4 + 2 * 4 * 10
    assert count_cost(config).flops == convolution + weigh + pool + head


def test_shortcut_can_be_switched_off() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with_it, without = (
        build_network(NetworkConfig((8, 8), 1, (False, False), shortcut=on)).eval() for on in (True, False)
    )
    assert not torch.equal(with_it(images), without(images))
    assert isinstance(without, BlockNetwork)
    x = (images.float() - 127.5) / 127.5
    for block in without.blocks:
        x = F.relu(block.norm(block.conv(x)))  # type: ignore[operator,union-attr]
    torch.testing.assert_close(without(images), without.logits(x.mean((2, 3))))
