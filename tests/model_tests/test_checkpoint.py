"""A training that goes on from a checkpoint is the training that never stopped, to the last bit."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from data.split import Split, first_images, load_split
from model import checkpoint
from model.checkpoint import CheckpointWriter, load_checkpoint, read_about, save_checkpoint
from model.config import ConfigError, FitConfig, NetworkConfig
from model.fit import FitState, fit, start_state
from model.network import build_network
from model.result import EpochResult

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NETWORK = NetworkConfig((6, 8), 2, (True, True), head=(8,))
FIT = FitConfig(epochs=4, batch_size=32, lr=0.02, augment=0.5, precision="float32", seed=3)
ABOUT = {"study": "s", "slot": 7, "config": asdict(FIT), "results": [{"epoch": 1, "validation_loss": 0.1 + 0.2}]}


def small_digits() -> Split:
    return first_images(load_split("digits", Path(), seed=0, device=CPU), 96)


@pytest.fixture(scope="module")
def digits() -> Split:
    return small_digits()


def begin(config: FitConfig = FIT, network: NetworkConfig = NETWORK) -> tuple[nn.Module, FitState]:
    built = build_network(network, config.seed)
    return built, start_state(built, config, CPU)


def trained(split: Split, config: FitConfig = FIT, epochs: int = 1) -> tuple[nn.Module, FitState]:
    network, state = begin(config)
    train(network, split, config, state, epochs)
    return network, state


def train(network: nn.Module, split: Split, config: FitConfig, state: FitState, epochs: int) -> list[EpochResult]:
    training = fit(network, split, config, state=state)
    return [replace(next(training), seconds=0, images_per_second=0) for _ in range(epochs)]


def everything(network: nn.Module, state: FitState) -> dict[str, torch.Tensor]:
    """Copies of all that a training changes."""
    kept = state.optimizer.state_dict()["state"]
    own = {f"{row} {name}": value.clone() for row, values in kept.items() for name, value in values.items()}
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    return {**weights, **own, "generator": state.generator.get_state(), "epoch": torch.tensor(state.epoch)}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adamw"])
def test_a_resumed_training_equals_the_uninterrupted_one(
    digits: Split, tmp_path: Path, optimizer: str, precision: str
) -> None:
    config = replace(FIT, optimizer=optimizer, precision=precision)
    straight, straight_state = begin(config)
    expected = train(straight, digits, config, straight_state, config.epochs)
    for cut in range(config.epochs + 1):
        network, state = begin(config)
        results = train(network, digits, config, state, cut)
        save_checkpoint(tmp_path / "checkpoint", network, state, {})
        # Whatever the new ones hold must not matter: other weights, another seed.
        network, state = begin(replace(config, seed=99))
        load_checkpoint(tmp_path / "checkpoint", network, state)
        assert state.epoch == cut
        results += train(network, digits, config, state, config.epochs - cut)
        assert results == expected, cut
        assert_same(everything(network, state), everything(straight, straight_state))
        assert list(fit(network, digits, config, state=state)) == []


def test_a_state_of_ones_own_changes_nothing(digits: Split) -> None:
    own = build_network(NETWORK, FIT.seed)
    results = [replace(result, seconds=0, images_per_second=0) for result in fit(own, digits, FIT)]
    network, state = begin()
    assert train(network, digits, FIT, state, FIT.epochs) == results
    assert_same(network.state_dict(), own.state_dict())


def test_plain_sgd_keeps_nothing_and_resumes(digits: Split, tmp_path: Path) -> None:
    config = replace(FIT, momentum=0, epochs=2)
    straight, straight_state = trained(digits, config, epochs=2)
    save_checkpoint(tmp_path / "checkpoint", *trained(digits, config), {})
    network, state = begin(config)
    load_checkpoint(tmp_path / "checkpoint", network, state)
    train(network, digits, config, state, 1)
    assert_same(everything(network, state), everything(straight, straight_state))


def test_a_used_state_goes_back_to_before_the_first_step(digits: Split, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", *begin(), {})
    network, state = trained(digits, epochs=2)
    load_checkpoint(tmp_path / "checkpoint", network, state)
    assert_same(everything(network, state), everything(*begin()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adamw"])
def test_a_checkpoint_from_a_gpu_comes_back(digits: Split, tmp_path: Path, optimizer: str) -> None:
    config, device = replace(FIT, optimizer=optimizer), torch.device("cuda")
    tensors = {name: value.to(device) for name, value in vars(digits).items() if isinstance(value, torch.Tensor)}
    network = build_network(NETWORK, 0, device)
    state = start_state(network, config, device)
    train(network, replace(digits, **tensors), config, state, 2)
    save_checkpoint(tmp_path / "checkpoint", network, state, ABOUT)
    again = build_network(NETWORK, 1, device)
    again_state = start_state(again, replace(config, seed=1), device)
    load_checkpoint(tmp_path / "checkpoint", again, again_state)
    assert_same(everything(again, again_state), everything(network, state))
    assert len(train(again, replace(digits, **tensors), config, again_state, 1)) == 1
    with pytest.raises(ConfigError, match="'generator'"):
        load_checkpoint(tmp_path / "checkpoint", *begin(config))


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import FIT, asdict, begin, fit, load_checkpoint, read_about, save_checkpoint, small_digits
path, killed_after = Path(sys.argv[1]), int(sys.argv[3])
network, state = begin()
results = []
if path.exists():
    results = read_about(path)["results"]
    load_checkpoint(path, network, state)
for result in fit(network, small_digits(), FIT, state=state):
    results.append({**asdict(result), "seconds": 0, "images_per_second": 0})
    save_checkpoint(path, network, state, {"results": results})
    if result.epoch == killed_after:
        print("saved", flush=True)
        sys.stdin.read()
"""
"""Trains, from the checkpoint if there is one, and saves after every epoch."""


def child(path: Path, killed_after: int) -> "subprocess.Popen[str]":
    """A process of its own for every training: in this one, earlier tests have changed how many threads torch has
    used, and with that the last bits.
    """
    command = [sys.executable, "-c", CHILD, str(path), str(Path(__file__).parent), str(killed_after)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_killed_training_is_taken_up_by_another_process(tmp_path: Path) -> None:
    path, straight = tmp_path / "checkpoint", tmp_path / "straight"
    killed = child(path, killed_after=2)
    try:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "saved\n"
    finally:
        killed.kill()
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    about = read_about(path)
    assert about is not None
    assert [result["epoch"] for result in about["results"]] == [1, 2]

    for training in (child(path, killed_after=0), child(straight, killed_after=0)):
        training.communicate(timeout=120)
        assert training.returncode == 0
    about, straight_about = read_about(path), read_about(straight)
    assert about is not None
    assert [result["epoch"] for result in about["results"]] == list(range(1, FIT.epochs + 1))
    assert about == straight_about
    resumed, uninterrupted = begin(), begin()
    load_checkpoint(path, *resumed)
    load_checkpoint(straight, *uninterrupted)
    assert_same(everything(*resumed), everything(*uninterrupted))


def test_what_was_told_about_it_comes_back_and_nothing_else_is_left(digits: Split, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "checkpoint"
    for slot in (1, 2):
        save_checkpoint(path, *trained(digits), {**ABOUT, "slot": slot})
        assert read_about(path) == {**ABOUT, "slot": slot}
    (path.parent / "any").touch()
    assert len({file.stat().st_mode for file in path.parent.iterdir()}) == 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["any", "checkpoint"]


def test_a_failed_write_leaves_the_earlier_checkpoint(
    digits: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint"
    save_checkpoint(path, *begin(), ABOUT)

    def full(partial: Path, content: bytes) -> None:
        with partial.open("wb") as file:
            file.write(content[:1000])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(path, *trained(digits), {})
    with pytest.raises(TypeError):
        save_checkpoint(path, *trained(digits), {"a path": path})
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]
    assert read_about(path) == ABOUT


# Written in the background


def unexpected(error: Exception) -> None:
    raise AssertionError(error)


class SlowWrite:
    """In the place of what writes a checkpoint: it waits until it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may, self.begun, self.at_once = threading.Semaphore(0), 0, 0
        self._plain = checkpoint._write
        monkeypatch.setattr(checkpoint, "_write", self)

    def __call__(self, *given: Any) -> None:
        self.begun += 1
        self.at_once += 1
        assert self.at_once == 1
        assert self.may.acquire(timeout=60)
        self._plain(*given)
        self.at_once -= 1


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adamw"])
def test_what_is_written_later_is_the_training_as_it_was(
    digits: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    config = replace(FIT, optimizer=optimizer)
    network, state = trained(digits, config)
    before = everything(network, state)
    slow = SlowWrite(monkeypatch)
    writer = CheckpointWriter(tmp_path / "later", unexpected)
    writer.save(network, state, ABOUT)
    train(network, digits, config, state, 2)
    assert read_about(writer.path) is None
    slow.may.release()
    writer.wait()
    assert read_about(writer.path) == ABOUT
    network, state = begin(config)
    load_checkpoint(writer.path, network, state)
    assert_same(everything(network, state), before)


def test_one_checkpoint_is_written_at_a_time_and_the_last_one_stays(
    digits: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowWrite(monkeypatch)
    writer = CheckpointWriter(tmp_path / "checkpoint", unexpected)
    writer.wait()
    for slot in range(3):
        threading.Timer(0.05 * slot, slow.may.release).start()
        writer.save(*trained(digits), {**ABOUT, "slot": slot})
    writer.wait()
    assert slow.begun == 3
    assert read_about(writer.path) == {**ABOUT, "slot": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_each_file_is_handed_over_once_it_is_whole_and_before_the_next_one(digits: Split, tmp_path: Path) -> None:
    seen: list[Any] = []

    def take(path: Path) -> None:
        time.sleep(0.2)
        seen.append(read_about(path))

    writer = CheckpointWriter(tmp_path / "checkpoint", unexpected, take)
    for slot in range(3):
        writer.save(*trained(digits), {**ABOUT, "slot": slot})
    assert len(seen) == 2
    writer.wait()
    assert seen == [{**ABOUT, "slot": slot} for slot in range(3)]
    (tmp_path / "file").touch()
    writer = CheckpointWriter(tmp_path / "file" / "checkpoint", lambda _: None, take)
    writer.save(*begin(), ABOUT)
    writer.wait()
    assert len(seen) == 3


def test_a_checkpoint_that_cannot_be_written_is_told_of_once_and_no_more_are_tried(
    digits: Split, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    errors: list[Exception] = []
    writer = CheckpointWriter(tmp_path / "file" / "checkpoint", errors.append)
    for _ in range(3):
        writer.save(*begin(), ABOUT)
    writer.wait()
    assert [type(error) for error in errors] == [FileExistsError]
    with pytest.raises(TypeError):
        CheckpointWriter(tmp_path / "checkpoint", unexpected).save(*begin(), {"a path": tmp_path})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def absent(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def cut_in_the_tensors(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def too_long(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def text(path: Path) -> None:
    path.write_text("a note\nof two lines\n")


def weights_alone(path: Path) -> None:
    save_file({"generator": torch.Generator().get_state()}, path)


def another_header(header: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        save_file({"generator": torch.zeros(1)}, path, {"checkpoint": header})

    write.__name__ = header[:40]
    return write


DAMAGES = [
    absent,
    a_folder,
    empty,
    cut_in_the_header,
    cut_in_the_tensors,
    too_long,
    text,
    weights_alone,
    another_header("no JSON"),
    another_header("[1]"),
    another_header('{"format": 1, "epoch": "1", "about": {}}'),
    another_header('{"format": 1, "epoch": 1, "about": []}'),
    another_header('{"format": 2, "epoch": 1, "about": {}}'),
    another_header("[" * 100_000),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_means_start_afresh(digits: Split, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "checkpoint"
    save_checkpoint(path, *trained(digits), ABOUT)
    damage(path)
    assert read_about(path) is None
    network, state = begin()
    before = everything(network, state)
    with pytest.raises(ConfigError, match=r"checkpoint cannot be read: .") as error:
        load_checkpoint(path, network, state)
    assert "\n" not in str(error.value)
    assert_same(everything(network, state), before)


@pytest.mark.parametrize(
    ("network_config", "config"),
    [
        (replace(NETWORK, widths=(6, 9)), FIT),
        (replace(NETWORK, widths=(6, 8, 8), pooled=(True, True, False)), FIT),
        (replace(NETWORK, head=()), FIT),
        (NETWORK, replace(FIT, optimizer="adamw")),
        (NETWORK, replace(FIT, momentum=0)),
    ],
    ids=["wider", "deeper", "no head", "another optimizer", "no momentum"],
)
def test_another_training_is_refused_and_left_as_it_was(
    digits: Split, tmp_path: Path, network_config: NetworkConfig, config: FitConfig
) -> None:
    path = tmp_path / "checkpoint"
    save_checkpoint(path, *trained(digits), ABOUT)
    network, state = begin(config, network_config)
    train(network, digits, config, state, 2)
    before = everything(network, state)
    with pytest.raises(ConfigError, match="is of another training") as error:
        load_checkpoint(path, network, state)
    assert "\n" not in str(error.value)
    assert_same(everything(network, state), before)


def test_a_generators_state_that_is_none_is_refused(digits: Split, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    network, state = trained(digits)
    save_checkpoint(path, network, state, ABOUT)
    kept = state.generator.get_state().numpy().tobytes()
    content = path.read_bytes()
    assert content.count(kept) == 1
    path.write_bytes(content.replace(kept, b"\xff" * len(kept)))
    network, state = begin()
    with pytest.raises(ConfigError, match="holds no generator's state"):
        load_checkpoint(path, network, state)
    assert_same(everything(network, state), everything(*begin()))


@given(content=st.binary(max_size=400))
def test_random_bytes_are_no_checkpoint(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(content)
    assert read_about(path) is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "checkpoint"
    save_checkpoint(path, *begin(), ABOUT)
    return path.read_bytes()


@given(data=st.data())
def test_random_damage_to_the_header_never_raises(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    header = 8 + int.from_bytes(whole[:8], "little")
    start = data.draw(st.integers(0, header - 1))
    damage = data.draw(st.binary(max_size=40))
    path.write_bytes(whole[:start] + damage + whole[start + len(damage) :])
    assert isinstance(read_about(path), dict | None)
