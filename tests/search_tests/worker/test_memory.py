"""What an exception of a training says about the device's memory."""

import pytest
import torch

from search.worker.memory import is_broken_device, is_out_of_memory

OUT_OF_MEMORY = [
    "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
]


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
@pytest.mark.parametrize("kind", [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)])
def test_what_says_that_memory_ran_out_is_no_broken_device(text: str, kind: type[RuntimeError]) -> None:
    error = kind(text)
    assert is_out_of_memory(error)
    assert not is_broken_device(error)


def test_torchs_own_error_of_a_full_gpu() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    assert is_out_of_memory(MemoryError())


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
    ],
)
def test_an_error_that_leaves_the_gpu_useless_is_not_out_of_memory(text: str) -> None:
    error = RuntimeError(text)
    assert not is_out_of_memory(error)
    assert is_broken_device(error)


def test_a_mistake_in_a_network_is_neither() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 9x3)")
    assert not is_out_of_memory(error)
    assert not is_broken_device(error)
