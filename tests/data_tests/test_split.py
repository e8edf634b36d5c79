"""The division into fit and validation images: complete, stratified, the same everywhere."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.errors import DataError
from data.images import LabelledImages
from data.split import Split, divide, first_images, load_split, with_validation

CPU = torch.device("cpu")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MakeSource = Callable[..., LabelledImages]
Numbers = Callable[[Tensor], list[int]]


def test_the_division_is_nine_to_one_disjoint_and_complete(make_source: MakeSource, numbers_of: Numbers) -> None:
    source = make_source(20)
    split = divide(source, 0, CPU)
    fit, validation = numbers_of(split.fit_images), numbers_of(split.validation_images)
    assert (len(fit), len(validation)) == (180, 20)
    assert sorted(fit + validation) == list(range(200))
    assert torch.equal(split.fit_images, source.images[fit])
    assert torch.equal(split.validation_images, source.images[validation])
    assert torch.equal(split.fit_labels, source.labels[fit])
    assert torch.equal(split.validation_labels, source.labels[validation])


@pytest.mark.parametrize("counts", [[20] * 10, [13, 27, 50, 110], [15] * 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_class_has_its_share_of_the_validation_images_to_within_one(
    make_source: MakeSource, counts: list[int], seed: int
) -> None:
    split = divide(make_source(counts), seed, CPU)
    held = split.validation_labels.bincount(minlength=len(counts)).tolist()
    share = len(split.validation_labels) / sum(counts)
    assert all(abs(number - count * share) < 1 for number, count in zip(held, counts, strict=True))


def test_the_split_keeps_dtype_classes_mirror_and_device(make_source: MakeSource) -> None:
    source = make_source(20, classes=3)
    for mirror in (True, False):
        split = divide(replace(source, mirror=mirror), 0, CPU)
        assert split.classes == ("class 0", "class 1", "class 2")
        assert split.mirror is mirror
    for images, labels in ((split.fit_images, split.fit_labels), (split.validation_images, split.validation_labels)):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 32, 32)
        assert labels.dtype == torch.int64
        assert images.device == labels.device == CPU


def test_the_same_seed_gives_the_same_division(make_source: MakeSource) -> None:
    one, same = divide(make_source(20), 5, CPU), divide(make_source(20), 5, CPU)
    assert torch.equal(one.fit_images, same.fit_images)
    assert torch.equal(one.validation_images, same.validation_images)
    assert one.fingerprint == same.fingerprint


def test_another_seed_gives_another_division(make_source: MakeSource, numbers_of: Numbers) -> None:
    one, other = divide(make_source(20), 5, CPU), divide(make_source(20), 6, CPU)
    assert numbers_of(one.validation_images) != numbers_of(other.validation_images)
    assert one.fingerprint != other.fingerprint


def test_the_division_leaves_the_global_generators_alone(make_source: MakeSource) -> None:
    torch.manual_seed(0)
    first = divide(make_source(20), 5, CPU)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(divide(make_source(20), 5, CPU).fit_labels, first.fit_labels)
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=40, deadline=None)
@given(row=st.integers(0, 39), channel=st.integers(0, 2), y=st.integers(0, 7), x=st.integers(0, 7))
def test_one_changed_pixel_changes_the_fingerprint(row: int, channel: int, y: int, x: int) -> None:
    labels = torch.arange(40) % 2
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 8, 8)
    source = LabelledImages(images, labels, ("a", "b"), mirror=True)
    changed = images.clone()
    changed[row, channel, y, x] ^= 1
    assert divide(source, 0, CPU).fingerprint != divide(replace(source, images=changed), 0, CPU).fingerprint


def test_swapped_labels_change_the_fingerprint(make_source: MakeSource) -> None:
    source = make_source(20)
    labels = source.labels.clone()
    other = int((labels != labels[0]).nonzero()[0])
    labels[0], labels[other] = source.labels[other], source.labels[0]
    assert divide(source, 0, CPU).fingerprint != divide(replace(source, labels=labels), 0, CPU).fingerprint


def test_one_changed_label_changes_the_fingerprint(make_source: MakeSource) -> None:
    source = make_source(20)
    labels = source.labels.clone()
    labels[7] = (labels[7] + 1) % 10
    assert divide(source, 0, CPU).fingerprint != divide(replace(source, labels=labels), 0, CPU).fingerprint


def test_other_class_names_change_the_fingerprint(make_source: MakeSource) -> None:
    source = make_source(20, classes=2)
    renamed = replace(source, classes=("class 0", "class one"))
    assert divide(source, 0, CPU).fingerprint != divide(renamed, 0, CPU).fingerprint


def test_the_fingerprint_is_of_the_content_not_of_its_place_in_memory(make_source: MakeSource) -> None:
    source = make_source(20)
    scattered = source.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not scattered.is_contiguous()
    one, same = divide(source, 0, CPU), divide(replace(source, images=scattered), 0, CPU)
    assert one.fingerprint == same.fingerprint
    assert len(one.fingerprint) == 64


@pytest.mark.parametrize("counts", [[20] * 10, [20, 40, 60]])
def test_every_prefix_of_the_first_images_is_balanced(make_source: MakeSource, counts: list[int]) -> None:
    split = divide(make_source(counts), 0, CPU)
    whole = split.fit_labels.bincount()
    for count in range(1, len(split.fit_labels)):
        labels = first_images(split, count).fit_labels
        assert len(labels) == count
        held = labels.bincount(minlength=len(counts))
        left = held[held < whole]  # classes that are not used up yet
        assert int(held.max()) - int(left.min()) <= 1


def test_the_first_images_grow_by_appending(make_source: MakeSource, numbers_of: Numbers) -> None:
    split = divide(make_source(20), 0, CPU)
    most = numbers_of(first_images(split, 150).fit_images)
    assert len(set(most)) == 150
    for count in (1, 10, 77):
        assert numbers_of(first_images(split, count).fit_images) == most[:count]


def test_the_first_images_keep_their_labels_and_leave_validation_alone(
    make_source: MakeSource, numbers_of: Numbers
) -> None:
    source = make_source(20)
    split = divide(source, 0, CPU)
    fewer = first_images(split, 50)
    assert torch.equal(fewer.fit_labels, source.labels[numbers_of(fewer.fit_images)])
    assert torch.equal(fewer.validation_images, split.validation_images)
    assert torch.equal(fewer.validation_labels, split.validation_labels)
    assert (fewer.classes, fewer.mirror, fewer.fingerprint) == (split.classes, split.mirror, split.fingerprint)


@pytest.mark.parametrize("count", [180, 181, 10**9])
def test_as_many_first_images_as_there_are_is_the_split_itself(make_source: MakeSource, count: int) -> None:
    split = divide(make_source(20), 0, CPU)
    assert first_images(split, count) is split


def test_with_validation_fits_on_every_image_once(make_source: MakeSource, numbers_of: Numbers) -> None:
    source = make_source(20)
    split = divide(source, 0, CPU)
    whole = with_validation(split)
    rows = numbers_of(whole.fit_images)
    assert sorted(rows) == list(range(200))
    assert torch.equal(whole.fit_labels, source.labels[rows])
    assert torch.equal(whole.validation_images, split.validation_images)
    assert torch.equal(whole.validation_labels, split.validation_labels)
    assert len(split.fit_labels) == 180, "the split that was given stays as it was"


def test_load_split_divides_what_the_data_set_names(tmp_path: Path) -> None:
    split = load_split("digits", tmp_path, 0, CPU)
    assert (len(split.fit_labels), len(split.validation_labels)) == (1293, 144)
    assert split.mirror is False
    assert split.fingerprint == load_split("digits", tmp_path, 0, CPU).fingerprint


def test_load_split_refuses_an_unknown_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="imagenet"):
        load_split("imagenet", tmp_path, 0, CPU)


def test_the_real_cifar10_is_divided_as_documented(cifar10_dir: Path) -> None:
    split = load_split("cifar10", cifar10_dir, 0, CPU)
    assert split.fit_images.shape == (45_000, 3, 32, 32)
    assert split.validation_images.shape == (5_000, 3, 32, 32)
    assert split.fit_images.dtype == split.validation_images.dtype == torch.uint8
    assert split.fit_labels.bincount().tolist() == [4_500] * 10
    assert split.validation_labels.bincount().tolist() == [500] * 10
    assert split.classes == CLASSES
    assert split.mirror is True
    # Channel means of the published training images: 0.4914, 0.4822, 0.4465.
    whole = with_validation(split).fit_images
    means = [float(whole[:, channel].double().mean()) / 255 for channel in range(3)]
    assert means == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-4)
    assert load_split("cifar10", cifar10_dir, 0, CPU).fingerprint == split.fingerprint


@given(count=st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_first_images_of_one_class_more_common_than_the_rest_never_repeat(count: int) -> None:
    number = torch.arange(300)
    labels = (number % 10 == 0).long()
    images = torch.stack([number // 256, number % 256, number * 0], 1).to(torch.uint8)[:, :, None, None]
    split = Split(images, labels, images[:0], labels[:0], ("common", "rare"), True, "fingerprint")
    fewer = first_images(split, count)
    pairs = Counter(tuple(pixel) for pixel in fewer.fit_images[:, :2, 0, 0].tolist())
    assert len(fewer.fit_labels) == min(count, 300)
    assert set(pairs.values()) == {1}
    assert int((fewer.fit_labels == 1).sum()) >= min(count // 2, 30)
