"""Functions of compiled libraries with declared arguments: a mismatch is an error, not memory corruption.

A function takes its arguments by name only. ctypes checks each of them against its declaration and raises
`ctypes.ArgumentError`; a missing one is a TypeError.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.kernels.library import library

Layout = Literal["contiguous", "channels_last", "any"]


@dataclass(frozen=True)
class TensorArgument:
    """A tensor that is passed as the address of its data.

    Attributes:
        dtype: of its elements.
        dims: its number of dimensions.
        layout: in memory; for ``any`` its strides are passed as another argument.
        optional: None may be passed, as a null pointer.
    """

    dtype: torch.dtype
    dims: int
    layout: Layout = "contiguous"
    optional: bool = False

    def from_param(self, value: object) -> ctypes.c_void_p | None:
        """What ctypes passes for a value.

        Raises:
            TypeError: it is not a tensor of this kind; ctypes makes this an ArgumentError.
        """
        if value is None and self.optional:
            return None
        if not (
            isinstance(value, Tensor)
            and value.dtype == self.dtype
            and value.dim() == self.dims
            and value.is_cpu
            and self._lies_so(value)
        ):
            raise TypeError(f"expected {self}")
        return ctypes.c_void_p(value.data_ptr())

    def _lies_so(self, value: Tensor) -> bool:
        if self.layout == "channels_last":
            return value.is_contiguous(memory_format=torch.channels_last)
        return self.layout == "any" or value.is_contiguous()


def activations(dtype: torch.dtype, optional: bool = False) -> TensorArgument:
    """An argument of shape (n, channels, h, w), channels last in memory."""
    return TensorArgument(dtype, 4, "channels_last", optional)


def vector(optional: bool = False) -> TensorArgument:
    """An argument of one float32 per channel."""
    return TensorArgument(torch.float32, 1, optional=optional)


def int64s(count: int) -> type[ctypes.Array[ctypes.c_int64]]:
    """The type of an array of this many numbers; ``int64s(2)(3, 4)`` is one."""
    return ctypes.c_int64 * count


def entry(source: Path, name: str, result: type[Any] | None, **arguments: Any) -> Callable[..., Any]:
    """A function of the library that `model.kernels.library` compiles, loaded by its first call.

    Args:
        source: the C++ file.
        name: the function's.
        result: its ctypes type; None: it returns nothing.
        **arguments: name and type of each argument, in order: a ctypes type or a `TensorArgument`.
    """

    @functools.cache
    def function() -> Callable[..., Any]:
        code = library(source)
        assert code is not None  # `supports` has looked
        prototype = ctypes.CFUNCTYPE(result, *arguments.values())
        return prototype((name, code), tuple((1, argument) for argument in arguments))

    def call(**values: Any) -> Any:
        return function()(**values)

    return call


def empty_activations(n: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """A new tensor (n, channels, height, width), channels last in memory, uninitialised."""
    return torch.empty(n, channels, height, width, dtype=dtype, memory_format=torch.channels_last)
