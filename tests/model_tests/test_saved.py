"""A model on disk: it comes back as it was saved, and whatever is wrong with it is told in one line."""

import contextlib
import hashlib
import json
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.config import ConfigError, NetworkConfig
from model.network import build_network
from model.saved import load_model, save_model

NETWORK = NetworkConfig((8, 16), 2, (True, False), head=(4,), classes=3)


def saved(folder: Path, **about: Any) -> Path:
    save_model(folder, build_network(NETWORK, 5), ("a", "b", "c"), {"study": "s", **about}, {"test": 0.5})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "best")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that no test changes."""
    return saved(tmp_path_factory.mktemp("sound") / "best")


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit ``config.json``."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def sign(folder: Path) -> None:
    """Give an altered weights file the right checksum."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    change(folder, lambda config: config.update(sha256=digest))


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_model(folder)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert str(folder) in text
    assert len(text) < 600
    return text


def test_a_saved_model_comes_back(folder: Path) -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    model = load_model(folder)
    assert model.classes == ("a", "b", "c")
    assert not model.flip
    assert model.about == {"study": "s"}
    assert not model.network.training
    assert torch.equal(model.network(images), build_network(NETWORK, 5).eval()(images))
    assert json.loads((folder / "metrics.json").read_text()) == {"test": 0.5}
    assert json.loads((folder / "config.json").read_text())["study"] == "s"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "metrics.json", "model.safetensors"]


def test_the_checksum_is_the_files_sha_256(folder: Path) -> None:
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((folder / "config.json").read_text())["sha256"] == expected


@pytest.mark.parametrize("flip", [True, False])
def test_how_the_model_predicts_is_kept(tmp_path: Path, flip: bool) -> None:
    assert load_model(saved(tmp_path / "best", predict={"flip": flip})).flip is flip


@pytest.mark.parametrize("predict", [{"flip": 1}, {"flip": True, "crop": 4}, {}, [], None, "flip"])
def test_an_unknown_way_to_predict_is_refused(tmp_path: Path, predict: object) -> None:
    assert "predict is" in refusal(saved(tmp_path / "best", predict=predict))


def test_every_file_is_as_readable_as_any_new_file(folder: Path) -> None:
    (folder / "any").touch()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"holds no saved model: {name} is missing" in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_refused_in_one_line(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert "is damaged" in refusal(folder)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_change_anywhere_in_the_weights_is_found(sound: Path, data: st.DataObject) -> None:
    content = bytearray((sound / "model.safetensors").read_bytes())
    match data.draw(st.sampled_from(["bit", "cut", "longer", "swapped"])):
        case "bit":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "longer":
            content += data.draw(st.binary(min_size=1, max_size=20))
        case _:
            content[-4:], content[-8:-4] = content[-8:-4], content[-4:]
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(sound, Path(scratch) / "best")
        (folder / "model.safetensors").write_bytes(content)
        if content == (sound / "model.safetensors").read_bytes():
            return
        assert "model.safetensors does not match its checksum in config.json: " in refusal(folder)


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    change(folder, lambda config: config["network"].update(widths=[8, 12]))
    assert "model.safetensors is of another network than config.json: " in refusal(folder)


def test_weights_in_another_precision_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    integers = {
        name: value.view(torch.int32) if value.is_floating_point() else value for name, value in weights.items()
    }
    save_file(integers, folder / "model.safetensors")
    sign(folder)
    assert "is of another network" in refusal(folder)


def test_a_pickle_in_the_place_of_the_weights_is_never_opened(folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return sys.exit, ("unpickled",)

    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()).ljust(100_000, b"\0"))
    sign(folder)
    assert "is damaged" in refusal(folder)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        ({"wings": 2}, "network has unknown settings: ['wings']"),
        ({"widths": 8}, "network.widths is 8, not a list"),
        ({"widths": "8, 16"}, "network.widths is '8, 16', not a list"),
        ({"widths": [8, 16.0]}, "network.widths is 16.0, not a whole number"),
        ({"widths": [8, True]}, "network.widths is True, not a whole number"),
        ({"widths": [8, -16]}, "network.widths is -16, not a whole number from 1"),
        ({"widths": [8, 10**30]}, "not a whole number from 1 to 1,048,576"),
        ({"widths": []}, "at least one block"),
        ({"widths": [8] * 2000, "pooled": [False] * 2000}, "not a list of at most 1,000"),
        ({"widths": [8, 1_000_000]}, "more than model.safetensors can hold"),
        ({"convs": 1_000_000}, "more than model.safetensors can hold"),
        ({"head": [1_000_000, 1_000_000]}, "more than model.safetensors can hold"),
        ({"head": None}, "network.head is None, not a list"),
        ({"pooled": [True]}, "2 blocks but 1 entries"),
        ({"pooled": [1, 0]}, "network.pooled is 1, not true or false"),
        ({"pool_place": "roof"}, "network.pool_place is 'roof', not one of branch, conv, sum"),
        ({"activation": ["relu"]}, "not one of relu, leaky_relu, gelu, silu"),
        ({"shortcut": "yes"}, "network.shortcut is 'yes', not true or false"),
        ({"classes": 0}, "network.classes is 0, not a whole number from 1"),
        ({"classes": 4}, "there are 3 classes, but the network tells 4 apart"),
        ({"image_size": 1e9}, "network.image_size is 1000000000.0, not a whole number"),
    ],
)
def test_what_describes_no_network_is_refused_before_one_is_built(
    folder: Path, edit: dict[str, Any], text: str
) -> None:
    change(folder, lambda config: config["network"].update(edit))
    start = time.perf_counter()
    assert text in refusal(folder)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        ({"network": None}, "network is None, not a table"),
        ({"network": {"widths": [8]}}, "network has no convs, pooled"),
        ({"classes": "abc"}, "classes is 'abc', not a list of names"),
        ({"classes": ["a", 2, "c"]}, "not a list of names"),
        ({"classes": ["a", "b"]}, "there are 2 classes, but the network tells 3 apart"),
        ({"sha256": None}, "does not match its checksum"),
        ({"format": 2}, "format 2; this version reads format 1"),
    ],
)
def test_other_wrong_entries_are_refused(folder: Path, edit: dict[str, Any], text: str) -> None:
    change(folder, lambda config: config.update(edit))
    assert text in refusal(folder)


@pytest.mark.parametrize("key", ["network", "classes", "sha256", "format"])
def test_a_missing_entry_is_named(folder: Path, key: str) -> None:
    change(folder, lambda config: config.pop(key))
    assert f"config.json has no {key}" in refusal(folder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"format": ' + b"9" * 5_000 + b"}"]
)
def test_a_config_that_is_no_table_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "is damaged" in refusal(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([*json.loads(json.dumps(vars(NETWORK))), "new"]), json_values)
@settings(max_examples=100, deadline=None)
def test_any_value_in_the_network_table_is_read_or_refused(sound: Path, key: str, value: object) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(sound, Path(scratch) / "best")
        change(folder, lambda config: config["network"].update({key: value}))
        with contextlib.suppress(ConfigError):
            load_model(folder)


def test_a_device_that_is_not_there_is_no_damage(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises((RuntimeError, AssertionError)) as error:
        load_model(folder, "cuda")
    assert "damaged" not in str(error.value)
