"""What pays for one long training and not for a trial: algorithms tried out, and a network compiled."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

COMPILING_PAYS_AFTER = 300.0
"""Seconds of training. `torch.compile` takes 20-60 s for each new network; the gain is judged at a quarter of the
training's time (not measured on a GPU)."""


@contextmanager
def tuned(network: nn.Module, device: torch.device, seconds: float) -> Iterator[nn.Module]:
    """The network in the form in which one training of about so many seconds takes least time.

    It shares the given network's weights. On a GPU, cuDNN tries its algorithms for every new shape, and a long
    training is compiled; a network that cannot be compiled runs as it is. On the CPU nothing is changed: what a
    compiler could fuse is compiled already (`model.tail`).
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
