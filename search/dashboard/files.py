"""The files that optuna-dashboard shows for each trial."""

import io
import json
import uuid
from collections.abc import Callable, Iterator

import optuna
from optuna.trial import FrozenTrial

from search.analysis.outcomes import validation_curve
from search.artifacts.store import Store
from search.attributes import CONFIG, TRACEBACK
from search.dashboard.notes import without_secrets
from search.report.study_figures import learning_curve_png

IDS = uuid.UUID("5f1c2d5e-6a55-4d0e-9a0b-0c9a3a4c7d11")


# Files


def save_trial_files(study: optuna.Study, trial: FrozenTrial, files: Store) -> None:
    """Write the trial's files and list them in the study's attributes.

    Raises:
        OSError: a file cannot be written; no attribute lists it.
    """
    uploaded = set(_own_files(trial))
    for name, mimetype, content in _files(trial):
        if name in uploaded:
            continue
        # The end's time makes the id different if a later study has the same name and number.
        key = f"{study.study_name} {trial._trial_id} {trial.datetime_complete} {name}"
        artifact_id = str(uuid.uuid5(IDS, key))
        files.write(artifact_id, io.BytesIO(content()))
        meta = {"artifact_id": artifact_id, "filename": name, "mimetype": mimetype, "encoding": None}
        study._storage.set_study_system_attr(
            study._study_id, f"dashboard:artifacts:{trial._trial_id}:{artifact_id}", json.dumps(meta)
        )


def _files(trial: FrozenTrial) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Name, type and content of each file for which the trial has data."""
    attributes = trial.user_attrs
    if attributes.get(CONFIG):
        yield "config.json", "application/json", lambda: _text(json.dumps(attributes[CONFIG], indent=2))
    if validation_curve(trial):
        yield "curve.png", "image/png", lambda: learning_curve_png(trial)
    if attributes.get(TRACEBACK):
        yield "failure.log", "text/plain", lambda: _text(str(attributes[TRACEBACK]))


def _text(content: str) -> bytes:
    return without_secrets(content.rstrip("\n") + "\n").encode()


def _own_files(trial: FrozenTrial) -> Iterator[str]:
    """Names of the files that a worker itself uploaded while the trial was running."""
    for key, value in trial.system_attrs.items():
        # A file deleted in the dashboard is null.
        if key.startswith("artifacts:") and (meta := json.loads(value)):
            yield meta["filename"]
