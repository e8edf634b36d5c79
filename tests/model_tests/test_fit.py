import gc
import math
from dataclasses import replace

import psutil
import pytest
import torch
from torch import nn

from data.split import Split
from model.config import FitConfig, NetworkConfig
from model.evaluate import evaluate, predict_logits
from model.fit import NonFiniteLossError, build_optimizer, fit, train_step
from model.network import build_network
from model.result import EpochResult

NETWORK = NetworkConfig((8, 8), 2, (True, True), classes=2)
FIT = FitConfig(epochs=3, batch_size=16, lr=0.05, precision="float32")


def curve(split: Split, config: FitConfig, network: NetworkConfig = NETWORK) -> list[EpochResult]:
    return list(fit(build_network(network, config.seed), split, config))


def timeless(results: list[EpochResult]) -> list[EpochResult]:
    return [replace(result, images_per_second=0.0, seconds=0.0) for result in results]


def test_it_learns(stripes: Split) -> None:
    results = curve(stripes, FIT)
    assert [result.epoch for result in results] == [1, 2, 3]
    assert results[-1].validation_accuracy >= 0.9
    assert results[-1].train_loss < results[0].train_loss
    assert all(result.images_per_second > 0 and result.seconds > 0 for result in results)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adamw"])
def test_same_seed_gives_the_same_numbers(stripes: Split, optimizer: str, precision: str) -> None:
    config = replace(FIT, optimizer=optimizer, precision=precision, augment=0.5, lr=0.01)
    assert timeless(curve(stripes, config)) == timeless(curve(stripes, config))
    assert timeless(curve(stripes, config)) != timeless(curve(stripes, replace(config, seed=1)))


def test_results_are_what_the_network_gives(stripes: Split) -> None:
    network = build_network(NETWORK)
    result = list(fit(network, stripes, FIT))[-1]
    logits = predict_logits(network, stripes.validation_images, "float32")
    right = (logits.argmax(1) == stripes.validation_labels).float().mean().item()
    assert result.validation_accuracy == pytest.approx(right)
    loss = nn.functional.cross_entropy(logits, stripes.validation_labels).item()
    assert result.validation_loss == pytest.approx(loss, rel=1e-5)


def test_train_loss_is_the_mean_over_batches(stripes: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noting(network: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, clip_norm: float) -> None:
        seen.append(loss.item())
        train_step(network, optimizer, loss, clip_norm)

    monkeypatch.setattr("model.fit.train_step", noting)
    result = next(fit(build_network(NETWORK), stripes, FIT))
    assert len(seen) == 144 // 16
    assert result.train_loss == pytest.approx(sum(seen) / len(seen), rel=1e-5)


def test_a_diverging_training_ends_with_a_typed_error(stripes: Split) -> None:
    with pytest.raises(NonFiniteLossError, match="epoch 1 at learning rate 1e\\+30"):
        curve(stripes, replace(FIT, optimizer="sgd", lr=1e30, clip_norm=0, warmup=0))


def test_the_gradient_is_clipped(stripes: Split) -> None:
    network = build_network(NETWORK)
    config = replace(FIT, optimizer="sgd", momentum=0, weight_decay=0, lr=1.0)
    optimizer = build_optimizer(network, config)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    loss = 1e6 * network(stripes.fit_images[:8]).square().mean()
    train_step(network, optimizer, loss, clip_norm=0.5)
    pairs = zip(network.parameters(), before, strict=True)
    moved = math.sqrt(sum(float((after.detach() - old).square().sum()) for after, old in pairs))
    assert moved == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adamw"])
def test_biases_and_norms_do_not_decay(optimizer: str) -> None:
    network = build_network(NETWORK)
    groups = build_optimizer(network, replace(FIT, optimizer=optimizer)).param_groups
    decayed = [parameter for group in groups if group["weight_decay"] for parameter in group["params"]]
    assert all(parameter.ndim > 1 for parameter in decayed)
    assert len(decayed) == sum(p.ndim > 1 for p in network.parameters()) - (2 if optimizer == "muon" else 0)
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


def test_global_chance_and_modes_are_left_alone(stripes: Split) -> None:
    network = build_network(NETWORK)
    state = torch.random.get_rng_state()
    for _ in fit(network, stripes, FIT):
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_inference_mode_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_evaluation_leaves_the_network_as_it_was(stripes: Split) -> None:
    network = build_network(NETWORK).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate(network, stripes.validation_images, stripes.validation_labels)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def living_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_memory_does_not_grow_from_trial_to_trial(stripes: Split) -> None:
    config = replace(FIT, epochs=1)
    for _ in range(5):
        curve(stripes, config)
    tensors = living_tensors()
    resident = psutil.Process().memory_info().rss
    for _ in range(20):
        curve(stripes, config)
    assert living_tensors() == tensors
    assert psutil.Process().memory_info().rss - resident < 20 * 2**20
