import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.distributions import FloatDistribution

from benchmarks.searching import curves
from data.split import load_split
from search.config.space import parameter_distributions, settings_of
from search.config.study_file import find_study
from search.samplers.unit_cube import coordinate_of

STUDY = """
[trial]
epochs = 2
train_images = 96

[space]
blocks = { low = 1, high = 2 }
width = { low = 8, high = 16, step = 8 }
lr = { low = 0.01, high = 0.2, log = true }
pools = 1
batch_size = 32
precision = "float32"

[retrain]
epochs = 1

[[start]]
blocks = 1
width = 8
lr = 0.1
"""


@pytest.mark.parametrize("study", ["cpu", "cifar10"])
def test_a_longer_plan_begins_as_the_shorter_one(study: str) -> None:
    config = find_study(study)[1]
    short, long = curves.plan(config, 12), curves.plan(config, 100)
    assert long[: len(short)] == short
    assert [training.seed for training in long] == list(range(150))  # 25 of the 100 have two more
    assert len({json.dumps(training.params) for training in long}) == 100
    for training in long:
        settings_of(config.space, training.params)


def test_a_plan_fills_every_range_evenly() -> None:
    config = find_study("cpu")[1]
    form = parameter_distributions(config.space)["lr"]
    assert isinstance(form, FloatDistribution)
    rates = {training.configuration: training.params["lr"] for training in curves.plan(config, 64)}
    assert sorted(int(64 * coordinate_of(form, rate)) for rate in rates.values()) == list(range(64))


def test_of_a_plan_with_a_width_for_every_block_only_those_that_are_there(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    per_block = "block_widths = { low = 8, high = 16, step = 8 }"
    file.write_text(STUDY.replace("width = { low = 8, high = 16, step = 8 }", per_block).split("[[start]]")[0])
    for training in curves.plan(find_study(str(file))[1], 16):
        widths = [name for name in training.params if name.startswith("block_width_")]
        assert len(widths) == training.params["blocks"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command on digits."""
    monkeypatch.chdir(tmp_path)
    split = load_split("digits", Path(), 0, torch.device("cpu"))
    monkeypatch.setattr(curves, "load_split", lambda *_: split)
    Path("study.toml").write_text(STUDY)

    def call(*words: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["curves", "--study", "study.toml", "--out", "rows", *words])
        curves.main()
        return [json.loads(line) for line in Path("rows").read_text().splitlines()]

    return call


def test_what_was_cut_off_goes_on_and_what_is_there_is_kept(run: Any) -> None:
    first = run("--configurations", "2")
    assert first[0]["trial"] == {"epochs": 2, "train_images": 96}
    assert [row["configuration"] for row in first[1:]] == [0, 0, 0, 1]
    for row in first[1:]:
        assert len(row["accuracy"]) == len(row["seconds"]) == 2
        assert all(0 <= value <= 1 for value in row["accuracy"])
        assert all(value > 0 for value in row["seconds"])
    # Cut off in the middle of a line: that training is lost, and no other.
    text = Path("rows").read_text()
    Path("rows").write_text(text[:-20])
    again = run("--configurations", "3")
    assert again[:4] == first[:4]
    assert [row["configuration"] for row in again[1:]] == [0, 0, 0, 1, 2]
    assert again[4]["accuracy"] == first[4]["accuracy"]


def test_time_is_up(run: Any) -> None:
    assert len(run("--minutes", "0")) == 1


def test_curves_of_another_space_are_not_mixed_in(run: Any) -> None:
    run("--configurations", "1")
    Path("study.toml").write_text(STUDY.replace("high = 0.2", "high = 0.3"))
    with pytest.raises(SystemExit, match="rows holds curves with another space"):
        run("--configurations", "2")
