"""What ``search doctor`` checks: what a search needs, what is wrong, and how to fix it."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from sqlalchemy.engine import URL
from torch.nn import functional as F

from data import cifar10, source
from data.errors import DataError, UserError
from model.config import ConfigError
from model.device import bf16_pays, describe_device, resolve_device
from model.kernels import winograd
from model.kernels.library import library
from model.kernels.tail import SOURCE
from search.storage.connect import storage_opened, study_names
from search.storage.url import without_password

MIN_FREE_BYTES = 2 * 2**30
Level = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One check: its result, and how to fix what is wrong."""

    subject: str
    level: Level
    text: str


def examine(device_name: str, data_dir: Path, storage: URL, out: Path) -> list[Finding]:
    """Check everything that a search needs; never raises."""
    findings = [_python(), _torch()]
    try:
        device = resolve_device(device_name)
    except ConfigError as error:
        findings.append(Finding("device", "wrong", str(error)))
    else:
        findings += [Finding("device", "ok", describe_device(device)), _bf16(device), _compiler(device)]
    return [*findings, _data(data_dir), _storage(storage), _disk(out)]


def _python() -> Finding:
    text = f"{platform.python_version()} at {sys.executable}"
    return Finding("python", "ok", text)


def _torch() -> Finding:
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    text = f"{torch.__version__}, {cuda}"
    if torch.version.cuda and not torch.cuda.is_available():
        if Path("/proc/driver/nvidia").exists():
            return Finding(
                "torch",
                "warning",
                f"{text}, but it cannot use this machine's NVIDIA driver; update the driver",
            )
        return Finding("torch", "ok", f"{text}; no NVIDIA GPU here, so the CPU is used")
    return Finding("torch", "ok", text)


def _bf16(device: torch.device) -> Finding:
    """Measure a 3x3 convolution in both precisions, as trials would run it."""
    full, half = (_convolution_seconds(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    text = f"a 3x3 convolution in bfloat16 takes {half / full:.2f} of its time in float32"
    if bf16_pays(device):
        return Finding("bf16", "ok", f"used: {text}")
    return Finding("bf16", "ok", f"not used, the device has no instructions for it: {text}")


def _compiler(device: torch.device) -> Finding:
    """Convolutions and what follows them run as compiled code on a CPU; PyTorch compiles a long retrain on a GPU."""
    if device.type == "cpu" and library(SOURCE) is not None:
        convolutions = "" if library(winograd.SOURCE) else "; its convolutions are PyTorch's own (no AVX512_BF16)"
        return Finding("compiler", "ok", f"found: networks train with code compiled for this processor{convolutions}")
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        if device.type != "cpu":
            return Finding("compiler", "ok", "found: a long retrain can be compiled")
        return Finding("compiler", "warning", f"found, but it cannot compile {SOURCE}; networks train slower")
    return Finding(
        "compiler", "warning", "no C++ compiler, so networks train slower; install one, such as Debian's g++"
    )


def _convolution_seconds(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    images = torch.randn(64, 64, 16, 16, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weights = torch.randn(128, 64, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    return _median_seconds(lambda: F.conv2d(images, weights, padding=1), device, repeats)


def _median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


def _data(data_dir: Path) -> Finding:
    if not cifar10.is_present(data_dir):
        if cifar10.can_fetch(data_dir):
            return Finding("data", "ok", f"no CIFAR-10 in {data_dir} yet; it will be downloaded there")
        return Finding("data", "warning", f"no CIFAR-10 in {data_dir} and no network: {source.WAYS_OUT}")
    try:
        cifar10.verify(data_dir)
    except DataError as error:
        return Finding("data", "wrong", str(error))
    return Finding("data", "ok", f"CIFAR-10 in {data_dir}, every file as published")


def _storage(url: URL) -> Finding:
    if url.drivername == "sqlite" and not Path(str(url.database)).exists():
        return Finding("storage", "ok", f"{without_password(url)}, not there yet; `run` creates it")
    try:
        with storage_opened(url) as storage:
            names = study_names(storage)
    except UserError as error:
        return Finding("storage", "wrong", str(error))
    return Finding("storage", "ok", f"{without_password(url)}, studies: {', '.join(names) or 'none yet'}")


def _disk(out: Path) -> Finding:
    folder = out.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.1f} GiB free for {out}"
    if not os.access(folder, os.W_OK):
        return Finding("disk", "wrong", f"{folder} cannot be written; choose another folder with --out")
    if free < MIN_FREE_BYTES:
        return Finding("disk", "warning", f"{text}; a study and its models want {MIN_FREE_BYTES / 2**30:.0f} GiB")
    return Finding("disk", "ok", text)
