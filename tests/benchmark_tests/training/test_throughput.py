"""The benchmark measures what it says: its references train, and its rows have what is promised."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from benchmarks.training.airbench import AirbenchNetwork, AirbenchTrainer, count_flops
from benchmarks.training.plain import ImagesInMemory, PlainNetwork, PlainTrainer, plain_transform
from data.images import LabelledImages
from data.split import divide
from model.config import FitConfig, NetworkConfig
from model.fit import fit
from model.network import count_parameters

ROOT = Path(__file__).parents[3]


CPU = torch.device("cpu")
ROW = {
    "network",
    "batch",
    "ours_images_per_second",
    "reference_images_per_second",
    "ratio",
    "achieved_flops",
    "share_of_peak",
    "peak_memory_bytes",
}


@pytest.fixture
def shades() -> LabelledImages:
    """80 random images of two classes: dark ones and bright ones."""
    labels = torch.arange(80) % 2
    noise = torch.randint(0, 120, (80, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    images = (noise + 120 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    return LabelledImages(images, labels, ("dark", "bright"), mirror=True)


def patches(images: Tensor) -> Tensor:
    """Every 2x2 patch of images that are scaled, as rows of 12."""
    windows = images.unfold(2, 2, 1).unfold(3, 2, 1)
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)


def test_the_plain_loop_learns_and_counts_its_images(shades: LabelledImages) -> None:
    torch.manual_seed(0)
    network = PlainNetwork(NetworkConfig((8, 8), 2, (True, True), "branch", "leaky_relu", head=(8,), classes=2))
    trainer = PlainTrainer(network, ImagesInMemory(shades, plain_transform()), 32, CPU, loaders=0)
    # An epoch is two batches of 32 and what is left.
    assert [trainer.step() for _ in range(6)] == [32, 32, 16, 32, 32, 16]
    for _ in range(30):
        trainer.step()
    assert trainer.losses[-1] < 0.8 * trainer.losses[0]
    assert trainer.accuracies[-1] > 0.9
    done = len(trainer.losses)
    start = time.perf_counter()
    rate = trainer.measure(0.1)
    # Also counts what is left out of the rate: steps before the clock starts.
    assert 0 < rate < 32 * (len(trainer.losses) - done) / 0.1
    assert time.perf_counter() - start > 0.1


def test_the_plain_loop_sees_images_flipped_and_cropped_between_minus_one_and_one(shades: LabelledImages) -> None:
    torch.manual_seed(0)
    white = LabelledImages(torch.full_like(shades.images, 255), shades.labels, shades.classes, mirror=True)
    images = torch.stack([ImagesInMemory(white, plain_transform())[row][0] for row in range(80)])
    assert images.shape == (80, 3, 32, 32)
    assert set(images.unique().tolist()) == {-1.0, 1.0}  # black from the padding, white from the image
    assert (images[:, :, 4:28, 4:28] == 1).all()
    assert (images == -1).any()
    own = ImagesInMemory(shades, pil_to_tensor)
    assert torch.equal(own[7][0], shades.images[7])
    assert own[7][1] == shades.labels[7]


def test_airbench_has_the_published_size() -> None:
    network = AirbenchNetwork()
    scales = 2 * (64 + 256 + 256)  # of the norms; they stay 1, and nobody counts them
    assert count_parameters(network) - scales == 1_971_640
    frozen = sum(parameter.numel() for parameter in network.parameters() if not parameter.requires_grad)
    assert frozen == scales + 24 * 3 * 2 * 2
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert network.eval()(images).shape == (3, 10)
    first = 2 * 31 * 31 * 24 * 12
    groups = [2 * 9 * s * s * c * w for s, c, w in ((31, 24, 64), (15, 64, 256), (7, 256, 256))]
    seconds = [2 * 9 * s * s * w * w for s, w in ((15, 64), (7, 256), (3, 256))]
    assert count_flops() == first + sum(groups) + sum(seconds) + 2 * 256 * 10


def test_airbench_whitens_patches(shades: LabelledImages) -> None:
    network = AirbenchNetwork(shades.images, widths=(4, 8, 8))
    filters = network.body[0].weight.detach().view(24, 12)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(filters[:12], -filters[12:])
    out = patches(network.normalise(shades.images)) @ filters[:12].T
    torch.testing.assert_close(out.T @ out / len(out), torch.eye(12), atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_airbench_learns_in_its_own_loop(shades: LabelledImages, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = AirbenchNetwork(shades.images, widths=(4, 8, 8))
    trainer = AirbenchTrainer(network, shades, CPU, dtype, batch_size=32)
    assert trainer.epoch() == 64
    assert trainer.measure(0.3) > 0
    assert trainer.losses[-1] < trainer.losses[0]


def test_fit_trains_airbench(shades: LabelledImages) -> None:
    split = divide(shades, 0, CPU)
    network = AirbenchNetwork(shades.images, widths=(4, 8, 8)).to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in network.named_parameters()}
    (result,) = fit(network, split, FitConfig(epochs=1, batch_size=24, augment=0.25))
    assert result.images_per_second > 0
    changed = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name, value in network.named_parameters() if value.requires_grad}


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.training.throughput", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_rows_have_what_is_promised(tmp_path: Path) -> None:
    file = tmp_path / "new" / "throughput.json"
    few = ("--networks", "small", "--rounds", "1", "--seconds", "0.1", "--data-dir", str(tmp_path))
    done = run("--device", "cpu", "--json", str(file), *few)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(file.read_text())
    assert isinstance(result["device"], str)
    assert result["versions"].keys() == {"python", "torch", "torchvision", "commit", "date"}
    assert result["images"] == "random"
    assert "random images" in done.stdout
    (row,) = result["rows"]
    assert row.keys() >= ROW
    assert (row["network"], row["batch"], row["reference_batch"], row["n"]) == ("small", 128, 64, 1)
    assert row["ratio"] == row["ours_images_per_second"] / row["reference_images_per_second"]
    assert row["achieved_flops"] == 3 * 13_308_076 * row["ours_images_per_second"]
    assert row["share_of_peak"] == row["achieved_flops"] / result["matrix_flops"]
    assert 50e6 < row["peak_memory_bytes"] < 8e9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "reason"),
    [(("--networks", "small,tiny"), "no network 'tiny' on cpu"), (("--device", "tpu"), "unknown device 'tpu'")],
)
def test_what_is_not_there_is_refused_in_one_line(words: tuple[str, ...], reason: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]
