"""Augmentation: what every function must keep, and plain loops that say what each should do."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import data.augment
from data.augment import augment, augment_config, colour_jitter, crop, cutout, flip

STRENGTHS = st.floats(0, 1, allow_nan=False)
SEEDS = st.integers(0, 2**31)
BATCHES = st.integers(1, 5)
DTYPES = st.sampled_from([torch.uint8, torch.float32])
HEIGHT, WIDTH = 12, 10  # not square, so that rows and columns cannot be taken for each other
quick = settings(max_examples=60, deadline=None)


def random_images(count: int, seed: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, HEIGHT, WIDTH), generator=generator).to(dtype)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@quick
@given(strength=STRENGTHS, count=BATCHES, dtype=DTYPES, seed=SEEDS, mirror=st.booleans())
def test_augment_keeps_shape_dtype_and_range(
    strength: float, count: int, dtype: torch.dtype, seed: int, mirror: bool
) -> None:
    images = random_images(count, seed, dtype)
    before = images.clone()
    result = augment(images, strength, seeded(seed), mirror)
    assert result.shape == images.shape
    assert result.dtype == dtype
    assert float(result.min()) >= 0
    assert float(result.max()) <= 255
    assert torch.equal(images, before), "the caller's images must stay as they were"


@quick
@given(strength=STRENGTHS, count=BATCHES, dtype=DTYPES, seed=SEEDS)
def test_augment_is_the_same_under_the_same_seed(strength: float, count: int, dtype: torch.dtype, seed: int) -> None:
    images = random_images(count, 0, dtype)
    assert torch.equal(augment(images, strength, seeded(seed)), augment(images, strength, seeded(seed)))


@quick
@given(strength=st.floats(0.1, 1), count=BATCHES, seed=SEEDS)
def test_augment_differs_under_another_seed(strength: float, count: int, seed: int) -> None:
    images = random_images(count, 0, torch.float32)
    assert not torch.equal(augment(images, strength, seeded(seed)), augment(images, strength, seeded(seed + 1)))


@quick
@given(count=BATCHES, dtype=DTYPES, seed=SEEDS, mirror=st.booleans())
def test_strength_zero_changes_nothing_and_draws_nothing(
    count: int, dtype: torch.dtype, seed: int, mirror: bool
) -> None:
    images = random_images(count, seed, dtype)
    generator = seeded(seed)
    state = generator.get_state()
    assert torch.equal(augment(images, 0.0, generator, mirror), images)
    assert torch.equal(generator.get_state(), state)


def test_a_generator_moves_on_between_batches() -> None:
    images, generator = random_images(4, 0), seeded(0)
    assert not torch.equal(augment(images, 0.5, generator), augment(images, 0.5, generator))


@quick
@given(strength=st.floats(0.1, 1), seed=SEEDS)
def test_each_image_of_a_batch_gets_its_own_draw(strength: float, seed: int) -> None:
    images = random_images(1, 3, torch.float32).expand(5, -1, -1, -1)
    results = augment(images, strength, seeded(seed))
    assert all(not torch.equal(results[i], results[j]) for i in range(5) for j in range(i))


@quick
@given(count=BATCHES, dtype=DTYPES, data=st.data())
def test_flip_turns_the_chosen_images_and_no_other(count: int, dtype: torch.dtype, data: st.DataObject) -> None:
    images = random_images(count, 1, dtype)
    chosen = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    flipped = flip(images, torch.tensor(chosen))
    for image, result, turned in zip(images, flipped, chosen, strict=True):
        expected = torch.stack([image[:, :, WIDTH - 1 - column] for column in range(WIDTH)], -1) if turned else image
        assert torch.equal(result, expected)


@quick
@given(count=BATCHES, dtype=DTYPES, data=st.data())
def test_flipping_twice_gives_the_images_back(count: int, dtype: torch.dtype, data: st.DataObject) -> None:
    images = random_images(count, 1, dtype)
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    assert torch.equal(flip(flip(images, chosen), chosen), images)


def test_flip_of_none_is_the_identity() -> None:
    images = random_images(4, 1)
    assert torch.equal(flip(images, torch.zeros(4, dtype=torch.bool)), images)


def crop_by_padding(images: Tensor, pad: int, down: list[int], right: list[int]) -> Tensor:
    results = []
    for image, below, beside in zip(images, down, right, strict=True):
        padded = F.pad(image.float()[None], (pad, pad, pad, pad), mode="reflect")[0].to(images.dtype)
        results.append(padded[:, pad + below : pad + below + HEIGHT, pad + beside : pad + beside + WIDTH])
    return torch.stack(results)


@pytest.mark.parametrize("pad", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_is_a_window_of_the_reflect_padded_image(pad: int, dtype: torch.dtype) -> None:
    shifts = [(down, right) for down in range(-pad, pad + 1) for right in range(-pad, pad + 1)]
    down, right = [pair[0] for pair in shifts], [pair[1] for pair in shifts]
    images = random_images(len(shifts), pad, dtype)
    result = crop(images, torch.tensor(down), torch.tensor(right))
    assert result.dtype == dtype
    assert torch.equal(result, crop_by_padding(images, pad, down, right))


def test_crop_without_a_shift_is_the_identity() -> None:
    images, zero = random_images(3, 2), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(crop(images, zero, zero), images)


def cutout_by_loop(images: Tensor, rows: list[int], columns: list[int], side: int) -> Tensor:
    results = images.clone()
    for image, middle_row, middle_column in zip(results, rows, columns, strict=True):
        first_row, first_column = middle_row - side // 2, middle_column - side // 2
        for row in range(max(0, first_row), min(HEIGHT, first_row + side)):
            for column in range(max(0, first_column), min(WIDTH, first_column + side)):
                for channel in range(3):
                    image[channel, row, column] = 128
    return results


@quick
@given(count=BATCHES, dtype=DTYPES, side=st.integers(1, 16), data=st.data())
def test_cutout_lays_a_grey_square_that_may_hang_over(
    count: int, dtype: torch.dtype, side: int, data: st.DataObject
) -> None:
    images = random_images(count, side, dtype)
    rows = data.draw(st.lists(st.integers(0, HEIGHT - 1), min_size=count, max_size=count))
    columns = data.draw(st.lists(st.integers(0, WIDTH - 1), min_size=count, max_size=count))
    result = cutout(images, torch.tensor(rows), torch.tensor(columns), side)
    assert result.dtype == dtype
    assert torch.equal(result, cutout_by_loop(images, rows, columns, side))


def test_cutout_hides_side_times_side_pixels_around_the_middle() -> None:
    black = torch.zeros(1, 3, HEIGHT, WIDTH)
    result = cutout(black, torch.tensor([5]), torch.tensor([6]), 3)
    hidden = sorted((int(row), int(column)) for row, column in (result[0, 0] == 128).nonzero())
    assert hidden == [(row, column) for row in (4, 5, 6) for column in (5, 6, 7)]
    assert int((result == 128).sum()) == 3 * 9


def jitter_by_steps(image: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Saturation about each pixel's grey, then contrast about the image's mean, then brightness."""
    value = image.double()
    grey = (value[0] + value[1] + value[2]) / 3
    value = torch.stack([grey + saturation * (channel - grey) for channel in value])
    mean = float(value.sum()) / value.numel()
    value = mean + contrast * (value - mean)
    return (value * brightness).clamp(0, 255)


FACTORS = st.lists(st.floats(0.5, 1.5, width=32), min_size=3, max_size=3)


@quick
@given(factors=st.lists(FACTORS, min_size=1, max_size=5), dtype=DTYPES, seed=SEEDS)
def test_colour_jitter_equals_saturation_then_contrast_then_brightness(
    factors: list[list[float]], dtype: torch.dtype, seed: int
) -> None:
    images = random_images(len(factors), seed, dtype)
    brightness, contrast, saturation = torch.tensor(factors).T
    result = colour_jitter(images, brightness, contrast, saturation)
    expected = torch.stack([jitter_by_steps(image, *each) for image, each in zip(images, factors, strict=True)])
    assert result.shape == images.shape
    assert result.dtype == dtype
    tolerance = 0.501 if dtype == torch.uint8 else 1e-3
    assert float((result.double() - expected).abs().max()) <= tolerance
    assert float(result.double().min()) >= 0
    assert float(result.double().max()) <= 255


@quick
@given(count=BATCHES, seed=SEEDS)
def test_colour_jitter_with_factors_of_one_is_the_identity_on_uint8(count: int, seed: int) -> None:
    images, ones = random_images(count, seed), torch.ones(count)
    assert torch.equal(colour_jitter(images, ones, ones, ones), images)


def test_colour_jitter_saturates_at_white_instead_of_wrapping_round() -> None:
    nearly_white, one = torch.full((1, 3, HEIGHT, WIDTH), 250, dtype=torch.uint8), torch.ones(1)
    assert torch.equal(colour_jitter(nearly_white, 1.4 * one, one, one), torch.full_like(nearly_white, 255))


def test_colour_jitter_without_saturation_is_grey() -> None:
    one = torch.ones(1)
    result = colour_jitter(random_images(1, 5, torch.float32), one, one, 0 * one)[0]
    torch.testing.assert_close(result[0], result[1])
    torch.testing.assert_close(result[0], result[2])


@pytest.mark.parametrize(
    ("strength", "flipped", "pad", "side", "jitter"),
    [(0, 0, 0, 0, 0), (0.25, 0.5, 2, 4, 0.1), (0.5, 0.5, 4, 8, 0.2), (1, 0.5, 8, 16, 0.4)],
)
def test_recipe_is_the_documented_table(strength: float, flipped: float, pad: int, side: int, jitter: float) -> None:
    chosen = augment_config(strength)
    assert (chosen.flip, chosen.pad, chosen.cutout) == (flipped, pad, side)
    assert chosen.jitter == pytest.approx(jitter)


@quick
@given(weak=STRENGTHS, strong=STRENGTHS, mirror=st.booleans())
def test_recipe_grows_with_strength_and_stays_within_its_table(weak: float, strong: float, mirror: bool) -> None:
    weak, strong = sorted((weak, strong))
    less, more, most = augment_config(weak, mirror), augment_config(strong, mirror), augment_config(1.0, mirror)
    assert 0 <= less.flip <= more.flip <= most.flip
    assert 0 <= less.pad <= more.pad <= most.pad
    assert 0 <= less.cutout <= more.cutout <= most.cutout
    assert 0 <= less.jitter <= more.jitter <= most.jitter


@quick
@given(strength=STRENGTHS)
def test_recipe_without_mirror_never_flips_and_changes_nothing_else(strength: float) -> None:
    without, usual = augment_config(strength, mirror=False), augment_config(strength)
    assert without.flip == 0
    assert (without.pad, without.cutout, without.jitter) == (usual.pad, usual.cutout, usual.jitter)


def count_of_flipped(strength: float, mirror: bool) -> int:
    """Of 1,000 images, dark on the left: how many come back dark on the right."""
    images = torch.zeros(1000, 3, HEIGHT, WIDTH)
    images[..., WIDTH // 2 :] = 200
    result = augment(images, strength, seeded(0), mirror).mean((1, 2))
    return int((result[:, 0] > result[:, -1]).sum())


def test_images_that_must_not_be_mirrored_are_not() -> None:
    strength = 0.03  # too weak for crops and cutouts, which could hide a flip
    assert augment_config(strength).pad == augment_config(strength).cutout == 0
    assert count_of_flipped(strength, mirror=False) == 0
    assert 30 <= count_of_flipped(strength, mirror=True) <= 90, "six in a hundred"


@pytest.mark.parametrize("strength", [-0.01, 1.01, 2.0, float("inf"), float("-inf"), float("nan")])
def test_a_strength_outside_zero_to_one_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\]"):
        augment_config(strength)
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\]"):
        augment(random_images(1, 0), strength, seeded(0))


def spy(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor]) -> list[tuple[Tensor, ...]]:
    calls: list[tuple[Tensor, ...]] = []

    def noted(images: Tensor, *rest: Tensor) -> Tensor:
        calls.append(rest)
        return function(images, *rest)

    monkeypatch.setattr(data.augment, function.__name__, noted)
    return calls


def test_draws_cover_exactly_the_range_that_the_recipe_names(monkeypatch: pytest.MonkeyPatch) -> None:
    flips, crops, cutouts, jitters = (spy(monkeypatch, function) for function in (flip, crop, cutout, colour_jitter))
    augment(random_images(4000, 0), 0.5, seeded(0))
    (flipped,) = flips[0]
    assert 1850 <= int(flipped.sum()) <= 2150
    for shift in crops[0]:
        assert shift.unique().tolist() == list(range(-4, 5))
    rows, columns, side = cutouts[0]
    assert rows.unique().tolist() == list(range(HEIGHT))
    assert columns.unique().tolist() == list(range(WIDTH))
    assert side == 8
    for factor in jitters[0]:
        assert 0.8 <= float(factor.min()) < 0.801
        assert 1.199 < float(factor.max()) <= 1.2 + 1e-6
    down, right = crops[0]
    assert not torch.equal(down, right)
    brightness, contrast, saturation = jitters[0]
    assert not torch.equal(brightness, contrast)
    assert not torch.equal(contrast, saturation)
