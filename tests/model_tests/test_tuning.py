import pytest
import torch
from torch import nn

from model.device import COMPILING_PAYS_AFTER, tuned_for_long_training


@pytest.fixture(autouse=True)
def trial_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.mark.parametrize("seconds", [1.0, COMPILING_PAYS_AFTER])
def test_the_cpu_trains_the_network_as_it_is(seconds: float) -> None:
    network = nn.Linear(2, 2)
    with tuned_for_long_training(network, torch.device("cpu"), seconds) as same:
        assert same is network
        assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("seconds", "compiles"), [(COMPILING_PAYS_AFTER - 1, False), (COMPILING_PAYS_AFTER, True)])
def test_a_gpu_tries_algorithms_and_compiles_where_that_pays(
    monkeypatch: pytest.MonkeyPatch, seconds: float, compiles: bool
) -> None:
    network, fast = nn.Linear(2, 2), nn.Linear(2, 2)
    monkeypatch.setattr(torch, "compile", lambda given: fast if given is network else None)
    with pytest.raises(KeyError), tuned_for_long_training(network, torch.device("cuda", 0), seconds) as trained:
        assert trained is (fast if compiles else network)
        assert torch.backends.cudnn.benchmark
        raise KeyError
    assert not torch.backends.cudnn.benchmark
