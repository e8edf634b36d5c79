import pytest
import torch

from model.config import ConfigError
from model.device import autocast_dtype, bf16_pays, describe_device, keep_freed_pages, resolve_device


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "", "tpu:0"])
def test_unknown_devices_are_refused_with_the_choices(name: str) -> None:
    with pytest.raises(ConfigError, match="choose auto, cpu, cuda, cuda:N or cuda:N,M"):
        resolve_device(name)


def test_a_cuda_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="cuda:1 is not there: this machine has no CUDA device"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="only cuda:0 to cuda:1"):
        resolve_device("cuda:2")
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


def test_bf16_is_taken_where_the_device_has_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for features, pays in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert bf16_pays(cpu) is pays
        assert autocast_dtype("auto", cpu) is (torch.bfloat16 if pays else None)
    for capability, pays in (((9, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert bf16_pays(gpu) is pays
    assert autocast_dtype("float32", gpu) is None
    assert autocast_dtype("bfloat16", cpu) is torch.bfloat16


def test_the_cpu_has_a_name() -> None:
    assert "threads" in describe_device(torch.device("cpu"))


def test_keeping_pages_harms_nothing() -> None:
    keep_freed_pages()
    assert torch.ones(1 << 20).sum() == 1 << 20
