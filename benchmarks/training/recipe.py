"""What a change of a network or of its training is worth: validation accuracy, every form from the same seeds, in turn.

    python -m benchmarks.training.recipe base optimizer=sgd,lr=0.3 shortcut=true [--seeds 5] [--epochs 4]
        [--images 7500] [--device cpu] [--data-dir DIR] --out FILE

A form is a list of settings as a study's ``[space]`` has them (`search.config.settings.TrialSettings`), over those of
`BASE`. Every training is a line of the file; trainings in the file are not repeated.
"""

import argparse
import json
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.paths import data_folder
from data.split import Split, first_images, load_split
from model.device import keep_freed_pages, resolve_device
from model.fit import NonFiniteLossError, fit
from model.network import build_network
from search.config.settings import settings_from, trial_config

BASE = {"blocks": 4, "convs": 2, "width": 32, "width_growth": 2.0, "max_width": 128, "activation": "gelu", "lr": 0.1}


def settings_in(form: str) -> dict[str, Any]:
    """``a=1,b=true`` as settings; ``base`` changes nothing. Words need no quotation marks."""
    changes: dict[str, Any] = {}
    for part in form.split(",") if form != "base" else ():
        name, _, value = part.partition("=")
        try:
            changes[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[name] = value
    return changes


def training(split: Split, settings: Mapping[str, Any], epochs: int, seed: int) -> dict[str, Any]:
    """One training's validation accuracy after every epoch, its last loss and its images a second."""
    config = trial_config(settings_from(settings), epochs, seed, len(split.classes))
    network = build_network(config.network, seed, split.fit_images.device)
    try:
        results = list(fit(network, split, config.fit))
    except NonFiniteLossError:
        return {"accuracy": [1 / len(split.classes)], "train_loss": None, "images_per_second": None}
    return {
        "accuracy": [round(result.validation_accuracy, 4) for result in results],
        "train_loss": round(results[-1].train_loss, 4),
        "images_per_second": round(statistics.median(result.images_per_second for result in results), 1),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every form: mean accuracy, and its difference from the first form's over the seeds in common."""
    forms: dict[str, dict[int, float]] = {}
    for row in rows:
        forms.setdefault(row["form"], {})[row["seed"]] = 100 * row["accuracy"][-1]
    first = next(iter(forms.values()))
    lines = []
    for form, scores in forms.items():
        pairs = [score - first[seed] for seed, score in scores.items() if seed in first]
        error = f" +- {statistics.stdev(pairs) / len(pairs) ** 0.5:.2f}" if len(pairs) > 1 else ""
        difference = f"{statistics.mean(pairs):+.2f}{error} points" if pairs else "no seed in common"
        lines.append(f"{form}: {statistics.mean(scores.values()):.2f} % ({difference}, n = {len(scores)})")
    return lines


def main() -> None:
    """Train what the file lacks, seed by seed; print the table after every seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.recipe", description=__doc__)
    parser.add_argument("forms", nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    keep_freed_pages()
    split = load_split("cifar10", data_folder(given.data_dir), 0, resolve_device(given.device))
    split = split if given.images is None else first_images(split, given.images)
    what = {"epochs": given.epochs, "images": len(split.fit_labels)}
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    rows = [row for row in map(json.loads, lines) if what.items() <= row.items()]
    for seed in range(given.seeds):
        for form in given.forms:
            if any((row["form"], row["seed"]) == (form, seed) for row in rows):
                continue
            row = {"form": form, "seed": seed, **what}
            row |= training(split, BASE | settings_in(form), given.epochs, seed)
            rows.append(row)
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(f"{seed + 1} of {given.seeds} seeds", *table(rows), sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
