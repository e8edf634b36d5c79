"""Several processes of one machine that want the same images at once: one fetches them, the others wait."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import CIFAR10

from data import cifar10, lock, source

ROOT = Path(__file__).parents[2]
FOLDER = "cifar-10-batches-py"

CHILD = """
import json, os, sys, time
from pathlib import Path
from torchvision.datasets import CIFAR10
from data import image_folder, source
from data.errors import DataError

dataset, data_dir, repair, published, gate = sys.argv[1:]
for name, value in json.loads(published).items():
    setattr(CIFAR10, name, value)
plain = image_folder.decode_image

def gated(path):
    (Path(gate) / f"decodes-{os.getpid()}").touch()
    while not (Path(gate) / "open").exists():
        time.sleep(0.02)
    return plain(path)

image_folder.decode_image = gated
try:
    source.prepare(dataset, Path(data_dir), repair == "repair", lambda text: print(text, flush=True))
except DataError as error:
    sys.exit(str(error))
print(len(source.load_training_images(dataset, Path(data_dir)).labels), "images", flush=True)
"""


@dataclass(frozen=True)
class Child:
    """A process that wants a data set, and then tells how many images it has found."""

    process: "subprocess.Popen[str]"
    log: Path

    @property
    def waits(self) -> bool:
        return self.log.read_text().endswith("; waiting\n")

    def found(self) -> str:
        _, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        return self.log.read_text().splitlines()[-1]


Start = Callable[..., Child]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A folder: children decode pictures once it holds ``open``."""
    (tmp_path / "gate").mkdir()
    return tmp_path / "gate"


@pytest.fixture
def start(gate: Path) -> Iterator[Start]:
    """Starts a child; ``ahead`` goes before its command."""
    children: list[Child] = []

    def call(dataset: str, data_dir: Path, repair: bool = False, ahead: tuple[str, ...] = ()) -> Child:
        published = {name: getattr(CIFAR10, name) for name in ("url", "tgz_md5", "train_list", "test_list", "meta")}
        words = [dataset, str(data_dir), "repair" if repair else "", json.dumps(published), str(gate)]
        log = gate / f"log-{len(children)}"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*ahead, sys.executable, "-c", CHILD, *words], cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True
            )
        children.append(Child(process, log))
        return children[-1]

    yield call
    for child in children:
        child.process.kill()
        child.process.communicate()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_of_processes_that_start_at_once_one_downloads(site: Any, tmp_path: Path, start: Start) -> None:
    site.answer = "gated"
    data_dir = tmp_path / "data"
    children = [start("cifar10", data_dir) for _ in range(3)]
    until(lambda: sum(child.waits for child in children) == 2)
    site.gate.set()
    assert [child.found() for child in children] == ["100 images"] * 3
    assert site.downloads == 1
    told = [line for child in children for line in child.log.read_text().splitlines() if "images" not in line]
    assert told == [f"another process is fetching CIFAR-10 to {data_dir}; waiting"] * 2
    assert sorted(path.name for path in data_dir.iterdir()) == [FOLDER, "cifar-10-python.tar.gz"]


@pytest.mark.slow
def test_where_the_one_that_downloads_is_killed_the_next_takes_over(site: Any, tmp_path: Path, start: Start) -> None:
    site.answer = "gated"
    first = start("cifar10", tmp_path)
    until(lambda: site.downloads == 1)
    others = [start("cifar10", tmp_path) for _ in range(2)]
    until(lambda: all(other.waits for other in others))
    first.process.kill()
    until(lambda: site.downloads == 2)
    site.gate.set()
    assert [other.found() for other in others] == ["100 images"] * 2
    assert site.downloads == 2


def test_one_that_is_killed_while_unpacking_leaves_nothing_that_passes_for_images(
    site: Any, tiny_cifar10: Any, tmp_path: Path
) -> None:
    (tmp_path / ".unpacking" / FOLDER).mkdir(parents=True)
    (tmp_path / ".unpacking" / FOLDER / "data_batch_1").write_bytes(b"half")
    (tmp_path / ".unpacking" / FOLDER / "stale").write_bytes(b"of another version")
    assert not cifar10.is_present(tmp_path)
    source.prepare("cifar10", tmp_path)
    assert torch.equal(source.load_training_images("cifar10", tmp_path).images, tiny_cifar10.images)
    assert not (tmp_path / ".unpacking").exists()
    assert not (tmp_path / FOLDER / "stale").exists()


@pytest.mark.slow
def test_a_repair_is_waited_for(site: Any, tiny_cifar10: Any, tmp_path: Path, start: Start) -> None:
    (tiny_cifar10.write(tmp_path) / FOLDER / "data_batch_2").write_bytes(b"nothing")
    site.answer = "gated"
    mends = start("cifar10", tmp_path, repair=True)
    until(lambda: site.downloads == 1)
    other = start("cifar10", tmp_path)
    until(lambda: other.waits)
    site.gate.set()
    assert [mends.found(), other.found()] == ["100 images"] * 2
    assert site.downloads == 1


def test_where_all_is_there_nothing_is_locked(
    tiny_cifar10: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_folder: Callable[..., Path]
) -> None:
    tiny_cifar10.write(tmp_path)
    pictures = f"folder:{make_folder(tmp_path / 'pictures')}"
    source.prepare(pictures, tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("no lock may be taken")

    monkeypatch.setattr(lock, "file_lock", refuse)
    source.prepare("cifar10", tmp_path)
    source.prepare("cifar10", tmp_path, repair=True)
    assert source.resolve("auto", tmp_path) == "cifar10"
    source.prepare(pictures, tmp_path)


MOUNT = 'mount -o bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
READ_ONLY = ("unshare", "--mount", "--map-root-user", "sh", "-c", MOUNT)


@pytest.fixture
def read_only(tmp_path: Path) -> tuple[str, ...]:
    """What, put before a command, lets it see ``tmp_path/data`` through a read-only mount."""
    (tmp_path / "data").mkdir()
    ahead = (*READ_ONLY, str(tmp_path / "data"))
    tried = subprocess.run([*ahead, "touch", str(tmp_path / "data" / "x")], capture_output=True, text=True, check=False)
    if "Read-only file system" not in tried.stderr:
        pytest.skip(f"needs the right to mount: {tried.stderr}")
    return ahead


def test_a_read_only_folder_that_holds_everything_is_enough(
    tiny_cifar10: Any, tmp_path: Path, start: Start, read_only: tuple[str, ...]
) -> None:
    tiny_cifar10.write(tmp_path / "data")
    assert start("cifar10", tmp_path / "data", ahead=read_only).found() == "100 images"


@pytest.mark.slow
def test_who_may_only_read_waits_for_one_who_writes(
    site: Any, tmp_path: Path, start: Start, read_only: tuple[str, ...]
) -> None:
    site.answer = "gated"
    writes = start("cifar10", tmp_path / "data")
    until(lambda: site.downloads == 1)
    reads = start("cifar10", tmp_path / "data", ahead=read_only)
    until(lambda: reads.waits)
    site.gate.set()
    assert [writes.found(), reads.found()] == ["100 images"] * 2


def test_a_read_only_folder_without_images_is_one_line(
    site: Any, tmp_path: Path, start: Start, read_only: tuple[str, ...]
) -> None:
    _, err = start("cifar10", tmp_path / "data", ahead=read_only).process.communicate(timeout=60)
    assert "Read-only file system" in err
    assert err.count("\n") == 1


def test_a_file_system_without_locks_is_used_without(
    site: Any, tiny_cifar10: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unknown)
    source.prepare("cifar10", tmp_path)
    assert torch.equal(source.load_training_images("cifar10", tmp_path).images, tiny_cifar10.images)


@pytest.mark.slow
def test_pictures_are_decoded_by_one_and_waited_for_by_others(
    make_folder: Callable[..., Path], tmp_path: Path, start: Start, gate: Path
) -> None:
    pictures = f"folder:{make_folder(tmp_path / 'pictures')}"
    children = [start(pictures, tmp_path) for _ in range(3)]
    until(lambda: sum(child.waits for child in children) == 2)
    (gate / "open").touch()
    assert [child.found() for child in children] == ["20 images"] * 3
    assert len(list(gate.glob("decodes-*"))) == 1
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "block-search"
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


@pytest.mark.slow
def test_where_the_one_that_decodes_is_killed_the_next_takes_over(
    make_folder: Callable[..., Path], tmp_path: Path, start: Start, gate: Path
) -> None:
    pictures = f"folder:{make_folder(tmp_path / 'pictures')}"
    first = start(pictures, tmp_path)
    until(lambda: len(list(gate.glob("decodes-*"))) == 1)
    other = start(pictures, tmp_path)
    until(lambda: other.waits)
    first.process.kill()
    (gate / "open").touch()
    assert other.found() == "20 images"
    assert len(list(gate.glob("decodes-*"))) == 2
