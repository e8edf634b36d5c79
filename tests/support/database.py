"""All that a database holds, as text to search, and a password to search for."""

import optuna
import sqlalchemy as sa
from optuna_dashboard._note import get_note_from_system_attrs
from sqlalchemy.engine import URL

NASTY = "p$w/o:r@d #1%"
"""A password with all that could go wrong in a URL, a shell or a .env."""
TRACES = ("w/o:r@d", "w%2Fo%3Ar%40d")
"""What every way to write it down would leave."""


def dump(url: URL) -> str:
    """Every row of every table, and the notes in one piece each."""
    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            tables = sa.inspect(connection).get_table_names()
            rows = [row for name in tables for row in connection.execute(sa.text(f'SELECT * FROM "{name}"'))]
    finally:
        engine.dispose()
    return "\n".join([*map(str, rows), *_notes(url)])


def _notes(url: URL) -> list[str]:
    storage = optuna.storages.RDBStorage(url.render_as_string(hide_password=False))
    try:
        notes = []
        for study in storage.get_all_studies():
            attributes = storage.get_study_system_attrs(study._study_id)
            trials = [trial._trial_id for trial in storage.get_all_trials(study._study_id)]
            notes += [get_note_from_system_attrs(attributes, of)["body"] for of in (None, *trials)]
        return notes
    finally:
        storage.remove_session()
        storage.engine.dispose()
