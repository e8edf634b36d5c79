import json
from pathlib import Path

import pytest
import torch

from model.config import ConfigError, NetworkConfig
from model.network import build_network
from model.saved import load_model, save_model

NETWORK = NetworkConfig((8, 16), 2, (True, False), head=(4,), classes=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "best", build_network(NETWORK, 5), ("a", "b", "c"), {"study": "s"}, {"test": 0.5})
    return tmp_path / "best"


def test_a_saved_model_comes_back(folder: Path) -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    saved = load_model(folder)
    assert saved.classes == ("a", "b", "c")
    assert not saved.network.training
    assert torch.equal(saved.network(images), build_network(NETWORK, 5).eval()(images))
    assert json.loads((folder / "metrics.json").read_text()) == {"test": 0.5}
    assert json.loads((folder / "config.json").read_text())["study"] == "s"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "metrics.json", "model.safetensors"]


def test_every_file_is_as_readable_as_any_new_file(folder: Path) -> None:
    (folder / "any").touch()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no saved model: model.safetensors is missing"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_refused_in_one_line(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="is damaged") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["network"]["widths"] = [8, 24]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is damaged"):
        load_model(folder)
