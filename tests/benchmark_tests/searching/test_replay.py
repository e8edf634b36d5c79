"""The comparison of samplers and pruners on measured curves, here on curves that were made up."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from benchmarks.searching import parallel, replay
from benchmarks.searching.curves import plan
from benchmarks.searching.methods import DEFAULT, RANDOM, methods
from benchmarks.searching.replay_page import comparison, table
from benchmarks.searching.simulated import read_table, run_one, world_of
from search.config.study_file import find_study


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a simulated search sets for its own process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = optuna.logging.get_verbosity()
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def curves(tmp_path: Path) -> Path:
    """Wider is better and slower; a seed moves a score by a point."""
    _, config = find_study("cpu")
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = [{"study": "cpu"}]
    for training in plan(config, 40):
        width, lr = training.params["width"], training.params["lr"]
        end = 0.6 + 0.003 * width - 0.05 * abs(math.log10(lr) + 1) + 0.01 * rng.standard_normal()
        accuracy = [round(end - gap, 4) for gap in (0.3, 0.2, 0.1, 0.0)]
        lines.append({"params": training.params, "accuracy": accuracy, "seconds": [width / 10] * 4})
    lines.append({"params": lines[-1]["params"], "accuracy": [], "seconds": []})  # diverged in its first epoch
    path = tmp_path / "curves.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_comparison_says_how_long_each_took_and_how_far_it_came(curves: Path) -> None:
    world = world_of(read_table(curves))
    assert 0.6 < world.target < 0.8
    searches = {name: [run_one(curves, name, seed, 1, 12) for seed in range(3)] for name in (RANDOM, DEFAULT)}
    result = comparison(world, searches)
    default, random = result["default"], result["others"][RANDOM]
    assert result["best"] * 0.995 == pytest.approx(result["target"])
    assert random["time_to_target_vs_random"] in (None, 1.0)
    assert default["seeds"] == random["seeds"] == 3
    assert random["false_prune_rate"] is None
    assert random["pruned_share"] == 0
    assert random["seconds_a_trial"] > 0
    for row in (default, random):
        medians = [place["median"] for place in row["regret"].values()]
        assert list(row["regret"]) == ["3", "5", "7", "10"]
        assert medians[0] >= 0
        assert all(place["low"] <= place["median"] <= place["high"] for place in row["regret"].values())
    assert json.loads(json.dumps(result)) == result
    lines = table(result).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert any(line.startswith("| **default** |") for line in lines)


def test_every_method_that_is_compared_runs(curves: Path) -> None:
    """Those of other tools if these are installed."""
    world = world_of(read_table(curves))
    for name in methods(world.config, 4):
        one = run_one(curves, name, 0, 2, 4)
        assert one.trials >= 2, name
        assert len(one.regret) == 4


def test_the_command_writes_table_file_and_picture(
    curves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--curves", str(curves), "--seeds", "2", "--trainings", "5", "--only", DEFAULT, "QMC"]
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    monkeypatch.setattr(sys, "argv", ["replay", *words, *files])
    replay.main()
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["default"]["seeds"] == 2
    assert set(result["others"]) == {RANDOM, "QMC"}
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert table(result) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--only", "nothing"), "no method nothing; there are: random, default"),
        (
            ("--curves", "absent.jsonl"),
            "no curves at absent.jsonl: `python -m benchmarks.searching.curves --out absent.jsonl`",
        ),
    ],
)
def test_wrong_words_get_a_line(
    words: tuple[str, ...],
    complaint: str,
    curves: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["replay", "--curves", str(curves), *words])
    with pytest.raises(SystemExit):
        replay.main()
    assert complaint in capsys.readouterr().err


def test_parallel_workers_are_held_against_one(
    curves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "parallel.json", tmp_path / "parallel.png"
    words = ["--methods", RANDOM, "--workers", "4", "1", "--seeds", "3", "--trainings", "12"]
    monkeypatch.setattr(
        sys, "argv", ["parallel", *words, "--curves", str(curves), "--json", str(file), "--plot", str(picture)]
    )
    parallel.main()
    one, four = json.loads(file.read_text())["rows"]
    assert (one["workers"], four["workers"]) == (1, 4)
    assert (one["wall"][0], one["wall"][-1], four["wall"][-1]) == (0.5, 12, parallel.LEAST)
    assert one["accuracy"][-1] >= one["accuracy"][12] > 0
    assert picture.stat().st_size > 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1


def test_speed_up_is_by_wall_time(curves: Path) -> None:
    world = world_of(read_table(curves))
    won = world.last_target
    searches = {
        ("m", 1): [[(1.0, 0.1), (8.0, won)], [(2.0, won)], [(4.0, won)]],
        ("m", 4): [[(0.5, 0.1), (2.0, won)], [(1.0, 0.2)], [(0.5, won)]],
        ("m", 16): [[(0.5, 0.1)], [(1.0, 0.2)], [(0.5, won)]],
    }
    rows = parallel.rows_of(world, searches, 16.0)
    assert [row["wall_to_last_target"] for row in rows] == [4.0, 2.0, None]
    assert [row["speed_up"] for row in rows] == [1.0, 2.0, None]
    assert [row["efficiency"] for row in rows] == [1.0, 0.5, None]
    assert [row["reached"] for row in rows] == pytest.approx([1, 2 / 3, 1 / 3])
    assert rows[1]["accuracy"][0] is None  # not all had a trial by then
    assert rows[1]["accuracy"][-1] == pytest.approx(won, abs=1e-5)
