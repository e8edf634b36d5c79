"""The default search against random search without pruning, on real trainings, for the same wall time.

    python -m benchmarks.searching.duel --out FOLDER [--seconds 300] [--seeds 3] [--fresh 4] [--study cpu]
        [--dataset cifar10] [--device auto] [--data-dir DIR]

For each seed both run in turn, as a user runs them (`python -m search run --timeout`), on the same machine. What each
would hand over, the configuration with the best score, is then trained again from fresh seeds, the same for all: the
best score of a search is optimistic. Each search is a line of FOLDER/searches.jsonl; searches in the file are not
repeated. Run it alone on the machine.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from benchmarks.searching.curves import Training, curve
from data.paths import data_folder
from data.split import DIVISION_SEED, Split, first_images, load_split
from model.device import describe_device, keep_freed_pages, resolve_device
from search.config.study_file import StudyConfig, find_study
from search.host.environment import environment

METHODS = ("default", "random")
FIRST_SEED = 900_001
"""The first fresh seed: no search and no confirmation uses it."""
RANDOM = """
[sampler]
kind = "random"

[pruner]
kind = "none"

[noise]
repeats = 0
"""


def without_knowledge(text: str) -> str:
    """A study file as one of random search: without pruning, repeats and known good configurations."""
    tables = re.split(r"(?m)^(?=\[)", text)
    rest = [table for table in tables if not re.match(r"\[\[?(sampler|pruner|noise|start)\b", table)]
    return "".join(rest) + RANDOM


def searched(method: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One search by the command line; its summary.

    Raises:
        subprocess.CalledProcessError: the search failed.
    """
    name = f"{method}-{seed}"
    file = given.out / f"{method}.toml"
    text = (resources.files("studies") / f"{given.study}.toml").read_text(encoding="utf-8")
    file.write_text(text if method == "default" else without_knowledge(text))
    storage = ("--storage", f"sqlite:///{given.out.resolve() / 'searches.db'}")
    words = [
        "run", "--study", file, "--name", name, "--seed", seed, "--timeout", given.seconds, "--no-finale",
        "--dataset", given.dataset, "--device", given.device, "--data-dir", data_folder(given.data_dir),
        "--out", given.out / name,
    ]  # fmt: skip
    with (given.out / f"{name}.log").open("w") as log:
        subprocess.run([sys.executable, "-m", "search", *map(str, words), *storage], stdout=log, check=True)
    summary: dict[str, Any] = json.loads((given.out / name / "summary.json").read_text())
    return summary


def trained_again(split: Split, config: StudyConfig, params: Mapping[str, Any], fresh: int) -> list[float]:
    """Accuracies of a configuration from fresh seeds; a training that diverged counts as a guess."""
    rows = [curve(split, config, Training(0, FIRST_SEED + index, dict(params))) for index in range(fresh)]
    whole = config.trial.epochs
    return [row["accuracy"][-1] if len(row["accuracy"]) == whole else 1 / len(split.classes) for row in rows]


def row_of(method: str, seed: int, split: Split, config: StudyConfig, given: argparse.Namespace) -> dict[str, Any]:
    """One search and what it found."""
    summary = searched(method, seed, given)
    best = summary["best"]
    return {
        "method": method,
        "seed": seed,
        "seconds": given.seconds,
        "complete": summary["budget"]["complete"],
        "pruned": summary["budget"]["pruned"],
        "score": best["val_accuracy"],
        "params": best["params"],
        "fresh": trained_again(split, config, best["params"], given.fresh),
        "device": describe_device(split.fit_images.device),
        "environment": environment(),
    }


def comparison(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each search in Markdown, and the mean difference between the two methods with its 95 % interval."""
    lines = ["| seed | method | trials | best score | over fresh seeds |", "| --- | --- | --- | --- | --- |"]
    means: dict[tuple[str, int], float] = {}
    for row in sorted(rows, key=lambda row: (row["seed"], row["method"])):
        mean = means[row["method"], row["seed"]] = statistics.mean(row["fresh"])
        trials = f"{row['complete']} to their end, {row['pruned']} stopped"
        again = f"{mean:.2%} (n = {len(row['fresh'])})"
        lines.append(f"| {row['seed']} | {row['method']} | {trials} | {row['score']:.2%} | {again} |")
    ours, theirs = METHODS
    gains = [100 * (mean - means[theirs, seed]) for (method, seed), mean in means.items()
             if method == ours and (theirs, seed) in means]  # fmt: skip
    if len(gains) > 1:
        half = stats.sem(gains) * stats.t.ppf(0.975, len(gains) - 1)
        lines.append(
            f"\n{ours} less {theirs}: {statistics.mean(gains):+.2f} ± {half:.2f} points over {len(gains)} seeds "
            f"(95 % interval; each: {', '.join(f'{gain:+.2f}' for gain in gains)})"
        )
    return lines


def main() -> None:
    """Run the searches that the folder lacks, then compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.searching.duel", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", type=int, default=4)
    parser.add_argument("--study", default="cpu")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args()
    keep_freed_pages()
    torch.set_float32_matmul_precision("high")
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "searches.jsonl"
    file.touch()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    _, config = find_study(given.study)
    split = load_split(given.dataset, data_folder(given.data_dir), DIVISION_SEED, resolve_device(given.device))
    split = split if config.trial.train_images is None else first_images(split, config.trial.train_images)
    for seed in range(given.seeds):
        for method in METHODS if seed % 2 == 0 else METHODS[::-1]:
            if any((row["method"], row["seed"]) == (method, seed) for row in rows):
                continue
            rows.append(row_of(method, seed, split, config, given))
            with file.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
    print("\n".join(comparison(rows)))


if __name__ == "__main__":
    main()
