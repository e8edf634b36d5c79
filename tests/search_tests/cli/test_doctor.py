import json
from pathlib import Path

import pytest

from support.command import Command


def findings(search: Command, *words: object, status: int = 0) -> dict[str, dict[str, str]]:
    ended = search("doctor", "--format", "json", *words)
    assert ended.status == status, ended.err
    return {finding["subject"]: finding for finding in json.loads(ended.out)}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.cifar10.can_fetch", lambda _: False)


@pytest.mark.usefixtures("offline")
def test_a_machine_without_data_is_warned_not_refused(search: Command) -> None:
    found = findings(search, "--device", "cpu")
    assert set(found) == {"python", "torch", "device", "bf16", "compiler", "data", "storage", "disk"}
    assert found["data"]["level"] == "warning"
    assert "--dataset digits" in found["data"]["text"]
    assert "of its time in float32" in found["bf16"]["text"]
    assert {found[name]["level"] for name in ("python", "device", "bf16", "storage", "disk")} == {"ok"}
    assert "data" in search("doctor", "--device", "cpu").out


@pytest.mark.usefixtures("offline")
def test_what_is_wrong_comes_with_its_mending(search: Command, home: Path) -> None:
    (home / "broken.db").write_text("not a database, only words. " * 50)
    folder = home / "images" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "test_batch").touch()
    words = ("--storage", "sqlite:///broken.db", "--data-dir", home / "images", "--device", "cuda:9")
    found = findings(search, *words, status=1)
    assert {name for name, finding in found.items() if finding["level"] == "wrong"} == {"device", "data", "storage"}
    assert "python -m search data" in found["data"]["text"]
    assert "use --device cpu" in found["device"]["text"]


def test_a_healthy_data_folder_is_called_so(search: Command, cifar10_dir: Path) -> None:
    assert findings(search, "--data-dir", cifar10_dir, "--device", "cpu")["data"]["level"] == "ok"


@pytest.mark.usefixtures("offline")
def test_looking_creates_nothing(search: Command, home: Path) -> None:
    findings(search, "--device", "cpu")
    assert not (home / "studies").exists()
