"""The report's sections on comparison and origin: known networks, and everything needed to repeat the study."""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from optuna.trial import FrozenTrial

from data.split import DIVISION_SEED
from search.analysis.outcomes import validation_curve
from search.attributes import DEVICE, PARAMETERS
from search.config.objective import score
from search.config.study_file import as_toml
from search.console.format import percent
from search.report.data import ReportData
from search.report.document import Code, ContentBlock, Text, table
from search.report.words import NONE, counted, whole_cell

PUBLISHED = (("seed-basic", 0.6410, 12_728, 35), ("seed-advanced", 0.8851, 48_096_818, 35))
"""The public solution's networks for CIFAR-10: name, test accuracy, parameters, epochs."""


def baselines(data: ReportData) -> Iterator[ContentBlock]:
    """Published figures, this study's own, and its known good starts, in one table."""
    rows: list[tuple[str, ...]] = []
    if data.record.dataset.name == "cifar10":
        rows += [
            (
                f"{name}, public solution", percent(accuracy), "test images", f"{size:,}", str(epochs),
                "published, chosen on the test set",
            )
            for name, accuracy, size, epochs in PUBLISHED
        ]  # fmt: skip
    else:
        yield Text(
            "The public solution's figures are CIFAR-10's; they say nothing about these images and are left out."
        )
    done = data.retrain
    strong = []
    if done:
        strong.append(len(rows))
        seeds = done.test_accuracy.n
        what = f"this study, retrained: {'one seed' if seeds == 1 else f'mean of {seeds} seeds'}"
        how = "by search, on validation images alone"
        cost = (whole_cell(done.parameters), str(done.epochs))
        rows.append((what, percent(done.test_accuracy.mean), "test images", *cost, how))
    if data.complete:
        best = data.complete[0]
        rows.append(
            _trial_row(f"this study's best trial ({best.number})", best, "the highest of all trials: it flatters")
        )
    if data.chosen is not None and data.chosen is not data.complete[0]:
        chosen = data.chosen
        rows.append(_trial_row(f"this study's choice, trial {chosen.number}", chosen, data.aim.text))
    for trial in data.starts:
        preset = trial.params.get("preset", "none")
        start = f"known good start {trial.user_attrs.get('start', 0) + 1}"
        rows.append(
            _trial_row(f"{start if preset == 'none' else preset}, trial {trial.number}", trial, "given, not chosen")
        )
    if rows:
        head = ("what", "accuracy", "measured on", "parameters", "epochs", "how it was chosen")
        yield table("Known networks and this study's", head, rows, strong)
    yield Text(
        "Validation accuracies are those of trials, which train for fewer epochs, and often on fewer images, than a "
        "retrain: compare like with like."
    )


def _trial_row(what: str, trial: FrozenTrial, chosen: str) -> tuple[str, ...]:
    epochs = max(validation_curve(trial), default=None)
    size = whole_cell(trial.user_attrs.get(PARAMETERS))
    return (
        what,
        percent(score(trial) or 0.0),
        "validation images",
        size,
        NONE if epochs is None else str(epochs),
        chosen,
    )


def repetition(data: ReportData) -> Iterator[ContentBlock]:
    """Definition, command, seeds, versions and hardware."""
    record, summary, done = data.record, data.summary, data.retrain
    environment = summary.environment
    file = f"{record.name}.toml"
    words = ["python", "-m", "search", "run", "--study", file, "--name", f"{record.name}-again"]
    yield Text(f"Install commit {environment.get('commit', 'unknown')}, save the definition below as {file}, and run:")
    limits = [word for cost, most in data.aim.limits.most.items() for word in (f"--max-{cost}", f"{most}")]
    yield Code("Command", shlex.join([*words, "--dataset", record.dataset.name, *limits]), "bash")
    yield Code(file, as_toml(record.config), "toml")
    devices = Counter(str(t.user_attrs[DEVICE]) for t in data.trials if t.user_attrs.get(DEVICE))
    images = f"{record.dataset.fit:,} fit and {record.dataset.validation:,} validation images"
    rows = [
        ("study", f"{record.name} in {data.storage}"),
        ("images", f"{record.dataset.name}: {images}"),
        ("fingerprint of images and division", record.dataset.fingerprint),
        ("hash of space and trial length", summary.space_hash),
        ("seed of the study", str(record.config.seed)),
        ("seed of the division", str(DIVISION_SEED)),
        ("seeds of the confirmation", _listed(data.confirmation.seeds if data.confirmation else ())),
        ("seeds of the watched trainings", _listed(run.seed for run in done.watched) if done else NONE),
        ("seeds of the final trainings", _listed(run.seed for run in done.runs) if done else NONE),
        ("reads of the test images", "; ".join(_read(read) for read in data.reads) or "none"),
        *((name, str(value)) for name, value in environment.items()),
        (
            "devices of trials",
            "; ".join(f"{name} ({counted(n, 'trial')})" for name, n in devices.most_common()) or NONE,
        ),
        ("device of the retrain", str((done and done.device) or NONE)),
    ]
    yield table("Where the numbers come from", ("what", "value"), rows)


def _listed(seeds: Any) -> str:
    return ", ".join(str(seed) for seed in seeds or ()) or NONE


def _read(read: Mapping[str, Any]) -> str:
    return f"{read.get('when')} by {read.get('by')}, trial {read.get('trial')}, seed {read.get('seed')}"
