"""Devices: which there are, and what each gains from."""

import contextlib
import ctypes

import torch

from model.config import ConfigError, Precision

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` stands for on this machine.

    Raises:
        ConfigError: it is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if count else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise ConfigError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:N")
    index = int(number or 0)
    if index >= count:
        there = f"only cuda:0 to cuda:{count - 1}" if count else "no CUDA device"
        raise ConfigError(f"{name} is not there: this machine has {there}; use --device cpu or auto")
    return torch.device("cuda", index)


def bf16_pays(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, which makes convolutions several times faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype for autocast, or None for plain float32."""
    if precision == "bfloat16" or (precision == "auto" and bf16_pays(device)):
        return torch.bfloat16
    return None


def describe_device(device: torch.device) -> str:
    """A name that a person recognises, such as ``NVIDIA H100`` or ``AMD EPYC, 2 threads``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.cpu.get_capabilities().get('cpu_name') or 'CPU'}, {torch.get_num_threads()} threads"


def keep_freed_pages() -> None:
    """Tell glibc to keep freed memory: activations come and go at every step, and each return to the kernel costs
    page faults. Does nothing under another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
