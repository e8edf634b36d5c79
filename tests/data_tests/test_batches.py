"""Batches: every fit image at most once in an epoch, the same under the same seed, each with its own label."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.augment import augment
from data.batches import Batches, steps_per_epoch
from data.images import LabelledImages

Epoch = list[tuple[Tensor, Tensor]]


def training_batches(
    images: Tensor, labels: Tensor, batch_size: int, strength: float, mirror: bool, generator: torch.Generator
) -> Epoch:
    """One epoch."""
    batches = Batches(images, labels, batch_size, strength, mirror, generator)
    batches.shuffle()
    return [batches.take() for _ in range(batches.steps)]


def numbered(count: int) -> tuple[Tensor, Tensor]:
    """Images of one colour each: image i holds nothing but i, and i is its label."""
    numbers = torch.arange(count)
    return numbers.to(torch.uint8)[:, None, None, None].expand(-1, 3, 9, 9), numbers


def epoch(count: int, batch_size: int, seed: int = 0, strength: float = 0.0) -> Epoch:
    generator = torch.Generator().manual_seed(seed)
    return training_batches(*numbered(count), batch_size, strength, True, generator)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 60), batch_size=st.integers(1, 70), seed=st.integers(0, 1000))
def test_an_epoch_holds_whole_batches_of_images_that_never_repeat(count: int, batch_size: int, seed: int) -> None:
    batches = epoch(count, batch_size, seed)
    assert len(batches) == steps_per_epoch(count, batch_size) == max(1, count // batch_size)
    for images, labels in batches:
        assert images.shape == (min(batch_size, count), 3, 9, 9)
        assert images.dtype == torch.uint8
        assert labels.shape == (min(batch_size, count),)
        assert labels.dtype == torch.int64
    seen = [int(label) for _, labels in batches for label in labels]
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(range(count))


@pytest.mark.parametrize(
    ("images", "batch_size", "steps"), [(100, 10, 10), (109, 10, 10), (110, 10, 11), (10, 10, 1), (9, 10, 1), (1, 1, 1)]
)
def test_steps_are_whole_batches_and_at_least_one(images: int, batch_size: int, steps: int) -> None:
    assert steps_per_epoch(images, batch_size) == steps


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), strength=st.sampled_from([0.0, 0.5]))
def test_the_same_seed_gives_the_same_batches(seed: int, strength: float) -> None:
    for (images, labels), (same_images, same_labels) in zip(
        epoch(20, 6, seed, strength), epoch(20, 6, seed, strength), strict=True
    ):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


def test_one_set_of_batches_goes_on_epoch_after_epoch() -> None:
    generator, same = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    batches = Batches(*numbered(20), 6, 0.5, True, generator)
    for _ in range(3):
        batches.shuffle()
        for images, labels in training_batches(*numbered(20), 6, 0.5, True, same):
            taken, their_labels = batches.take()
            assert torch.equal(taken, images)
            assert torch.equal(their_labels, labels)


def test_another_seed_gives_another_order() -> None:
    first, second = (torch.cat([labels for _, labels in epoch(60, 10, seed)]) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_the_next_epoch_of_one_generator_is_shuffled_anew_and_brings_in_the_remainder() -> None:
    generator = torch.Generator().manual_seed(0)
    orders = [
        [int(label) for _, labels in training_batches(*numbered(25), 10, 0.0, True, generator) for label in labels]
        for _ in range(12)
    ]
    assert len({tuple(order) for order in orders}) == 12
    assert set().union(*orders) == set(range(25))


def test_strength_zero_gives_the_very_images_with_their_labels(
    make_source: Callable[..., LabelledImages], numbers_of: Callable[[Tensor], list[int]]
) -> None:
    source = make_source(10)
    generator = torch.Generator().manual_seed(3)
    for images, labels in training_batches(source.images, source.labels, 16, 0.0, True, generator):
        rows = numbers_of(images)
        assert torch.equal(images, source.images[rows])
        assert torch.equal(labels, source.labels[rows])


def test_labels_stay_with_augmented_images() -> None:
    # Class 0 is black, class 1 bright: jitter by a tenth and grey squares over a fifth of an image leave that plain.
    labels = torch.arange(100) % 2
    images = (labels * 200).to(torch.uint8)[:, None, None, None].expand(-1, 3, 9, 9).contiguous()
    generator = torch.Generator().manual_seed(0)
    for batch, batch_labels in training_batches(images, labels, 10, 0.25, True, generator):
        middle = batch.float().flatten(1).median(1).values
        assert torch.equal((middle > 100).long(), batch_labels)


def test_batches_are_augmented_at_the_strength_asked_for() -> None:
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12)
    generator, same = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    order = torch.randperm(12, generator=same)
    for step, (batch, _) in enumerate(training_batches(images, labels, 4, 0.7, False, generator)):
        expected = augment(images[order[4 * step : 4 * step + 4]], 0.7, same, mirror=False)
        assert torch.equal(batch, expected)


def test_the_source_images_are_left_as_they_were() -> None:
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    for batch, _ in training_batches(images, torch.arange(12), 12, 1.0, True, torch.Generator().manual_seed(0)):
        assert not torch.equal(batch.sort(0).values, before.sort(0).values)
    assert torch.equal(images, before)
