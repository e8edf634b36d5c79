"""What optuna-dashboard shows of a study beside its trials: notes, graphs, and files of every finished trial.

Three properties of the two libraries shape this module:

- Optuna refuses to change a finished trial, so `optuna.artifacts.upload_artifact` cannot give it a file any more. The
  dashboard also finds a trial's files among the study's attributes; there they are put.
- Reading a study's attributes reads all of them: 0.25 s with 2,000 published trials. The dashboard's `save_note` and
  `save_plotly_graph_object` read them with every call, so what is new is written without reading. What has been
  published stands in one user attribute of the study, `PUBLISHED`, which is cheap to read.
- A crash may come between any two writes. A file's id and a note's keys follow from the trial, so a repetition writes
  the same things to the same places; a file comes before the attribute that names it, and `PUBLISHED` comes last.

One process at a time may publish a study.
"""

import hashlib
import io
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard import get_note, save_note, save_plotly_graph_object
from optuna_dashboard._custom_plot_data import SYSTEM_ATTR_PLOT_DATA, split_plot_data
from optuna_dashboard._note import note_ver_key, split_body

from search.artifacts import Store
from search.choice import aim_of, candidates
from search.errors import first_line
from search.figures import (
    accuracy_cost_figure,
    budget_figure,
    confirmation_figure,
    device_hours_figure,
    learning_curve_png,
    retrain_accuracy_figure,
    retrain_loss_figure,
)
from search.objective import LATENCY_BATCH, score
from search.outcomes import number, outcome, seconds, validation_curve
from search.study import StudyRecord
from search.view import duration, percent

PUBLISHED = "published"
"""User attribute of a study: what of it has been published (`_empty`)."""

FORMAT = 1
"""Counts up when notes, files or graphs change their looks, so that they are written anew."""

YOURS = "\n\n---\n\n*What stands below this line is yours and is kept; what stands above is written anew.*\n"
"""Ends the study note's written part."""

STAMP_EVERY = 50
"""Trials after which a long publication is noted down, so that a crash does not repeat all of it."""

IDS = uuid.UUID("5f1c2d5e-6a55-4d0e-9a0b-0c9a3a4c7d11")

FAULTS: Mapping[str, str] = {
    "killed": "its process was killed",
    "preempted": "its process was asked to stop",
    "out of memory": "it did not fit into memory",
    "infeasible": "this configuration cannot be trained here",
    "non-finite loss": "the training diverged: its loss was no longer a finite number",
    "error": "an error",
    "lost": "its worker was not heard of any more",
}
"""Plain words for the attribute ``fault``."""


def publish(
    study: optuna.Study,
    record: StudyRecord,
    requested: int,
    waiting: int,
    files: Store,
    storage_shown: str,
    confirmation: Mapping[str, Any] | None = None,
) -> list[str]:
    """Bring the study's notes, graphs and files in the dashboard up to date; writes only what is new.

    Args:
        study: the study, which nobody else publishes at this time.
        record: what is stored of its definition and its images.
        requested: configurations asked for.
        waiting: configurations in the queue.
        files: where the trials' files go.
        storage_shown: the storage's URL without a password.
        confirmation: summed up by `search.confirm`; None where there is none.

    Returns:
        warnings, a line each, where files could not be written; they are tried again with the next call.
    """
    trials = study.get_trials(deepcopy=False)
    finished = [trial for trial in trials if trial.state.is_finished()]
    running = sum(trial.state == TrialState.RUNNING for trial in trials)
    attributes = study.user_attrs
    done = attributes.get(PUBLISHED)
    if done is None or done["format"] != FORMAT:
        done = _empty()
    before = json.dumps(done)

    note = _study_note(study, record, requested, storage_shown)
    if done["note"] != _digest(note):
        _save_study_note(study, note)
        done["note"] = _digest(note)

    figures: dict[str, go.Figure] = {}
    chosen = _chosen(study, trials)
    drawn_from = [requested, waiting, running, chosen, len(finished)]
    if done["drawn_from"] != drawn_from:
        figures["search-budget"] = budget_figure(trials, requested, waiting)
        if done["drawn_from"] is None or done["drawn_from"][-2:] != drawn_from[-2:]:
            figures["search-device-hours"] = device_hours_figure(trials)
            figures["search-accuracy-cost"] = accuracy_cost_figure(trials, chosen)
    finale = {"confirmation": confirmation, "retrain": attributes.get("retrain")}
    finale_from = _digest(json.dumps(finale, sort_keys=True)) if any(finale.values()) else ""
    if done.get("finale_from", "") != finale_from:
        figures |= _finale_figures(**finale)
    if figures:
        _save_graphs(study, figures, done)
    done |= {"drawn_from": drawn_from, "finale_from": finale_from}

    warnings = _publish_trials(study, finished, files, done)
    if json.dumps(done) != before:
        study.set_user_attr(PUBLISHED, done)
    return warnings


def _chosen(study: optuna.Study, trials: Sequence[FrozenTrial]) -> int | None:
    """The trial to point at among accuracies and costs: none where accuracy alone chooses."""
    wanted = aim_of(study)
    if wanted.rule == "accuracy":
        return None
    return next((trial.number for trial in candidates(trials, wanted, 1)), None)


def _finale_figures(confirmation: Mapping[str, Any] | None, retrain: Mapping[str, Any] | None) -> dict[str, go.Figure]:
    """Graphs of the finale that have something to show."""
    figures = {}
    if confirmation:
        figures["search-confirmation"] = confirmation_figure(confirmation)
    if retrain:
        figures["search-retrain-accuracy"] = retrain_accuracy_figure(retrain)
        figures["search-retrain-loss"] = retrain_loss_figure(retrain)
    return {name: figure for name, figure in figures.items() if figure.data and any(trace.x for trace in figure.data)}


def _empty() -> dict[str, Any]:
    """What `PUBLISHED` says of a study of which nothing has been published.

    ``trials``: those that have a note; ``owed``: those among them whose files could not be written; both as first and
    last numbers of unbroken runs. ``drawn_from``: what the graphs depend on, as finished trials do not change;
    ``finale_from``: a digest of what those of the finale depend on, absent where an earlier version published.
    ``graphs``: digests of the pieces that each graph is stored in.
    """
    return {"format": FORMAT, "note": "", "drawn_from": None, "finale_from": "", "graphs": {}, "trials": [], "owed": []}


def _publish_trials(
    study: optuna.Study, finished: Sequence[FrozenTrial], files: Store, done: dict[str, Any]
) -> list[str]:
    noted, owed = _numbers(done["trials"]), _numbers(done["owed"])
    new = [trial for trial in finished if trial.number not in noted]
    late = [trial for trial in finished if trial.number in owed]
    warnings: list[str] = []
    for count, trial in enumerate(late + new, start=1):
        if not warnings:
            try:
                _save_files(study, trial, files)
                owed.discard(trial.number)
            except OSError as error:
                reason = error.strerror or first_line(error)
                warnings.append(f"trials' files cannot be written to {files.text}: {reason}; tried again later")
        if warnings:
            owed.add(trial.number)
        if trial.number not in noted:
            _save_trial_note(study, trial)
            noted.add(trial.number)
        if count % STAMP_EVERY == 0:
            done |= {"trials": _runs(noted), "owed": _runs(owed)}
            study.set_user_attr(PUBLISHED, done)
    done |= {"trials": _runs(noted), "owed": _runs(owed)}
    return warnings


def _numbers(runs: Sequence[Sequence[int]]) -> set[int]:
    return {value for first, last in runs for value in range(first, last + 1)}


def _runs(numbers: set[int]) -> list[list[int]]:
    """First and last number of each unbroken run: ``{1, 2, 3, 7}`` is ``[[1, 3], [7, 7]]``."""
    runs: list[list[int]] = []
    for value in sorted(numbers):
        if runs and runs[-1][1] == value - 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return runs


# Notes


def _study_note(study: optuna.Study, record: StudyRecord, requested: int, storage_shown: str) -> str:
    dataset, config = record.dataset, record.config
    environment: Mapping[str, object] = study.user_attrs.get("environment") or {}
    versions = ", ".join(f"{name} {value}" for name, value in environment.items() if name not in ("commit", "platform"))
    images = f"{dataset.name}: {dataset.fit:,} fit and {dataset.validation:,} validation images"
    if dataset.fallback:
        images += ", **taken because CIFAR-10 was not to be had**"
    trains = f"{config.trial.epochs} epochs"
    if config.trial.train_images:
        trains += f" of {config.trial.train_images:,} images"
    one = config.objective == "accuracy"
    pruner = f"pruner {config.pruner.kind}" if one else "no pruning with two objectives"
    rows = {
        "images": f"{images}; fingerprint `{dataset.fingerprint[:12]}`",
        "budget": f"{requested:,} configurations that run to their end or are pruned; each trains {trains}",
        "objective": config.objective,
        "search": f"sampler {config.sampler.kind}, {pruner}, seed {config.seed}",
        "commit": f"`{environment.get('commit', 'unknown')}`",
        "versions": versions or "unknown",
        "begun on": environment.get("platform", "unknown"),
    }
    # Nobody can copy a password that is not shown: the URL goes without its place, too.
    url = _hidden(storage_shown).replace(":***@", "@")
    where = f"--name {record.name} --storage '{url}'"
    if url.startswith("sqlite"):
        reach = "This storage is a file: workers can join on this machine only."
    else:
        reach = (
            "Any machine that reaches the storage can join. The URL is shown without its password; put that into a "
            "file, and the file's name into `$SEARCH_STORAGE_PASSWORD_FILE`."
        )
    return _hidden(
        f"# {record.name}\n\n{config.description}\n\n{_table(rows)}\n\n"
        f"## Add a worker\n\n```bash\npython -m search worker {where}\n```\n\n{reach}\n\n"
        f"## See how it stands\n\n```bash\npython -m search status {where}\n```"
    )


def _save_study_note(study: optuna.Study, note: str) -> None:
    # Rarely written, so the reading in these two does not matter.
    kept = get_note(study).partition(YOURS)[2]
    save_note(study, note + YOURS + kept)


def _save_trial_note(study: optuna.Study, trial: FrozenTrial) -> None:
    """`optuna_dashboard.save_note` for a trial that has none yet, without reading; whole before it counts."""
    for key, text in split_body(_trial_note(trial), trial._trial_id).items():
        study._storage.set_study_system_attr(study._study_id, key, text)
    study._storage.set_study_system_attr(study._study_id, note_ver_key(trial._trial_id), 1)


def _trial_note(trial: FrozenTrial) -> str:
    attributes = trial.user_attrs
    rows = {
        "configuration": _configuration(attributes, trial.number),
        "worker": attributes.get("worker"),
        "device": attributes.get("device"),
        "parameters": _count(attributes.get("parameters")),
        "FLOPs": _count(attributes.get("flops"), " for one image"),
        "latency": _latency(attributes.get("latency")),
        "time": duration(seconds(trial)),
        "speed": _count(attributes.get("images_per_second"), " images/s"),
        "peak memory": _memory(attributes.get("peak_memory_bytes")),
    }
    return _hidden(f"{_headline(trial)}\n\n{_table(rows)}")


def _headline(trial: FrozenTrial) -> str:
    """What became of a trial, in a sentence or two."""
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
            return f"**Infeasible**: {_why(trial) or FAULTS['infeasible']}. The configuration is not tried again."
        case _:
            return f"**Failed attempt**: {_why(trial) or 'the cause is not known'}. It counts for nothing."


def _why(trial: FrozenTrial) -> str:
    """Fault and cause; empty where a trial has neither."""
    fault, cause = trial.user_attrs.get("fault"), trial.user_attrs.get("cause")
    words = FAULTS.get(str(fault), str(fault)) if fault else ""
    # As code, so that nothing in it is taken for Markdown.
    detail = f"`{_clipped(str(cause)).replace('`', chr(39))}`" if cause and cause != fault else ""
    return ": ".join(part for part in (words, detail) if part)


def _configuration(attributes: Mapping[str, Any], trial_number: int) -> str:
    attempt = attributes.get("attempt")
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
    """A Markdown table of what is there."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _clipped(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _hidden(text: str) -> str:
    """The text with every password in it that is recognisable as one replaced by asterisks.

    Causes and tracebacks come from anywhere, also from a database's driver.
    """
    text = re.sub(r"(\w://[^\s:/@'\"]*):[^\s@'\"]+@", r"\1:***@", text)
    return re.sub(r"(?i)(\b\w*password['\"]?\s*[=:]\s*)(['\"]?)[^\s'\"&,;)]+", r"\1\2***", text)


# Files


def _save_files(study: optuna.Study, trial: FrozenTrial, files: Store) -> None:
    """Write the trial's files and name them in the study's attributes.

    Raises:
        OSError: a file cannot be written; no attribute names it.
    """
    there = set(_own_files(trial))
    for name, mimetype, content in _files(trial):
        if name in there:
            continue
        # The end's time makes the id another one where a study of the same name and number comes later.
        key = f"{study.study_name} {trial._trial_id} {trial.datetime_complete} {name}"
        artifact_id = str(uuid.uuid5(IDS, key))
        files.write(artifact_id, io.BytesIO(content()))
        meta = {"artifact_id": artifact_id, "filename": name, "mimetype": mimetype, "encoding": None}
        study._storage.set_study_system_attr(
            study._study_id, f"dashboard:artifacts:{trial._trial_id}:{artifact_id}", json.dumps(meta)
        )


def _files(trial: FrozenTrial) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Name, type and content of each file that a trial has something for."""
    attributes = trial.user_attrs
    if attributes.get("config"):
        yield "config.json", "application/json", lambda: _text(json.dumps(attributes["config"], indent=2))
    if validation_curve(trial):
        yield "curve.png", "image/png", lambda: learning_curve_png(trial)
    if attributes.get("traceback"):
        yield "failure.log", "text/plain", lambda: _text(str(attributes["traceback"]))


def _text(content: str) -> bytes:
    return _hidden(content.rstrip("\n") + "\n").encode()


def _own_files(trial: FrozenTrial) -> Iterator[str]:
    """Names of the files that a worker uploaded itself while the trial was running."""
    for key, value in trial.system_attrs.items():
        # One that was deleted in the dashboard is null.
        if key.startswith("artifacts:") and (meta := json.loads(value)):
            yield meta["filename"]


# Graphs


def _save_graphs(study: optuna.Study, figures: Mapping[str, go.Figure], done: dict[str, Any]) -> None:
    """Store graphs piece by piece, only those pieces that have changed."""
    pieces = {name: split_plot_data(figure.to_json(), _graph_key(name)) for name, figure in figures.items()}
    changed = [name for name in figures if done["graphs"].get(name) != _digests(pieces[name])]
    if not changed:
        return
    known = {name: done["graphs"].pop(name, None) for name in changed}
    # While pieces are exchanged, nothing is known of them: after a crash they are all written.
    study.set_user_attr(PUBLISHED, done)
    for name in changed:
        _save_graph(study, name, figures[name], pieces[name], known[name])
        done["graphs"][name] = _digests(pieces[name])


def _save_graph(
    study: optuna.Study, name: str, figure: go.Figure, pieces: Mapping[str, str], known: list[str] | None
) -> None:
    if known is None:
        save_plotly_graph_object(study, figure, graph_object_id=name)
        return
    for index, (key, piece) in enumerate(pieces.items()):
        if index >= len(known) or known[index] != _digest(piece):
            study._storage.set_study_system_attr(study._study_id, key, piece)
    for index in range(len(pieces), len(known)):
        # As the dashboard does: an attribute cannot be deleted.
        study._storage.set_study_system_attr(study._study_id, f"{_graph_key(name)}{index}", "")


def _graph_key(name: str) -> str:
    return f"{SYSTEM_ATTR_PLOT_DATA}{name}:"


def _digests(pieces: Mapping[str, str]) -> list[str]:
    return [_digest(piece) for piece in pieces.values()]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
