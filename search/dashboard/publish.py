"""What optuna-dashboard shows of a study besides its trials: notes, graphs, and files of every finished trial.

Three properties of the two libraries shape this module:

- Optuna refuses to change a finished trial, so `optuna.artifacts.upload_artifact` can no longer give it a file. The
  dashboard also finds a trial's files in the study's attributes, so they are put there.
- Reading a study's attributes reads all of them: 0.25 s with 2,000 published trials. The dashboard's `save_note` and
  `save_plotly_graph_object` read them in every call, so new parts are written without reading. One user attribute of
  the study, `PUBLISHED`, records what has been published and is cheap to read.
- A crash may come between any two writes. A file's id and a note's keys follow from the trial, so a second attempt
  writes the same things to the same places; a file is written before the attribute that names it, `PUBLISHED` last.

Only one process at a time may publish a study.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from data.errors import first_line
from search.analysis.selection import candidates, selection_rule_of
from search.artifacts.store import Store
from search.attributes import PUBLISHED, RETRAIN
from search.dashboard.files import save_trial_files
from search.dashboard.graphs import digest, finale_figures, save_graphs
from search.dashboard.notes import save_study_note, save_trial_note, study_note
from search.report.study_figures import accuracy_cost_figure, budget_figure, device_hours_figure
from search.results import Confirmation, RetrainResult, as_json, optional_from_json
from search.study import StudyRecord

FORMAT = 1
"""Increase this when notes, files or graphs look different, so that they are written again."""

STAMP_EVERY = 50
"""Trials between two records of a long publication's progress, so that a crash does not repeat all of it."""


def publish(
    study: optuna.Study,
    record: StudyRecord,
    requested: int,
    waiting: int,
    files: Store,
    storage_shown: str,
    confirmation: Confirmation | None = None,
) -> list[str]:
    """Update the study's notes, graphs and files in the dashboard; write only what is new.

    Args:
        study: the study; no other process may publish it at this time.
        record: its stored definition and images.
        requested: configurations asked for.
        waiting: configurations in the queue.
        files: the store for the trials' files.
        storage_shown: the storage's URL without a password.
        confirmation: as `search.finale.confirm` sums it up; None if there is none.

    Returns:
        warnings, one line each, about files that could not be written; the next call tries them again.
    """
    trials = study.get_trials(deepcopy=False)
    finished = [trial for trial in trials if trial.state.is_finished()]
    running = sum(trial.state == TrialState.RUNNING for trial in trials)
    attributes = study.user_attrs
    published = _published(attributes.get(PUBLISHED))
    before = asdict(published)

    note = study_note(study, record, requested, storage_shown)
    if published.note != digest(note):
        save_study_note(study, note)
        published.note = digest(note)

    figures: dict[str, go.Figure] = {}
    chosen = _chosen(study, trials)
    drawn_from = [requested, waiting, running, chosen, len(finished)]
    if published.drawn_from != drawn_from:
        figures["search-budget"] = budget_figure(trials, requested, waiting)
        if published.drawn_from is None or published.drawn_from[-2:] != drawn_from[-2:]:
            figures["search-device-hours"] = device_hours_figure(trials)
            figures["search-accuracy-cost"] = accuracy_cost_figure(trials, chosen)
    retrain = attributes.get(RETRAIN)
    finale = {"confirmation": confirmation and as_json(confirmation), "retrain": retrain}
    finale_from = digest(json.dumps(finale, sort_keys=True)) if any(finale.values()) else ""
    if published.finale_from != finale_from:
        figures |= finale_figures(confirmation, optional_from_json(RetrainResult, retrain))
    if figures:
        save_graphs(study, figures, published.graphs, lambda: _store(study, published))
    published.drawn_from, published.finale_from = drawn_from, finale_from

    warnings = _publish_trials(study, finished, files, published)
    if asdict(published) != before:
        _store(study, published)
    return warnings


def _chosen(study: optuna.Study, trials: Sequence[FrozenTrial]) -> int | None:
    """The trial to mark among accuracies and costs; None if accuracy alone chooses."""
    rule = selection_rule_of(study)
    if rule.rule == "accuracy":
        return None
    return next((trial.number for trial in candidates(trials, rule, 1)), None)


@dataclass
class Published:
    """What has been published of a study; updated during a publication.

    Attributes:
        format: the `FORMAT` of the published parts.
        note: digest of the study's note.
        drawn_from: what the search's graphs depend on, since finished trials do not change; None before the first.
        finale_from: digest of what the finale's graphs depend on; earlier versions stored none.
        graphs: digests of the pieces that each graph is stored in.
        trials: the trials with a note, as first and last numbers of unbroken runs.
        owed: those of them whose files could not be written, in the same form.
    """

    format: int = FORMAT
    note: str = ""
    drawn_from: list[int | None] | None = None
    finale_from: str = ""
    graphs: dict[str, list[str]] = field(default_factory=dict)
    trials: list[list[int]] = field(default_factory=list)
    owed: list[list[int]] = field(default_factory=list)


def _published(stored: dict[str, Any] | None) -> Published:
    """The study's attribute `PUBLISHED` as it is stored; empty if `FORMAT` has changed since."""
    return Published(**stored) if stored is not None and stored["format"] == FORMAT else Published()


def _store(study: optuna.Study, published: Published) -> None:
    study.set_user_attr(PUBLISHED, asdict(published))


def _publish_trials(
    study: optuna.Study, finished: Sequence[FrozenTrial], files: Store, published: Published
) -> list[str]:
    noted, owed = _numbers(published.trials), _numbers(published.owed)
    new = [trial for trial in finished if trial.number not in noted]
    late = [trial for trial in finished if trial.number in owed]
    warnings: list[str] = []
    for count, trial in enumerate(late + new, start=1):
        if not warnings:
            try:
                save_trial_files(study, trial, files)
                owed.discard(trial.number)
            except OSError as error:
                reason = error.strerror or first_line(error)
                warnings.append(f"trials' files cannot be written to {files.text}: {reason}; tried again later")
        if warnings:
            owed.add(trial.number)
        if trial.number not in noted:
            save_trial_note(study, trial)
            noted.add(trial.number)
        if count % STAMP_EVERY == 0:
            published.trials, published.owed = _runs(noted), _runs(owed)
            _store(study, published)
    published.trials, published.owed = _runs(noted), _runs(owed)
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
