"""Memory of one trial: whether it ran out, and its peak.

The peak is that of the device's allocator on a GPU, of the process's resident set on the CPU.
"""

import resource
from pathlib import Path

import torch

OUT_OF_MEMORY = (
    "DefaultCPUAllocator",  # torch's own, on the CPU
    "CUDA error: out of memory",  # a CUDA call outside torch's allocator
    "ALLOC_FAILED",  # CUDNN_STATUS_ALLOC_FAILED, CUBLAS_STATUS_ALLOC_FAILED
    "ALLOCATION_FAILED",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED, ..._HOST_ALLOCATION_FAILED
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cublasCreate found no memory for its workspace (pytorch/pytorch#91958)
)
"""What plain RuntimeErrors say if memory ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the memory of the GPU or the host ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in OUT_OF_MEMORY)


def is_broken_device(error: BaseException) -> bool:
    """Whether this process can never use its GPU again after a CUDA error, such as an illegal access."""
    accelerator_error = getattr(torch, "AcceleratorError", ())  # torch 2.8 and later
    return not is_out_of_memory(error) and (isinstance(error, accelerator_error) or "CUDA error" in str(error))


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak. If the kernel does not allow that (not Linux), the peak is the whole process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory(device: torch.device) -> int:
    """Peak since the last reset, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        kilobytes = int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024
