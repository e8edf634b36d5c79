import pytest
import torch

from data.images import LabelledImages
from data.split import Split, divide


@pytest.fixture
def stripes() -> Split:
    """160 easy images of two classes: stripes across or down, over noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 2
    wave = (torch.arange(32) // 4 % 2 * 120).float()
    down, across = wave.expand(32, 32), wave[:, None].expand(32, 32)
    clean = torch.where(labels[:, None, None].bool(), across, down)
    noise = torch.randint(0, 120, (160, 3, 32, 32), generator=generator)
    images = (clean[:, None] + noise).to(torch.uint8)
    return divide(LabelledImages(images, labels, ("down", "across"), mirror=True), seed=0, device=torch.device("cpu"))
