import json
import sys
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from benchmarks.searching import duel
from search.config.study_file import comparable_part, parse_study


@pytest.mark.parametrize("name", ["cpu", "cifar10"])
def test_random_search_has_the_same_space_and_nothing_else_to_go_by(name: str) -> None:
    text = (resources.files("studies") / f"{name}.toml").read_text()
    ours, theirs = (parse_study(tomllib.loads(one), "file") for one in (text, duel.without_knowledge(text)))
    assert comparable_part(ours) == comparable_part(theirs)
    assert (theirs.sampler.kind, theirs.pruner.kind, theirs.noise.repeats, theirs.start) == ("random", "none", 0, ())


def row(method: str, seed: int, *fresh: float) -> dict[str, Any]:
    return {"method": method, "seed": seed, "complete": 9, "pruned": 1, "score": 0.8, "fresh": list(fresh)}


def test_the_difference_is_told_over_seeds_that_both_have() -> None:
    rows = [row("default", 0, 0.8, 0.82), row("random", 0, 0.79, 0.79), row("default", 1, 0.8), row("random", 1, 0.77),
            row("default", 2, 0.9)]  # fmt: skip
    lines = duel.comparison(rows)
    assert lines[2] == "| 0 | default | 9 to their end, 1 stopped | 80.00% | 81.00% (n = 2) |"
    assert len(lines) == 8
    assert "default less random: +2.50 ± 6.35 points over 2 seeds (95 % interval; each: +2.00, +3.00)" in lines[-1]
    assert len(duel.comparison(rows[:2])) == 4


@pytest.mark.slow
def test_both_search_for_the_same_time_and_are_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEARCH_DATA_DIR", str(tmp_path))
    words = "--out duel --seconds 25 --seeds 1 --fresh 1 --device cpu --dataset digits"
    monkeypatch.setattr(sys, "argv", ["duel", *words.split()])
    duel.main()
    rows = [json.loads(line) for line in Path("duel/searches.jsonl").read_text().splitlines()]
    assert [one["method"] for one in rows] == ["default", "random"]
    assert all(one["complete"] and 0 < one["fresh"][0] <= 1 for one in rows)
    assert rows[1]["pruned"] == 0
    before = Path("duel/searches.jsonl").read_text()
    duel.main()  # everything is there
    assert Path("duel/searches.jsonl").read_text() == before
    assert capsys.readouterr().out.count("| 0 | random |") == 2
