import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.split import Split
from model.config import FitConfig, NetworkConfig
from model.fit import build_optimizer, fit, train_step
from model.muon import MOMENTUM, orthogonalised
from model.network import Block, build_network

NETWORK = NetworkConfig((6, 10), 3, (True, True), classes=2)
FIT = FitConfig(epochs=2, batch_size=16, optimizer="muon", lr=0.1, rest_lr=0.05, precision="float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**31 - 1), st.floats(1e-3, 1e3))
def test_a_direction_is_near_the_nearest_orthogonal_matrix(
    dtype: torch.dtype, rows: int, columns: int, seed: int, scale: float
) -> None:
    """U V' of the singular value decomposition, which the iteration approaches; of each matrix by itself."""
    matrices = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonalised(scale * matrices, dtype) @ right.mT
    strong = values > 0.1 * values.amax(1, keepdim=True)
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert float(diagonal[strong].min()) > 0.5
    assert float(diagonal[strong].max()) < 1.35
    assert float((found - torch.diag_embed(diagonal)).abs().max()) < 0.1


def loss_of(network: torch.nn.Module) -> torch.Tensor:
    images = torch.randint(256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(2)).float()
    loss: torch.Tensor = network(images).square().mean()
    return loss


def test_a_step_equals_a_loop_over_branches() -> None:
    network = build_network(NETWORK)
    plain = copy.deepcopy(network)
    optimizer = build_optimizer(network, FIT)
    momenta: dict[tuple[int, int], torch.Tensor] = {}
    for _ in range(3):
        train_step(network, optimizer, loss_of(network), 0)
        plain.zero_grad()
        loss_of(plain).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for block_number, block in enumerate(plain.blocks):
                assert isinstance(block, Block)
                assert block.conv.weight.grad is not None
                for branch in range(block.convs):
                    mine = slice(branch * block.width, (branch + 1) * block.width)
                    gradient = block.conv.weight.grad[mine].permute(0, 2, 3, 1).flatten(1)
                    before = momenta.get((block_number, branch), torch.zeros_like(gradient))
                    momentum = momenta[block_number, branch] = MOMENTUM * before + gradient
                    direction = orthogonalised((gradient + MOMENTUM * momentum)[None], torch.float32)[0]
                    filters = block.conv.weight[mine]
                    filters *= min(direction.shape) ** 0.5 / filters.norm()
                    shaped = direction.view(block.width, 3, 3, -1).permute(0, 3, 1, 2)
                    block.conv.weight[mine] = filters - FIT.lr * shaped
            # The rest by PyTorch's SGD: taken over, as only the filters are looked at here.
            for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
                if ours.ndim != 4:
                    theirs.copy_(ours)
        for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_rest_is_trained_by_nesterov_sgd() -> None:
    network = build_network(NETWORK)
    plain = copy.deepcopy(network)
    optimizer = build_optimizer(network, FIT)
    loss_of(plain).backward()  # type: ignore[no-untyped-call]
    train_step(network, optimizer, loss_of(network), 0)
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        if ours.ndim != 4:
            assert theirs.grad is not None
            decay = FIT.weight_decay if ours.ndim == 2 else 0
            gradient = theirs.grad + decay * theirs
            torch.testing.assert_close(ours, theirs - FIT.rest_lr * (1 + FIT.momentum) * gradient)


def test_the_scale_of_filters_changes_nothing(stripes: Split) -> None:
    """A batch norm stands behind them, and they are held at one size."""
    network, larger = build_network(NETWORK), build_network(NETWORK)
    with torch.no_grad():
        for block in larger.blocks:
            assert isinstance(block, Block)
            block.conv.weight.mul_(4)
            assert block.conv.bias is not None
            block.conv.bias.mul_(4)
    losses = [next(fit(each, stripes, replace(FIT, clip_norm=0, augment=0))).losses for each in (network, larger)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_both_rates_follow_the_schedule(stripes: Split) -> None:
    network = build_network(NETWORK)
    training = fit(network, stripes, replace(FIT, schedule="constant", warmup=0.0))
    assert next(training).lr == pytest.approx(FIT.lr)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    still = fit(network, stripes, replace(FIT, lr=1e-12, rest_lr=1e-12))
    next(still)
    for old, new in zip(before, network.parameters(), strict=True):
        if old.ndim != 4:
            torch.testing.assert_close(old, new, rtol=0, atol=1e-9)
