"""Tensors with margins around them, which nobody who is given one may write to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


@contextmanager
def margins_around_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """`torch.empty` cuts from larger pieces for as long as this lasts; the margins of all of them, each full of 7."""
    margins: list[Tensor] = []
    plain = torch.empty

    def guarded(*size: Any, **options: Any) -> Tensor:
        made = plain(*size, **options)
        dense = made.permute(0, 2, 3, 1) if made.dim() == 4 else made
        around = torch.full((dense.numel() + 256,), 7, dtype=made.dtype)
        margins.extend((around[:128], around[-128:]))
        inside = around[128:-128].view(dense.shape)
        return inside.permute(0, 3, 1, 2) if made.dim() == 4 else inside

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        yield margins
