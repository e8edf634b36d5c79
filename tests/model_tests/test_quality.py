"""Quality against plain references, test-time augmentation, and how long a pass takes."""

import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.config import NetworkConfig
from model.evaluate import evaluate, predict_logits
from model.network import build_network
from model.quality import as_predictor, assess, latency, logits_of

NETWORK = NetworkConfig((8, 16), 2, (True, True), classes=3)


class Given(nn.Module):
    """Gives image i, which holds the number i, the logits of row i."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[images[:, 0, 0, 0].long()]


def numbered(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 2, 2)


def random_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@st.composite
def answers(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits of 1 to 40 images over 2 to 5 classes, some of them sure, and the true classes."""
    count, classes = draw(st.integers(1, 40)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 100.0]))
    logits = torch.randn(count, classes, generator=generator) * scale
    return logits, torch.randint(0, classes, (count,), generator=generator)


def plain_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Equations 2, 3 and 5 of Guo et al., 2017, word by word."""
    probabilities = logits.double().softmax(1)
    total = 0.0
    for low, high in pairwise(number / bins for number in range(bins + 1)):
        members = [row for row, own in enumerate(probabilities) if low < max(own.tolist()) <= high]
        if members:
            accuracy = sum(int(logits[row].argmax() == labels[row]) for row in members) / len(members)
            confidence = sum(max(probabilities[row].tolist()) for row in members) / len(members)
            total += len(members) / len(labels) * abs(accuracy - confidence)
    return total


@given(answers())
@settings(max_examples=60, deadline=None)
def test_every_number_equals_its_plain_definition(given: tuple[Tensor, Tensor]) -> None:
    logits, labels = given
    count, classes = logits.shape
    quality = assess(Given(logits), numbered(count), labels, "float32", classes)
    predicted = logits.argmax(1).tolist()
    pairs = list(zip(labels.tolist(), predicted, strict=True))
    assert quality.images == count
    assert quality.accuracy == sum(true == seen for true, seen in pairs) / count
    assert quality.confusion == tuple(
        tuple(pairs.count((true, seen)) for seen in range(classes)) for true in range(classes)
    )
    assert sum(map(sum, quality.confusion)) == count
    for label, share in enumerate(quality.per_class):
        of_class = [seen for true, seen in pairs if true == label]
        assert share == (of_class.count(label) / len(of_class) if of_class else None)
    assert quality.loss == pytest.approx(
        -logits.double().log_softmax(1)[torch.arange(count), labels].mean().item(), rel=1e-5, abs=1e-6
    )
    assert quality.calibration_error == pytest.approx(plain_calibration_error(logits, labels), abs=1e-12)
    assert 0 <= quality.calibration_error <= 1


def test_a_sure_and_right_classifier_is_calibrated_and_a_sure_and_wrong_one_is_not() -> None:
    labels = torch.tensor([0, 1, 2, 1])
    sure = 100.0 * torch.eye(3)[labels]
    assert assess(Given(sure), numbered(4), labels, "float32", 3).calibration_error == pytest.approx(0, abs=1e-9)
    wrong = assess(Given(sure), numbered(4), (labels + 1) % 3, "float32", 3)
    assert wrong.calibration_error == pytest.approx(1, abs=1e-9)
    assert wrong.accuracy == 0


def test_one_bin_for_a_coin_that_knows_that_it_is_one() -> None:
    labels = torch.tensor([0, 1, 0, 1])
    quality = assess(Given(torch.zeros(4, 2)), numbered(4), labels, "float32", 2)
    assert quality.calibration_error == 0
    assert quality.accuracy == 0.5


def test_assessing_agrees_with_evaluating_over_several_batches() -> None:
    network, images = build_network(NETWORK, 2), random_images(1_203)
    labels = torch.arange(1_203) % 3
    quality, evaluation = assess(network, images, labels, "float32", 3), evaluate(network, images, labels, "float32")
    assert quality.loss == evaluation.loss
    assert quality.accuracy == pytest.approx(evaluation.accuracy, abs=1e-6)


def test_nothing_can_be_said_on_no_images() -> None:
    with pytest.raises(ValueError, match="no images"):
        assess(Given(torch.zeros(1, 2)), numbered(0), torch.zeros(0, dtype=torch.int64), "float32", 2)


def test_flipping_averages_an_image_with_its_mirror_image() -> None:
    network, images = build_network(NETWORK, 2), random_images(7)
    plain, mirrored = (predict_logits(network, each, "float32") for each in (images, images.flip(-1)))
    assert torch.equal(logits_of(network, images, "float32"), plain)
    flipped = logits_of(network, images, "float32", flip=True)
    torch.testing.assert_close(flipped, (plain + mirrored) / 2)
    assert not torch.allclose(flipped, plain, atol=1e-6)
    torch.testing.assert_close(logits_of(network, images.flip(-1), "float32", flip=True), flipped)


def test_a_predictor_with_flips_is_assessed_with_them() -> None:
    network, images, labels = build_network(NETWORK, 2), random_images(30), torch.arange(30) % 3
    flipped = logits_of(network, images, "float32", flip=True)
    quality = assess(as_predictor(network, flip=True), images, labels, "float32", 3)
    assert quality.loss == nn.functional.cross_entropy(flipped, labels).item()
    assert as_predictor(network, flip=False) is network


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("flip", [True, False])
def test_the_networks_mode_and_statistics_are_left_alone(training: bool, flip: bool) -> None:
    network = build_network(NETWORK, 2).train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logits_of(network, random_images(9), "float32", flip)
    assess(as_predictor(network, flip), random_images(9), torch.arange(9) % 3, "float32", 3)
    latency(network, 2, "float32")
    assert all(module.training is training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_bfloat16_logits_are_averaged_in_float32() -> None:
    network, images = build_network(NETWORK, 2), random_images(5)
    parts = [predict_logits(network, each, "bfloat16") for each in (images, images.flip(-1))]
    flipped = logits_of(network, images, "bfloat16", flip=True)
    assert flipped.dtype == torch.float32
    assert torch.equal(flipped, (parts[0] + parts[1]) / 2)


class Slow(nn.Module):
    """Takes a hundredth of a second for each image, and three times as long on its first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        assert images.dtype == torch.uint8
        self.passes += 1
        time.sleep(0.01 * len(images) * (3 if self.passes == 1 else 1))
        return self.weight


def test_latency_is_that_of_a_warm_pass_and_its_measurement_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.quality.LATENCY_SECONDS", 0.4)
    for batch in (2, 5):
        network, start = Slow(), time.perf_counter()
        assert 0.01 * batch <= latency(network, batch, "float32", size=8) < 0.03 * batch
        assert time.perf_counter() - start < 2
        assert network.passes > 4


def test_latency_of_a_network_slower_than_the_whole_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.quality.LATENCY_SECONDS", 0.0)
    network = Slow()
    assert latency(network, 1, "float32") >= 0.01
    assert network.passes == 2
