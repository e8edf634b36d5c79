"""Any folder of images: both layouts, every kind of picture, the cache, and all that can be wrong with it."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data import image_folder as folder
from data.errors import DataError
from data.holdout import load_holdout
from data.split import load_split

MakeFolder = Callable[..., Path]
Pixels = Callable[[Tensor], list[bytes]]
CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "block-search"


def failure_of(root: Path, cache: Path, test: bool = False) -> str:
    with pytest.raises(DataError) as error:
        folder.load_part(root, cache, test=test)
    text = str(error.value)
    assert text
    assert len(text.splitlines()) == 1, text
    return text


def pixels_in(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("no image may be decoded")

    monkeypatch.setattr(Image, "open", refuse)


def count_decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened: list[str] = []
    open_image = Image.open

    def noted(path: Path) -> Image.Image:
        opened.append(Path(path).name)
        return open_image(path)

    monkeypatch.setattr(Image, "open", noted)
    return opened


def test_one_folder_of_classes_is_divided_into_disjoint_complete_parts(
    make_folder: MakeFolder, pixels_of: Pixels, tmp_path: Path, cache: Path
) -> None:
    root = make_folder(tmp_path / "pictures", 24, ("cat", "ant", "bee"))
    training, held_out = folder.load_part(root, cache, test=False), folder.load_part(root, cache, test=True)
    assert training.images.shape == (60, 3, 32, 32)
    assert held_out.images.shape == (12, 3, 32, 32)
    assert training.images.dtype == held_out.images.dtype == torch.uint8
    assert training.labels.dtype == held_out.labels.dtype == torch.int64
    assert training.labels.bincount().tolist() == [20, 20, 20]
    assert held_out.labels.bincount().tolist() == [4, 4, 4]
    every_image = {pixels.tobytes() for pixels in (pixels_in(path).numpy() for path in root.rglob("*.png"))}
    assert len(every_image) == 72
    assert set(pixels_of(training.images)) | set(pixels_of(held_out.images)) == every_image
    assert set(pixels_of(training.images)).isdisjoint(pixels_of(held_out.images))
    assert training.mirror is True


def test_labels_follow_the_sorted_class_names(make_folder: MakeFolder, tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "pictures"
    for number, name in enumerate(("cat", "ant", "bee")):
        make_folder(root, 12, (name,), seed=number)
    loaded = folder.load_part(root, cache, test=False)
    assert loaded.classes == ("ant", "bee", "cat")
    for label, name in enumerate(loaded.classes):
        of_class = {pixels_in(path).numpy().tobytes() for path in (root / name).iterdir()}
        chosen = loaded.images[loaded.labels == label]
        assert len(chosen) == 10
        assert all(image.contiguous().numpy().tobytes() in of_class for image in chosen)


def test_train_and_test_folders_are_the_two_parts(
    make_folder: MakeFolder, pixels_of: Pixels, tmp_path: Path, cache: Path
) -> None:
    train = make_folder(tmp_path / "pictures" / "train", 20, seed=0)
    test = make_folder(tmp_path / "pictures" / "test", 12, seed=1)
    for part, root in ((False, train), (True, test)):
        loaded = folder.load_part(tmp_path / "pictures", cache, test=part)
        expected = [pixels_in(path).numpy().tobytes() for path in sorted(root.rglob("*.png"))]
        assert pixels_of(loaded.images) == expected
        assert loaded.labels.tolist() == [0] * (len(expected) // 2) + [1] * (len(expected) // 2)
        assert loaded.classes == ("ant", "bee")
        assert loaded.mirror is True


def test_training_images_are_loaded_without_decoding_the_test_folder(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    make_folder(tmp_path / "pictures" / "train", 12)
    make_folder(tmp_path / "pictures" / "test", 12, seed=1)
    for path in (tmp_path / "pictures" / "test").rglob("*.png"):
        path.rename(path.with_name(f"test-{path.name}"))
    opened = count_decodings(monkeypatch)
    folder.load_part(tmp_path / "pictures", cache, test=False)
    assert len(opened) == 24
    assert not [name for name in opened if name.startswith("test-")]


def test_a_folder_loads_the_same_every_time(make_folder: MakeFolder, tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "pictures")
    decoded, cached = folder.load_part(root, cache, test=False), folder.load_part(root, cache, test=False)
    afresh = folder.load_part(root, tmp_path / "other cache", test=False)
    for same in (cached, afresh):
        assert torch.equal(same.images, decoded.images)
        assert torch.equal(same.labels, decoded.labels)
        assert same.classes == decoded.classes


def pictures_of(make_folder: MakeFolder, root: Path, picture: Image.Image, name: str = "special.png") -> Tensor:
    """What one picture becomes: it stands in for all of the first class."""
    make_folder(root, 12, ("other",))
    (root / "given").mkdir()
    stem, suffix = name.split(".")
    for number in range(12):
        picture.save(root / "given" / f"{stem}-{number}.{suffix}")
    loaded = folder.load_part(root, root.parent / "own cache", test=False)
    chosen = loaded.images[loaded.labels == 0]
    assert chosen.shape == (10, 3, 32, 32)
    assert all(torch.equal(image, chosen[0]) for image in chosen)
    return chosen[0]


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (100, 20), (7, 31), (1, 1), (500, 300)])
def test_pictures_of_every_size_become_32_by_32(make_folder: MakeFolder, tmp_path: Path, size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (200, 100, 50))
    result = pictures_of(make_folder, tmp_path / "pictures", picture)
    assert result.shape == (3, 32, 32)
    assert [result[channel].unique().tolist() for channel in range(3)] == [[200], [100], [50]]


def test_resizing_keeps_what_is_left_and_right_and_above_and_below(make_folder: MakeFolder, tmp_path: Path) -> None:
    pixels = np.zeros((96, 64, 3), dtype=np.uint8)
    pixels[:, 32:, 0] = 255
    pixels[48:, :, 1] = 255
    result = pictures_of(make_folder, tmp_path / "pictures", Image.fromarray(pixels)).float()
    assert float(result[0, :, :14].max()) == 0
    assert float(result[0, :, 18:].min()) == 255
    assert float(result[1, :14].max()) == 0
    assert float(result[1, 18:].min()) == 255
    assert float(result[2].max()) == 0


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 90, (90, 90, 90)),
        ("LA", (90, 255), (90, 90, 90)),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 128), (10, 20, 30)),
    ],
)
def test_pictures_of_every_mode_become_rgb(
    make_folder: MakeFolder,
    tmp_path: Path,
    mode: str,
    colour: int | tuple[int, ...],
    expected: tuple[int, int, int],
) -> None:
    result = pictures_of(make_folder, tmp_path / "pictures", Image.new(mode, (40, 40), colour))
    assert [result[channel].unique().tolist() for channel in range(3)] == [[value] for value in expected]


@pytest.mark.parametrize("transparent", [True, False])
def test_palette_pictures_become_rgb_without_a_warning(
    make_folder: MakeFolder, tmp_path: Path, transparent: bool
) -> None:
    picture = Image.new("P", (32, 32), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    if transparent:
        picture.info["transparency"] = bytes([0, 128])
    result = pictures_of(make_folder, tmp_path / "pictures", picture)
    assert [result[channel].unique().tolist() for channel in range(3)] == [[10], [20], [30]]


def test_16_bit_grey_keeps_its_levels(make_folder: MakeFolder, tmp_path: Path) -> None:
    levels = np.repeat(np.array([0, 64, 128, 255], dtype=np.uint16) * 257, 8)
    picture = Image.fromarray(np.tile(levels, (32, 1)))
    result = pictures_of(make_folder, tmp_path / "pictures", picture)
    assert torch.equal(result[0], result[1])
    for column, level in ((2, 0), (12, 64), (20, 128), (30, 255)):
        assert abs(int(result[0, 16, column]) - level) <= 1


def test_jpeg_pictures_are_read(make_folder: MakeFolder, tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 40), (200, 100, 50))
    result = pictures_of(make_folder, tmp_path / "pictures", picture, "special.jpg").int()
    assert int((result - torch.tensor([200, 100, 50])[:, None, None]).abs().max()) <= 3


def test_files_that_are_no_images_by_name_are_passed_over(make_folder: MakeFolder, tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "pictures")
    (root / "ant" / "notes.txt").write_text("seen in May")
    (root / "README.md").write_text("insects")
    assert len(folder.load_part(root, cache, test=False).labels) == 20


def test_a_second_load_decodes_nothing(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    root = make_folder(tmp_path / "pictures")
    first = folder.load_part(root, cache, test=False)
    forbid_decoding(monkeypatch)
    second, held_out = folder.load_part(root, cache, test=False), folder.load_part(root, cache, test=True)
    assert torch.equal(second.images, first.images)
    assert len(held_out.labels) == 4


def test_the_cache_is_one_file_with_nothing_left_half_written(
    make_folder: MakeFolder, tmp_path: Path, cache: Path
) -> None:
    folder.load_part(make_folder(tmp_path / "pictures"), cache, test=False)
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def repaint(path: Path) -> None:
    """Paint a picture white; the file keeps neither its size nor its time."""
    Image.new("RGB", (32, 32), (255, 255, 255)).save(path)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))


def test_a_changed_file_is_decoded_anew(make_folder: MakeFolder, tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "pictures")
    folder.load_part(root, cache, test=False)
    for path in (root / "bee").iterdir():
        repaint(path)
    changed = folder.load_part(root, cache, test=False)
    assert bool((changed.images[changed.labels == 1] == 255).all())
    assert not bool((changed.images[changed.labels == 0] == 255).all())


def test_a_touched_file_is_decoded_anew_even_at_the_same_size(
    make_folder: MakeFolder, tmp_path: Path, cache: Path
) -> None:
    root = make_folder(tmp_path / "pictures" / "train", 12).parent
    make_folder(root / "test", 12)
    path = root / "train" / "ant" / "000.png"
    folder.load_part(root, cache, test=False)
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(path.with_suffix(".tmp"), "PNG")
    size, stat = path.stat().st_size, path.stat()
    content = path.with_suffix(".tmp").read_bytes()
    path.with_suffix(".tmp").unlink()
    path.write_bytes(content + b"\0" * (size - len(content)))  # readers stop at PNG's end mark
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert path.stat().st_size == size
    assert int(folder.load_part(root, cache, test=False).images[0].max()) == 0


def test_an_added_a_removed_and_a_moved_file_are_noticed(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    root = make_folder(tmp_path / "pictures" / "train", 13).parent
    make_folder(root / "test", 12)

    def labels() -> list[int]:
        return folder.load_part(root, cache, test=False).labels.bincount().tolist()

    assert labels() == [13, 13]
    (root / "train" / "ant" / "000.png").rename(root / "train" / "bee" / "moved.png")
    assert labels() == [12, 14]
    (root / "train" / "bee" / "moved.png").unlink()
    assert labels() == [12, 13]
    Image.new("RGB", (8, 8)).save(root / "train" / "ant" / "added.png")
    assert labels() == [13, 13]
    opened = count_decodings(monkeypatch)
    assert labels() == [13, 13]
    assert opened == []


def test_two_folders_do_not_share_a_cache(make_folder: MakeFolder, tmp_path: Path, cache: Path) -> None:
    one, other = make_folder(tmp_path / "one", seed=0), make_folder(tmp_path / "other", seed=1)
    first, second = folder.load_part(one, cache, test=False), folder.load_part(other, cache, test=False)
    assert not torch.equal(first.images, second.images)
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_cache_is_made_again(make_folder: MakeFolder, tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "pictures")
    first = folder.load_part(root, cache, test=False)
    (stored,) = cache.iterdir()
    whole = stored.read_bytes()
    for damaged in (b"", b"nothing", whole[: len(whole) // 2]):
        stored.write_bytes(damaged)
        assert torch.equal(folder.load_part(root, cache, test=False).images, first.images)
        assert stored.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    make_folder: MakeFolder, tmp_path: Path, cache: Path, file_as_folder: Path
) -> None:
    root = make_folder(tmp_path / "pictures")
    expected = folder.load_part(root, cache, test=False)
    for _ in range(2):
        assert torch.equal(folder.load_part(root, file_as_folder, test=False).images, expected.images)
    assert torch.equal(folder.load_part(root, file_as_folder.parent, test=False).images, expected.images)


def test_a_full_disk_costs_nothing_but_time(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    def full(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(folder, "save_file", full)
    root = make_folder(tmp_path / "pictures")
    assert len(folder.load_part(root, cache, test=False).labels) == 20
    assert list(cache.iterdir()) == []


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.png", b""),
        ("text.jpg", b"this is text"),
        ("signature-only.png", PNG),
        ("bad-header.ppm", b"P6\n3x 32\n255\n" + bytes(3 * 32 * 32)),
        ("cut-off.ppm", b"P6\n32 32\n255\n" + bytes(100)),
    ],
)
def test_a_corrupt_picture_is_named(
    make_folder: MakeFolder, tmp_path: Path, cache: Path, name: str, content: bytes
) -> None:
    root = make_folder(tmp_path / "pictures")
    (root / "bee" / name).write_bytes(content)
    text = failure_of(root, cache)
    assert str(root / "bee" / name) in text
    assert "decoded" in text
    assert not cache.exists() or list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "chunk"])
def test_a_picture_damaged_in_the_middle_is_named(
    make_folder: MakeFolder, tmp_path: Path, cache: Path, damage: str
) -> None:
    root = make_folder(tmp_path / "pictures")
    path = root / "ant" / "004.png"
    chance = np.random.default_rng(3)
    Image.fromarray(chance.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        # The second image data chunk loses its name: PIL opens such a file and fails on its pixels.
        second = content.index(b"IDAT", content.index(b"IDAT") + 4)
        path.write_bytes(content[:second] + b"\xd7\x01\xe6\x24" + content[second + 4 :])
    assert str(path) in failure_of(root, cache)


def test_a_picture_of_monstrous_size_is_named(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)
    root = make_folder(tmp_path / "pictures")
    Image.new("RGB", (50, 50)).save(root / "ant" / "monster.png")
    assert "monster.png" in failure_of(root, cache)


def test_a_mended_picture_is_enough_to_load(make_folder: MakeFolder, tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "pictures")
    (root / "bee" / "012.png").write_bytes(b"nothing")
    failure_of(root, cache)
    Image.new("RGB", (8, 8)).save(root / "bee" / "012.png")
    assert len(folder.load_part(root, cache, test=False).labels) == 20


def test_a_missing_folder_and_a_file_in_its_place_are_data_errors(tmp_path: Path, cache: Path) -> None:
    assert str(tmp_path / "absent") in failure_of(tmp_path / "absent", cache)
    (tmp_path / "file").write_text("not a folder")
    assert "not a folder" in failure_of(tmp_path / "file", cache)


def test_a_folder_without_classes_is_a_data_error(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "loose.png")
    assert str(tmp_path / "pictures") in failure_of(tmp_path / "pictures", cache)


def test_one_class_only_is_a_data_error(make_folder: MakeFolder, tmp_path: Path, cache: Path) -> None:
    assert "at least two" in failure_of(make_folder(tmp_path / "pictures", classes=("only",)), cache)


def test_a_class_without_images_is_a_data_error(make_folder: MakeFolder, tmp_path: Path, cache: Path) -> None:
    (make_folder(tmp_path / "pictures") / "void").mkdir()
    assert "void" in failure_of(tmp_path / "pictures", cache)


def test_a_class_of_few_images_is_named(make_folder: MakeFolder, tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "pictures", 20)
    make_folder(root, 2, ("rare",))
    assert "'rare'" in failure_of(root, cache)


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("per_class", range(1, 14))
def test_a_folder_is_either_refused_at_the_start_or_fit_for_a_whole_study(
    make_folder: MakeFolder, tmp_path: Path, per_class: int, classes: int, divided: bool
) -> None:
    names = tuple(f"class-{number}" for number in range(classes))
    dataset = f"folder:{tmp_path / 'pictures'}"
    if divided:
        make_folder(tmp_path / "pictures" / "train", per_class, names, seed=0)
        make_folder(tmp_path / "pictures" / "test", per_class, names, seed=1)
    else:
        make_folder(tmp_path / "pictures", per_class, names)
    try:
        split = load_split(dataset, tmp_path, 0, CPU)
    except DataError as refusal:
        reason = str(refusal)
    else:
        reason = ""
        for labels in (split.fit_labels, split.validation_labels, load_holdout(dataset, tmp_path, CPU).labels):
            assert set(labels.tolist()) == set(range(classes))
    assert not reason or ("images of class" in reason and per_class < 12)


def test_a_test_folder_may_be_small(make_folder: MakeFolder, tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "pictures" / "train", 20)
    make_folder(tmp_path / "pictures" / "test", 1, seed=1)
    assert folder.load_part(tmp_path / "pictures", cache, test=True).labels.tolist() == [0, 1]


@pytest.mark.parametrize("test", [True, False])
@pytest.mark.parametrize("names", [("ant", "cow"), ("ant", "bee", "cow"), ("ant",)])
def test_other_classes_in_the_test_folder_are_reported_before_any_training(
    make_folder: MakeFolder, tmp_path: Path, cache: Path, names: tuple[str, ...], test: bool
) -> None:
    make_folder(tmp_path / "pictures" / "train")
    make_folder(tmp_path / "pictures" / "test", classes=names)
    text = failure_of(tmp_path / "pictures", cache, test=test)
    assert str(tmp_path / "pictures") in text
    assert "class" in text


def test_train_alone_without_test_is_no_division(make_folder: MakeFolder, tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "pictures" / "train" / "nested")
    assert "at least two" in failure_of(tmp_path / "pictures", cache)
