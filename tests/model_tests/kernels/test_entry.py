"""The functions of the compiled libraries refuse arguments that are not what they declare."""

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.kernels import stem, tail, winograd
from model.kernels.entry import TensorArgument, activations, vector
from model.kernels.library import library

ENTRIES = {
    "stem": (stem, "_convolution"),
    "stem weights": (stem, "_gradient_of_weight"),
    "winograd": (winograd, "_convolution"),
    "winograd scratch": (winograd, "_convolution_scratch"),
    "winograd weights": (winograd, "_gradient_of_weight"),
    "winograd weights scratch": (winograd, "_weights_scratch"),
}
Call = tuple[Callable[..., Any], dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Call]:
    """Every entry with arguments that it was given in passes forward and backward, by name."""
    recorded: dict[str, Call] = {}

    def recorder(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def record(**arguments: Any) -> Any:
            recorded[name] = plain, arguments
            return plain(**arguments)

        return record

    with monkeypatch.context() as patch:
        for name, (module, attribute) in ENTRIES.items():
            patch.setattr(module, attribute, recorder(name, getattr(module, attribute)))
        for direction, dtype in itertools.product(("_forward", "_backward"), tail.DTYPE_NAMES):
            entries = getattr(tail, direction)
            patch.setitem(entries, dtype, recorder(f"tail{direction} {tail.DTYPE_NAMES[dtype]}", entries[dtype]))
        for channels, kernel in ((3, stem.stem), (8, winograd.winograd)):
            conv = nn.Conv2d(channels, 6, 3, padding=1)
            kernel_library = library((stem if channels == 3 else winograd).SOURCE)
            if kernel_library is not None:
                images = torch.randn(2, channels, 4, 4, requires_grad=channels == 8)
                kernel(images, conv, True).sum().backward()  # type: ignore[no-untyped-call]
        for dtype in tail.DTYPE_NAMES:
            if library(tail.SOURCE) is not None:
                x = torch.randn(2, 6, 4, 4, dtype=dtype, requires_grad=True)
                out, means = tail.compiled_tail(x, nn.BatchNorm2d(6), torch.ones(2, 2), "conv", "gelu")
                (out.sum() + means.sum()).backward()  # type: ignore[no-untyped-call]
    return recorded


def kind(value: Any) -> Any:
    return (value.dtype, value.dim()) if isinstance(value, Tensor) else type(value)


def test_swapped_arguments_are_an_error(calls: dict[str, Call]) -> None:
    """All but those of one kind, such as two vectors of one number a channel."""
    pairs = 0
    for call, arguments in calls.values():
        for first, second in itertools.combinations(arguments, 2):
            kinds = {kind(arguments[first]), kind(arguments[second])} - {bool}
            if len(kinds) == 2 and arguments[first] is not None and arguments[second] is not None:
                with pytest.raises(ctypes.ArgumentError):
                    call(**{**arguments, first: arguments[second], second: arguments[first]})
                pairs += 1
    assert pairs > 20 * len(calls)


def test_a_missing_argument_is_an_error_and_one_too_many(calls: dict[str, Call]) -> None:
    for call, arguments in calls.values():
        for name in arguments:
            with pytest.raises(TypeError, match=name):
                call(**{other: value for other, value in arguments.items() if other != name})
        with pytest.raises(TypeError):
            call(**arguments, another=1)


def test_arguments_have_names(calls: dict[str, Call]) -> None:
    for call, arguments in calls.values():
        with pytest.raises(TypeError):
            call(*arguments.values())


def test_none_is_passed_for_optional_arguments_only(calls: dict[str, Call]) -> None:
    assert vector(optional=True).from_param(None) is None
    for call, arguments in calls.values():
        for name in {"y", "grad", "out", "grad_out", "gamma", "scratch", "grad_bias"} & arguments.keys():
            with pytest.raises(ctypes.ArgumentError):
                call(**{**arguments, name: None})


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 3, 4, 5).double(),
        torch.zeros(3, 4, 5),
        torch.zeros(2, 3, 4, 5),
        torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)[:, :, ::2],
        torch.zeros(2, 3, 4, 5, device="meta").contiguous(memory_format=torch.channels_last),
        [0.0],
        0,
        None,
    ],
)
def test_a_tensor_of_another_kind_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        activations(torch.float32).from_param(value)


def test_a_tensor_goes_as_its_address() -> None:
    channels_last = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for argument, value in (
        (activations(torch.float32), channels_last),
        (TensorArgument(torch.float32, 4, "any"), channels_last.transpose(0, 2)),
        (vector(), torch.zeros(3)),
        (vector(), nn.Parameter(torch.zeros(3))),
    ):
        address = argument.from_param(value)
        assert address is not None
        assert address.value == value.data_ptr()
