"""The notes that optuna-dashboard shows for a study and for each trial."""

import re
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard import get_note, save_note
from optuna_dashboard._note import note_ver_key, split_body

from search.analysis.outcomes import number, outcome, seconds, validation_curve
from search.attributes import (
    ATTEMPT,
    CAUSE,
    DEVICE,
    ENVIRONMENT,
    FAULT,
    FLOPS,
    IMAGES_PER_SECOND,
    LATENCY,
    PARAMETERS,
    PEAK_MEMORY,
    WORKER,
    Fault,
)
from search.config.objective import LATENCY_BATCH, score
from search.console.format import duration, percent
from search.study import StudyRecord

YOURS = "\n\n---\n\n*What stands below this line is yours and is kept; what stands above is written anew.*\n"
"""Ends the generated part of the study note."""

FAULTS: Mapping[str, str] = {
    Fault.KILLED: "its process was killed",
    Fault.PREEMPTED: "its process was asked to stop",
    Fault.OUT_OF_MEMORY: "it did not fit into memory",
    Fault.INFEASIBLE: "this configuration cannot be trained here",
    Fault.NON_FINITE_LOSS: "the training diverged: its loss was no longer a finite number",
    Fault.ERROR: "an error",
    Fault.LOST: "its worker was not heard of any more",
}
"""Plain words for the attribute ``fault``."""


# Notes


def study_note(study: optuna.Study, record: StudyRecord, requested: int, storage_shown: str) -> str:
    """A study's note in Markdown: what it searches, and how a worker joins it."""
    dataset, config = record.dataset, record.config
    environment: Mapping[str, object] = study.user_attrs.get(ENVIRONMENT) or {}
    versions = ", ".join(f"{name} {value}" for name, value in environment.items() if name not in ("commit", "platform"))
    images = f"{dataset.name}: {dataset.fit:,} fit and {dataset.validation:,} validation images"
    if dataset.fallback:
        images += ", **taken because CIFAR-10 was not to be had**"
    trains = f"{config.trial.epochs} epochs"
    if config.trial.train_images:
        trains += f" of {config.trial.train_images:,} images"
    single_objective = config.objective == "accuracy"
    pruner = f"pruner {config.pruner.kind}" if single_objective else "no pruning with two objectives"
    rows = {
        "images": f"{images}; fingerprint `{dataset.fingerprint[:12]}`",
        "budget": f"{requested:,} configurations that run to their end or are pruned; each trains {trains}",
        "objective": config.objective,
        "search": f"sampler {config.sampler.kind}, {pruner}, seed {config.seed}",
        "commit": f"`{environment.get('commit', 'unknown')}`",
        "versions": versions or "unknown",
        "begun on": environment.get("platform", "unknown"),
    }
    # The password is not shown, so remove its placeholder, too: the command can then be copied.
    url = without_secrets(storage_shown).replace(":***@", "@")
    where = f"--name {record.name} --storage '{url}'"
    if url.startswith("sqlite"):
        reach = "This storage is a file: workers can join on this machine only."
    else:
        reach = (
            "Any machine that reaches the storage can join. The URL is shown without its password; put that into a "
            "file, and the file's name into `$SEARCH_STORAGE_PASSWORD_FILE`."
        )
    return without_secrets(
        f"# {record.name}\n\n{config.description}\n\n{_table(rows)}\n\n"
        f"## Add a worker\n\n```bash\npython -m search worker {where}\n```\n\n{reach}\n\n"
        f"## See how it stands\n\n```bash\npython -m search status {where}\n```"
    )


def save_study_note(study: optuna.Study, note: str) -> None:
    """Write the study's note; keep what people wrote below its end mark."""
    # Rarely written, so the reads in these two calls do not matter.
    own_text = get_note(study).partition(YOURS)[2]
    save_note(study, note + YOURS + own_text)


def save_trial_note(study: optuna.Study, trial: FrozenTrial) -> None:
    """`optuna_dashboard.save_note` for a trial without a note: reads nothing, and writes the version last."""
    for key, text in split_body(_trial_note(trial), trial._trial_id).items():
        study._storage.set_study_system_attr(study._study_id, key, text)
    study._storage.set_study_system_attr(study._study_id, note_ver_key(trial._trial_id), 1)


def _trial_note(trial: FrozenTrial) -> str:
    attributes = trial.user_attrs
    rows = {
        "configuration": _configuration(attributes, trial.number),
        "worker": attributes.get(WORKER),
        "device": attributes.get(DEVICE),
        "parameters": _count(attributes.get(PARAMETERS)),
        "FLOPs": _count(attributes.get(FLOPS), " for one image"),
        "latency": _latency(attributes.get(LATENCY)),
        "time": duration(seconds(trial)),
        "speed": _count(attributes.get(IMAGES_PER_SECOND), " images/s"),
        "peak memory": _memory(attributes.get(PEAK_MEMORY)),
    }
    return without_secrets(f"{_headline(trial)}\n\n{_table(rows)}")


def _headline(trial: FrozenTrial) -> str:
    """How a trial ended, in a sentence or two."""
    curve = validation_curve(trial)
    accuracy = number(score(trial)) if trial.state == TrialState.COMPLETE else next(reversed(curve.values()), None)
    reached = "no finite accuracy" if accuracy is None else f"{percent(accuracy)} validation accuracy"
    epochs = f" after epoch {max(curve)}" if curve else ""
    match outcome(trial):
        case "complete":
            return f"**Complete**: {reached}{epochs}."
        case "pruned" if _why(trial):
            return f"**Pruned**: {_why(trial)}. This is a result: the configuration is not tried again."
        case "pruned":
            return f"**Pruned**: {reached}{epochs}, too little against the other trials at that epoch."
        case "infeasible":
            return f"**Infeasible**: {_why(trial) or FAULTS[Fault.INFEASIBLE]}. The configuration is not tried again."
        case _:
            return f"**Failed attempt**: {_why(trial) or 'the cause is not known'}. It counts for nothing."


def _why(trial: FrozenTrial) -> str:
    """Fault and cause; empty if a trial has neither."""
    fault, cause = trial.user_attrs.get(FAULT), trial.user_attrs.get(CAUSE)
    words = FAULTS.get(str(fault), str(fault)) if fault else ""
    # As code, so that nothing in it is read as Markdown.
    detail = f"`{clipped(str(cause)).replace('`', chr(39))}`" if cause and cause != fault else ""
    return ": ".join(part for part in (words, detail) if part)


def _configuration(attributes: Mapping[str, Any], trial_number: int) -> str:
    attempt = attributes.get(ATTEMPT)
    return f"slot {attributes.get('slot', trial_number)}" + (f", attempt {attempt}" if attempt is not None else "")


def _count(value: object, unit: str = "") -> str | None:
    finite = number(value)
    return None if finite is None else f"{finite:,.0f}{unit}"


def _latency(value: object) -> str | None:
    finite = number(value)
    return None if finite is None else f"{1000 * finite:.3g} ms for {LATENCY_BATCH} image"


def _memory(value: object) -> str | None:
    finite = number(value)
    return None if finite is None else f"{finite / 1e9:,.2f} GB" if finite >= 1e9 else f"{finite / 1e6:,.0f} MB"


def _table(rows: Mapping[str, object]) -> str:
    """A Markdown table of the rows that have a value."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def clipped(text: str, most: int = 300) -> str:
    """A text as one line of at most ``most`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def without_secrets(text: str) -> str:
    """Replace every recognisable password in a text by asterisks.

    Causes and tracebacks come from any library, including a database's driver.
    """
    text = re.sub(r"(\w://[^\s:/@'\"]*):[^\s@'\"]+@", r"\1:***@", text)
    return re.sub(r"(?i)(\b\w*password['\"]?\s*[=:]\s*)(['\"]?)[^\s'\"&,;)]+", r"\1\2***", text)
