import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.training import recipe
from data.split import load_split


def test_forms_are_settings() -> None:
    assert recipe.settings_in("base") == {}
    assert recipe.settings_in("optimizer=sgd,lr=0.3,shortcut=true") == {
        "optimizer": "sgd",
        "lr": 0.3,
        "shortcut": True,
    }


def test_differences_are_over_seeds_in_common() -> None:
    scores = {("base", 0): 0.70, ("base", 1): 0.72, ("x", 0): 0.71, ("x", 1): 0.75, ("x", 2): 0.10}
    rows = [{"form": form, "seed": seed, "accuracy": [0.2, score]} for (form, seed), score in scores.items()]
    assert recipe.table(rows) == [
        "base: 71.00 % (+0.00 +- 0.00 points, n = 2)",
        "x: 52.00 % (+2.00 +- 1.00 points, n = 3)",
    ]


def test_what_is_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    split = load_split("digits", Path(), 0, torch.device("cpu"))
    monkeypatch.setattr(recipe, "load_split", lambda *_: split)
    monkeypatch.setattr(recipe, "BASE", {"blocks": 1, "convs": 2, "width": 8, "pools": 1})
    words = ["recipe", "base", "optimizer=sgd", "--epochs", "1", "--images", "100", "--out", str(tmp_path / "rows")]
    for seeds, lines in (("1", 2), ("2", 4)):
        monkeypatch.setattr(sys, "argv", [*words, "--seeds", seeds])
        recipe.main()
        rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
        assert len(rows) == lines
    assert {(row["form"], row["seed"]) for row in rows} == {(f, s) for f in ("base", "optimizer=sgd") for s in (0, 1)}
    assert capsys.readouterr().out.count("base: ") == 3
