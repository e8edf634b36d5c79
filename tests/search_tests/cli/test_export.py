"""``export``: the file is the network, for any number of images, and one that is not is never kept."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from model.config import NetworkConfig
from model.export import real_images
from model.network import build_network
from model.quality import logits_of
from model.saved import load_model, save_model
from support.command import Command

NETWORK = NetworkConfig((8, 8, 16), 2, (True, False, True), shortcut=True, head=(6,), classes=3)
CLASSES = ("cat", "dog", "cow")
DIGITS = {"dataset": {"name": "digits"}}

# ONNX takes some seconds: PyTorch translates operation by operation.
FORMATS = ["torch-export", pytest.param("onnx", marks=pytest.mark.slow)]


def save(folder: Path, network: NetworkConfig = NETWORK, **about: Any) -> Path:
    trained = build_network(network, 5).train()
    for seed in range(3):  # running statistics as a training leaves them
        trained(random_images(16, seed))
    save_model(folder, trained, CLASSES, about, {})
    return folder


def random_images(count: int, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def opened(path: Path) -> tuple[Callable[[Tensor], Tensor], tuple[str, ...]]:
    """An exported file as another program would run it, and the names of its classes."""
    if path.suffix == ".pt2":
        extra = {"classes.json": ""}
        module = torch.export.load(path, extra_files=extra).module()
        return module, tuple(json.loads(extra["classes.json"]))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [3, 32, 32])
    assert (made.name, made.type, made.shape[1:]) == ("logits", "tensor(float)", [3])
    classes = session.get_modelmeta().custom_metadata_map["classes.json"]
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), tuple(json.loads(classes))


def network_logits(model: Path, images: Tensor) -> Tensor:
    saved = load_model(model)
    return logits_of(saved.network, images, "float32", saved.flip)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("flip", [False, True])
def test_the_file_is_the_network_for_any_number_of_images(search: Command, home: Path, form: str, flip: bool) -> None:
    model = save(home / "studies" / "pets" / "best", **DIGITS, predict={"flip": flip})
    ended = search("export", "--format", form)
    assert (ended.status, ended.err) == (0, "")
    path = model / ("model.onnx" if form == "onnx" else "model.pt2")
    run, classes = opened(path)
    assert classes == CLASSES
    for count in (1, 2, 3, 70):
        images = random_images(count)
        torch.testing.assert_close(run(images), network_logits(model, images), atol=1e-4, rtol=0)
    (line,) = ended.out.splitlines()
    assert line.startswith(f"studies/pets/best/{path.name}: {path.stat().st_size:,} bytes; ")
    assert "on 256 validation and fit images of digits logits differ by at most" in line
    assert line.endswith("the class is the same for 256 of 256")
    assert {entry.name for entry in model.iterdir()} == {
        "config.json", "metrics.json", "model.safetensors", path.name,
    }  # fmt: skip


@pytest.mark.parametrize(("place", "activation"), [("branch", "leaky_relu"), ("conv", "gelu"), ("sum", "silu")])
def test_every_kind_of_network_is_exported_in_plain_operations(
    search: Command, home: Path, place: Any, activation: Any
) -> None:
    model = save(home / "m", NetworkConfig((6, 6), 3, (True, False), place, activation, classes=3), **DIGITS)
    assert search("export", "--model", "m", "--out", "deep/x.pt2").status == 0
    program = torch.export.load(home / "deep" / "x.pt2")
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert calls
    assert all(name.startswith("aten.") for name in calls), calls
    images = random_images(5)
    torch.testing.assert_close(program.module()(images), network_logits(model, images), atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_is_not_the_network_is_not_kept(
    search: Command, home: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(home / "m", **DIGITS, predict={"flip": True})
    out = home / ("x.onnx" if form == "onnx" else "x.pt2")
    out.write_text("an earlier file")
    monkeypatch.setattr("model.export.as_predictor", lambda network, flip: network)  # a flip forgotten
    ended = search("export", "--model", "m", "--out", out)
    assert ended.status == 1
    assert ended.out == ""
    assert f"{form} does not give what the network gives, so no file is kept: on 256" in ended.complaint
    assert out.read_text() == "an earlier file"
    assert sorted(entry.name for entry in home.iterdir()) == ["cache", "m", out.name]


def test_a_network_of_nans_is_not_exported(search: Command, home: Path) -> None:
    network = build_network(NETWORK)
    torch.nn.init.constant_(network.logits.bias, float("nan"))
    save_model(home / "m", network, CLASSES, DIGITS, {})
    assert "logits differ by at most nan" in search("export", "--model", "m", "--out", "x.pt2").complaint
    assert not (home / "x.pt2").exists()


def test_validation_images_of_the_models_own_data_set_are_taken(search: Command, home: Path, cifar10_dir: Path) -> None:
    save(home / "m", dataset={"name": "cifar10"})
    ended = search("export", "--model", "m", "--out", "x.pt2", "--data-dir", cifar10_dir)
    assert ended.status == 0, ended.err
    assert "on 256 validation images of cifar10 logits differ" in ended.out


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({}, "the model does not say what it was trained on"),
        ({"dataset": "cifar10"}, "the model does not say what it was trained on"),
        ({"dataset": {"name": "cifar10"}}, "cifar10 is not at hand"),
        ({"dataset": {"name": "folder:gone"}}, "folder:gone is not at hand"),
        ({"dataset": {"name": "imagenet"}}, "imagenet is not at hand"),
    ],
)
def test_digits_stand_in_where_the_data_set_is_not_at_hand(home: Path, about: dict[str, Any], why: str) -> None:
    saved = load_model(save(home / "m", NetworkConfig((4,), 1, (True,), classes=3), **about))
    images, source = real_images(saved, home / "none")
    assert source == f"validation and fit images of digits ({why})"
    assert images.shape == (256, 3, 32, 32)


def test_images_of_a_small_folder_are_too_few(home: Path) -> None:
    for name in ("a", "b"):
        (home / "pictures" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(home / "pictures" / name / f"{number}.png")
    about = {"dataset": {"name": "folder:pictures"}}
    saved = load_model(save(home / "m", NetworkConfig((4,), 1, (True,), classes=3), **about))
    images, source = real_images(saved, home)
    assert source == "validation and fit images of digits (folder:pictures has only 20)"
    assert len(images) == 256


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--out", "x.bin"), "must end in .onnx or .pt2, unlike 'x.bin'"),
        (("--out", "x.pt2", "--format", "onnx"), "must end in .onnx, unlike 'x.pt2'"),
        (("--out", "x.onnx", "--format", "torch-export"), "must end in .pt2, unlike 'x.onnx'"),
        (("--format", "tflite"), "'tflite' is not one of"),
        (("--model", "absent"), "absent holds no saved model"),
        (("--model", "m", "--name", "m"), "give --model or --name, not both"),
        ((), "no model in studies/ yet"),
        (("--model", "m", "--out", "file/x.pt2"), "file/x.pt2 cannot be written: "),
        (("--model", "m", "--out", "folder.pt2"), "folder.pt2 cannot be written: Is a directory"),
    ],
)
def test_wrong_words_get_one_line(search: Command, home: Path, words: tuple[str, ...], text: str) -> None:
    save(home / "m", NetworkConfig((4,), 1, (True,), classes=3), **DIGITS)
    (home / "file").touch()
    (home / "folder.pt2").mkdir()
    ended = search("export", *words)
    assert ended.status == 2
    assert ended.out == ""
    assert text in ended.complaint
    assert not [*home.glob("*.partial*")]


def test_without_the_extra_the_way_to_it_is_said(search: Command, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(home / "m", **DIGITS)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    ended = search("export", "--model", "m", "--format", "onnx")
    assert ended.status == 2
    assert ended.complaint == 'ONNX needs onnxscript: pip install "block-search[export]"'


def test_a_network_too_large_for_one_onnx_file_is_refused(
    search: Command, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(home / "m", **DIGITS)
    monkeypatch.setattr("model.export.MOST_ONNX_BYTES", 1_000)
    assert "take --format torch-export" in search("export", "--model", "m", "--format", "onnx").complaint
