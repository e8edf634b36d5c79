"""Learning curves of a study's space: what `benchmarks.searching.replay` compares samplers and pruners on.

    python -m benchmarks.searching.curves --out FILE [--study cpu] [--configurations 200] [--minutes M] [--device cpu]
        [--data-dir DIR]

Trains configurations that fill the space evenly (a scrambled Sobol sequence) at full trial length without pruning, each
from a seed of its own; every fourth one from `REPEATS` further seeds, for the noise. The file's first line says what
was measured on; each further line is a training: its parameters, the validation accuracy after every epoch and the
seconds that each epoch took, validation included. Trainings in the file are not repeated, so an interrupted run
continues. Run it alone on the machine: searches are charged these seconds.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import qmc

from data.paths import data_folder
from data.split import DIVISION_SEED, Split, first_images, load_split
from model.cost import count_cost
from model.device import describe_device, keep_freed_pages, resolve_device
from model.fit import NonFiniteLossError, fit
from model.network import build_network
from search.config.settings import trial_config
from search.config.space import parameter_distributions, relevant, settings_of
from search.config.study_file import StudyConfig, comparable_part, find_study
from search.host.environment import environment
from search.samplers.unit_cube import params_at

REPEATED = 4
"""One configuration in this many is trained from more than one seed."""
REPEATS = 2


@dataclass(frozen=True)
class Training:
    """One training to do.

    Attributes:
        configuration: number of its configuration.
        seed: also its place in the plan.
        params: Optuna parameters.
    """

    configuration: int
    seed: int
    params: dict[str, Any]


def plan(config: StudyConfig, configurations: int) -> list[Training]:
    """Trainings in an order in which every prefix of the list fills the space and has its share of repeats."""
    forms = parameter_distributions(config.space)
    cube = qmc.Sobol(len(forms), seed=0).random_base2((configurations - 1).bit_length())
    trainings: list[Training] = []
    for number in range(configurations):
        params = relevant(config.space, params_at(forms, cube[number].tolist()))
        for _ in range(1 + REPEATS if number % REPEATED == 0 else 1):
            trainings.append(Training(number, len(trainings), params))
    return trainings


def curve(split: Split, config: StudyConfig, training: Training) -> dict[str, Any]:
    """Train one configuration; its curve, which ends early if the training diverges."""
    settings = settings_of(config.space, training.params)
    chosen = trial_config(settings, config.trial.epochs, training.seed, len(split.classes))
    network = build_network(chosen.network, training.seed, split.fit_images.device)
    accuracy: list[float] = []
    seconds: list[float] = []
    try:
        for result in fit(network, split, chosen.fit):
            accuracy.append(round(result.validation_accuracy, 4))
            seconds.append(round(result.seconds, 3))
    except NonFiniteLossError:
        pass
    cost = count_cost(chosen.network)
    return {
        "configuration": training.configuration,
        "seed": training.seed,
        "params": training.params,
        "parameters": cost.parameters,
        "flops": cost.flops,
        "accuracy": accuracy,
        "seconds": seconds,
    }


def header(study: str, config: StudyConfig, split: Split, device: torch.device) -> dict[str, Any]:
    """What makes curves comparable, and what they were measured on."""
    return {
        "study": study,
        **comparable_part(config),
        "images": split.fingerprint,
        "device": describe_device(device),
        "environment": environment(),
    }


def missing(path: Path, conditions: dict[str, Any], trainings: list[Training]) -> Iterator[Training]:
    """Trainings that the file lacks.

    Raises:
        SystemExit: it holds curves measured on something else.
    """
    if not path.exists():
        path.write_text(json.dumps(conditions) + "\n")
    # A line without an end was being written when the process was killed.
    whole = path.read_text().rpartition("\n")[0] + "\n"
    path.write_text(whole)
    first, *rest = map(json.loads, whole.splitlines())
    for key in ("space", "trial", "images", "device"):
        if first[key] != conditions[key]:
            raise SystemExit(f"{path} holds curves with another {key}; give these another --out")
    measured = {row["seed"] for row in rest}
    return (training for training in trainings if training.seed not in measured)


def main() -> None:
    """Train what the file lacks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.searching.curves", description=__doc__)
    parser.add_argument("--study", default="cpu")
    parser.add_argument("--configurations", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    keep_freed_pages()
    began = time.monotonic()
    _, config = find_study(given.study)
    device = resolve_device(given.device)
    split = load_split("cifar10", data_folder(given.data_dir), DIVISION_SEED, device)
    split = split if config.trial.train_images is None else first_images(split, config.trial.train_images)
    trainings = plan(config, given.configurations)
    for training in missing(given.out, header(given.study, config, split, device), trainings):
        if time.monotonic() - began > 60 * given.minutes:
            break
        row = curve(split, config, training)
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        last = row["accuracy"][-1] if row["accuracy"] else 0.0
        print(f"{training.seed + 1} of {len(trainings)}: {100 * last:.2f} %, {sum(row['seconds']):.1f} s", flush=True)


if __name__ == "__main__":
    main()
