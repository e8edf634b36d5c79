"""How much work a training asks for, counted and not timed: a slower one shows here on any machine, however busy."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.split import Split
from model import fit as fit_module
from model.config import FitConfig, NetworkConfig
from model.cuda_graph import Step
from model.fit import fit
from model.kernels import tail, winograd
from model.kernels.dispatch import plain_operations
from model.kernels.library import library
from model.network import build_network

NETWORK = NetworkConfig((48, 96, 192, 192), 2, (True, True, True, False), activation="gelu", classes=2)
FIT = FitConfig(epochs=2, batch_size=16, augment=0.5, precision="bfloat16")

VIEWS = {
    "view",
    "permute",
    "transpose",
    "expand",
    "unsqueeze",
    "slice",
    "select",
    "t",
    "detach",
    "alias",
    "split",
    "_unsafe_view",
    "as_strided",
    "unbind",
}


class Recorder(TorchDispatchMode):
    """Every operation that reaches a device, by name and shapes; views cost nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.seen.append((name, tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
        return func(*args, **(kwargs or {}))


def steps_recorded(split: Split, monkeypatch: pytest.MonkeyPatch, network: NetworkConfig = NETWORK) -> list[list[Any]]:
    """The operations of each step of one epoch."""
    recorded: list[list[Any]] = []

    def noting(step: Step, device: torch.device, generator: torch.Generator) -> Step:
        def run() -> None:
            with Recorder() as recorder:
                step()
            recorded.append(recorder.seen)

        return run

    monkeypatch.setattr(fit_module, "graphed_step", noting)
    next(fit(build_network(network), split, FIT))
    return recorded


def test_every_step_is_the_same_work(stripes: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph needs: from the second step on (the first one creates momentum) nothing differs."""
    first, second, *rest = steps_recorded(stripes, monkeypatch)
    assert all(step == second for step in rest)
    assert first != []


# Counted with PyTorch 2.15: 289 and 342, of which Muon is 50. Notably more is a step that became slower, or another
# PyTorch: look, then change the number.
OPERATIONS = {"compiled": 300, "plain": 355}


@pytest.mark.parametrize("form", ["compiled", "plain"])
def test_a_step_of_the_typical_network_takes_so_many_operations(
    stripes: Split, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    if form == "compiled" and library(tail.SOURCE) is None:
        pytest.skip("no C++ compiler on this machine")
    # One a block, whatever the branches; or all of them compiled code, which is no operation of PyTorch's.
    convolutions = 0 if form == "compiled" and library(winograd.SOURCE) else 4
    with plain_operations() if form == "plain" else nullcontext():
        step = steps_recorded(stripes, monkeypatch)[-1]
    counts = Counter(name for name, _ in step)
    assert counts["_local_scalar_dense"] == 0  # a value that goes to the host: a GPU would have to be waited for
    assert counts["convolution"] == counts["convolution_backward"] == convolutions
    assert len(step) <= OPERATIONS[form]


def test_operations_do_not_grow_with_branches(stripes: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [
        len(steps_recorded(stripes, monkeypatch, NetworkConfig((8, 8), convs, (True, True), classes=2))[-1])
        for convs in (2, 5)
    ]
    assert counts[0] == counts[1]


WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@contextmanager
def waits_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts what makes a host wait for its GPU: values of tensors that Python asks for."""
    counted: Counter[str] = Counter()

    def counting(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **more: Any) -> Any:
            counted[name] += 1
            return plain(*words, **more)

        return call

    with monkeypatch.context() as patch:
        for name in WAITING:
            patch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
        yield counted


def test_an_epoch_makes_the_host_wait_once(stripes: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    training = fit(build_network(NETWORK), stripes, FIT)
    for _ in range(FIT.epochs):
        with waits_counted(monkeypatch) as counted:
            next(training)
        assert counted == {"tolist": 1}
