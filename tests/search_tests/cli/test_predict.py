"""``predict``: what a saved model sees in files, and one line for whatever is wrong with them."""

import hashlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.image_folder import decode_image
from model.config import NetworkConfig
from model.network import build_network
from model.quality import logits_of
from model.saved import load_model, save_model
from support.command import Command

NETWORK = NetworkConfig((8, 16), 2, (True, True), classes=3)
CLASSES = ("cat", "[bold]dog", "cow")


def save(folder: Path, network: NetworkConfig = NETWORK, **about: Any) -> Path:
    save_model(folder, build_network(network, 5), CLASSES, about, {})
    return folder


def picture(path: Path, width: int = 32, height: int = 32, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def model(home: Path) -> Path:
    """The best model of the only study, ``pets``."""
    return save(home / "studies" / "pets" / "best")


def predicted(search: Command, *words: object) -> list[dict[str, Any]]:
    ended = search("predict", "--format", "json", *words)
    assert ended.status == 0, ended.err
    assert ended.err == ""
    found: list[dict[str, Any]] = json.loads(ended.out)
    return found


def probabilities(model: Path, *paths: Path) -> torch.Tensor:
    saved = load_model(model)
    images = torch.stack([decode_image(path).pixels for path in paths])
    return logits_of(saved.network, images, "float32", saved.flip).softmax(1)


def test_the_class_and_its_probability_are_the_networks(search: Command, model: Path, home: Path) -> None:
    paths = [picture(home / "a.png", 640, 480), picture(home / "b.bmp", seed=1)]
    expected = probabilities(model, *paths)
    for one, path, row in zip(predicted(search, *paths), paths, expected, strict=True):
        assert list(one) == ["image", "class", "probability", "resized_from"]
        assert one["image"] == str(path)
        assert one["class"] == CLASSES[int(row.argmax())]
        assert one["probability"] == pytest.approx(float(row.max()), abs=1e-6)
        assert one["resized_from"] == ("640x480" if path.name == "a.png" else None)


def test_as_many_classes_as_are_asked_for_in_falling_order(search: Command, model: Path, home: Path) -> None:
    path = picture(home / "a.png")
    row = dict(zip(CLASSES, probabilities(model, path)[0].tolist(), strict=True))
    for top, count in ((2, 2), (3, 3), (50, 3)):
        (one,) = predicted(search, path, "--top", top)
        assert one["probabilities"] == pytest.approx(dict(sorted(row.items(), key=lambda item: -item[1])[:count]))
        assert list(one["probabilities"].values()) == sorted(one["probabilities"].values(), reverse=True)
        assert next(iter(one["probabilities"])) == one["class"]


def test_a_model_chosen_with_flips_predicts_with_them(search: Command, home: Path) -> None:
    path = picture(home / "a.png")
    plain, flipping = save(home / "plain"), save(home / "flipping", predict={"flip": True})
    first, second = (predicted(search, path, "--model", folder)[0]["probability"] for folder in (plain, flipping))
    assert second == pytest.approx(float(probabilities(flipping, path).max()), abs=1e-6)
    assert first != second


def test_a_person_reads_a_table_that_takes_names_as_they_are(search: Command, model: Path, home: Path) -> None:
    paths = [picture(home / f"{name}.png", seed=seed) for seed, name in enumerate(("[red]x", "two\nlines\x1b[2J", "c"))]
    ended = search("predict", *paths, "--top", 3)
    assert ended.status == 0
    assert ended.err == ""
    lines = ended.out.splitlines()
    assert lines[0].split() == ["image", "class", "probability"]
    assert len(lines) == 1 + 3 * 3
    assert "[red]x.png" in lines[1]
    assert "\x1b" not in ended.out
    assert sum("[bold]dog" in line for line in lines) == 3


def test_resizing_is_said_once(search: Command, model: Path, home: Path) -> None:
    paths = [picture(home / f"{number}.png", 64, 48, number) for number in range(3)]
    assert search("predict", *paths).out.count("resized from 64x48 to 32x32\n") == 1
    more = [picture(home / f"more-{size}.png", size, size) for size in (32, 40, 50, 60, 70)]
    assert "resized from 64x48 (3 of 8), 40x40 (1 of 8), 50x50 (1 of 8), 2 other sizes to 32x32\n" in (
        search("predict", *paths, *more).out
    )
    assert "resized" not in search("predict", more[0]).out


def test_a_folder_is_predicted_with_all_below_it(search: Command, model: Path, home: Path) -> None:
    paths = [picture(home / "pets" / name) for name in ("a.PNG", "deep/er/b.png", "z.jpg")]
    (home / "pets" / "notes.txt").write_text("seen in May")
    assert [one["image"] for one in predicted(search, "--dir", home / "pets")] == [str(path) for path in paths]


def test_unreadable_images_of_a_folder_get_a_line_each_and_the_others_are_predicted(
    search: Command, model: Path, home: Path
) -> None:
    good = picture(home / "pets" / "good.png")
    for name in ("bad.png", "worse.jpg"):
        (home / "pets" / name).write_bytes(b"no image")
    for form in ("table", "json"):
        ended = search("predict", "--dir", home / "pets", "--format", form)
        assert ended.status == 1
        assert good.name in ended.out
        assert "bad.png" not in ended.out
        bad, worse = ended.err.splitlines()
        assert bad.startswith(f"search: {home / 'pets' / 'bad.png'} is not an image that can be decoded")
        assert worse.startswith(f"search: {home / 'pets' / 'worse.jpg'} is not")
    good.unlink()
    ended = search("predict", "--dir", home / "pets", "--format", "json")
    assert (ended.status, json.loads(ended.out)) == (1, [])


def refused(search: Command, *words: object) -> str:
    ended = search("predict", *words)
    assert ended.status == 2, (ended.status, ended.out, ended.err)
    assert ended.out == ""
    return ended.complaint


def test_wrong_words_and_files_get_one_line(search: Command, model: Path, home: Path) -> None:
    good = picture(home / "good.png")
    (home / "bad.png").write_bytes(b"no image")
    (home / "empty").mkdir()
    for words, text in (
        ((), "give images, or --dir with a folder of them"),
        ((good, "--dir", home), "not both"),
        ((good, "absent.png"), "no file absent.png"),
        ((good, "bad.png"), "bad.png is not an image that can be decoded"),
        (("empty",), "empty is a folder; for the images in it: --dir empty"),
        (("--dir", "absent"), "no folder absent"),
        (("--dir", "bad.png"), "no folder bad.png"),
        (("--dir", "empty"), "no images in empty"),
        ((good, "--model", "empty"), "empty holds no saved model: config.json is missing"),
        ((good, "--name", "other"), "studies/other/best holds no saved model"),
        ((good, "--name", "../x"), "'../x' cannot name a study"),
        ((good, "--name", "pets", "--model", model), "give --model or --name, not both"),
        ((good, "--top", "0"), "Invalid value for '--top'"),
        ((good, "--device", "tpu"), "unknown device 'tpu'"),
        ((good, "--format", "xml"), "'xml' is not one of"),
    ):
        assert text in refused(search, *words), words


def test_which_model_is_asked_where_it_is_not_clear(search: Command, home: Path) -> None:
    good = picture(home / "good.png")
    assert "no model in studies/ yet" in refused(search, good)
    for name in ("b", "a"):
        save(home / "studies" / name / "best")
    assert "studies/ has those of a, b; choose with --name or --model" in refused(search, good)
    assert len(predicted(search, good, "--name", "a")) == 1


def test_an_altered_model_is_refused(search: Command, model: Path, home: Path) -> None:
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert "does not match its checksum in config.json" in refused(search, picture(home / "a.png"))


def test_a_model_for_images_of_another_size_is_refused(search: Command, home: Path) -> None:
    save(home / "studies" / "large" / "best", NetworkConfig((8,), 1, (True,), classes=3, image_size=64))
    assert "takes images of 64x64 pixels, not 32x32" in refused(search, picture(home / "a.png"))


def damaged_files() -> dict[str, bytes]:
    """Files whose decoders raise, warn and log in ways of their own."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))

    def content(form: str) -> bytes:
        out = io.BytesIO()
        noise.save(out, form)
        return out.getvalue()

    dds, tiff, png = content("DDS"), content("TIFF"), content("PNG")
    samples = tiff.index(b"\x15\x01\x03\x00")  # the entry for samples per pixel
    return {
        "dds": dds[:80] + bytes(4) + dds[84:],
        "tiff": tiff[: samples + 8] + b"\x00\x08" + tiff[samples + 10 :],
        "png": png[:200],
        "empty": b"",
    }


@pytest.mark.parametrize("kind", ["dds", "tiff", "png", "empty"])
def test_no_decoder_says_more_than_the_one_line(
    search: Command, model: Path, home: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (home / "x.png").write_bytes(damaged_files()[kind])
    assert "x.png is not an image that can be decoded" in refused(search, "x.png")
    assert capfd.readouterr().err == ""


def test_what_a_decoder_only_warns_of_is_predicted_in_silence(
    search: Command, model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(home / "large.png", 40, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(predicted(search, path)) == 1


def test_nothing_is_written_beside_the_model(search: Command, model: Path, home: Path) -> None:
    path = picture(home / "a.png")
    before = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in home.rglob("*.*") if file.is_file()}
    predicted(search, path)
    assert before == {
        file: hashlib.sha256(file.read_bytes()).hexdigest() for file in home.rglob("*.*") if file.is_file()
    }
