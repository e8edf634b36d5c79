"""Devices: which exist, and what each gains from."""

import contextlib
import ctypes
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
from torch import nn

from model.config import ConfigError, Precision

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def resolve_device(name: str) -> torch.device:
    """The first of `resolve_devices`."""
    return resolve_devices(name)[0]


def resolve_devices(name: str) -> list[torch.device]:
    """The devices that ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``cuda:N,M`` stands for on this machine.

    ``auto`` and ``cuda`` are all GPUs that this process sees; ``auto`` is the CPU if there is none.

    Raises:
        ConfigError: one does not exist.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return [torch.device("cpu")]
    kind, colon, numbers = name.partition(":")
    indices = numbers.split(",") if colon else [str(index) for index in range(max(1, count))]
    if (kind != "cuda" and name != "auto") or not all(number.isdecimal() for number in indices):
        raise ConfigError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:N or cuda:N,M")
    for index in map(int, indices):
        if index >= count:
            available = f"only cuda:0 to cuda:{count - 1}" if count else "no CUDA device"
            raise ConfigError(f"{name} is not there: this machine has {available}; use --device cpu or auto")
    return [torch.device("cuda", int(number)) for number in dict.fromkeys(indices)]


def device_key(device: torch.device) -> str | None:
    """A GPU's key, the same everywhere, also in another container; None for the CPU."""
    if device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


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
    """A name for people, such as ``NVIDIA H100`` or ``AMD EPYC, 2 threads``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.cpu.get_capabilities().get('cpu_name') or 'CPU'}, {torch.get_num_threads()} threads"


Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """This moment in a device's work, for `seconds_between`; the host does not wait for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Seconds of work between two marks. The host waits until the second is reached."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def keep_freed_pages() -> None:
    """Tell glibc to keep freed memory: activations come and go at every step, and each return to the kernel costs
    page faults. Does nothing under another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Turn autocast off within the context if it is on; else do nothing, which leaves no trace in an export."""
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return cast(AbstractContextManager[None], torch.autocast(device_type, enabled=False))
    return contextlib.nullcontext()


COMPILING_PAYS_AFTER = 300.0
"""Seconds of training. `torch.compile` takes 20-60 s for each new network; the gain is judged at a quarter of the
training's time (not measured on a GPU)."""


@contextmanager
def tuned_for_long_training(network: nn.Module, device: torch.device, seconds: float) -> Iterator[nn.Module]:
    """The network in the form that is fastest for one training of about this many seconds.

    It shares the given network's weights. On a GPU, cuDNN tries its algorithms for every new shape, and a long
    training is compiled; a network that cannot be compiled runs as it is. On the CPU nothing is changed: what a
    compiler could fuse is compiled already (`model.kernels.tail`).
    """
    if device.type != "cuda":
        yield network
        return
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield _compiled(network) if seconds >= COMPILING_PAYS_AFTER else network
    finally:
        torch.backends.cudnn.benchmark = before


def _compiled(network: nn.Module) -> nn.Module:
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True  # such as no C compiler on this machine: it then runs uncompiled
    return cast(nn.Module, torch.compile(network))
