import errno
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import pytest
import sqlalchemy as sa
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy.engine import URL

from search.artifacts.store import Folder
from search.config.study_file import StudyConfig, find_study
from search.dashboard.notes import YOURS
from search.dashboard.publish import publish
from search.results import as_json
from search.storage.connect import storage_opened
from search.storage.rdb import RetryingStorage
from search.storage.url import without_password
from search.study import DatasetRecord, StudyRecord, create
from support import finale

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
GRAPHS = {"search-budget", "search-device-hours", "search-accuracy-cost"}
SHOWN = "postgresql+psycopg://ann:***@example.org:5432/studies"


def record(**changes: Any) -> StudyRecord:
    config = StudyConfig.model_validate({**find_study("cpu")[1].model_dump(), "description": "Small ones.", **changes})
    dataset = DatasetRecord("digits", "0123456789abcdef" * 4, tuple("0123456789"), 900, 300, fallback=False)
    return StudyRecord("watched", config, dataset)


@pytest.fixture
def storage(any_storage: URL) -> Iterator[RDBStorage]:
    with storage_opened(any_storage) as storage:
        yield storage


@pytest.fixture
def study(storage: RDBStorage) -> optuna.Study:
    return create(storage, record(start=()), {"python": "3.11.7", "torch": "2.15", "commit": "abc123def456"})


@pytest.fixture
def folder(home: Path) -> Path:
    return home / "out" / "artifacts"


def add(
    study: optuna.Study,
    state: TrialState = COMPLETE,
    value: float | None = 0.75,
    epochs: dict[int, float] | None = None,
    **attributes: Any,
) -> int:
    """Add a finished trial; its number."""
    usual = {"config": {"network": {"blocks": 3}, "fit": {"lr": 0.1}}, "parameters": 12_728, "flops": 5_000_000}
    study.add_trial(
        create_trial(
            state=state,
            value=value if state == COMPLETE else None,
            params={"lr": 0.1},
            distributions={"lr": FloatDistribution(0.01, 1.0)},
            user_attrs={**usual, **attributes},
            intermediate_values={1: 0.5, 2: 0.75} if epochs is None else epochs,
        )
    )
    return len(study.get_trials(deepcopy=False)) - 1


def put(study: optuna.Study, folder: Path, requested: int = 20, waiting: int = 0, shown_url: str = SHOWN) -> list[str]:
    return publish(study, record(), requested, waiting, Folder(folder), shown_url)


class Page:
    """A study's page as optuna-dashboard's HTTP API gives it."""

    def __init__(self, study: optuna.Study, storage: RDBStorage, folder: Path) -> None:
        self._app = optuna_dashboard.wsgi(storage, artifact_store=FileSystemArtifactStore(folder))
        self._id = study._study_id
        self.json = json.loads(self._get(f"/api/studies/{self._id}"))

    def _get(self, path: str) -> bytes:
        environ: dict[str, Any] = {"PATH_INFO": path}
        setup_testing_defaults(environ)
        statuses: list[str] = []
        chunks = self._app(environ, lambda status, *_: statuses.append(status))
        body = b"".join(chunks)
        if hasattr(chunks, "close"):
            chunks.close()
        assert statuses == ["200 OK"], body
        return body

    @property
    def note(self) -> str:
        return str(self.json["note"]["body"])

    def trial_note(self, number: int) -> str:
        return str(self.json["trials"][number]["note"]["body"])

    def files(self, number: int) -> dict[str, bytes]:
        """Content by name of a trial's files."""
        trial = self.json["trials"][number]
        names = [meta["filename"] for meta in trial["artifacts"]]
        assert len(set(names)) == len(names)
        return {
            meta["filename"]: self._get(f"/artifacts/{self._id}/{trial['trial_id']}/{meta['artifact_id']}")
            for meta in trial["artifacts"]
        }

    @property
    def graphs(self) -> dict[str, Any]:
        return {graph["id"]: json.loads(graph["graph_object"]) for graph in self.json["plotly_graph_objects"]}

    def all(self) -> Any:
        """All that is published."""
        numbers = range(len(self.json["trials"]))
        return self.note, [self.trial_note(n) for n in numbers], [self.files(n) for n in numbers], self.graphs


def contents(storage: RDBStorage) -> dict[str, list[Any]]:
    """Every row of every table."""
    tables = sa.MetaData()
    tables.reflect(storage.engine)
    with storage.engine.connect() as connection:
        return {
            name: sorted((tuple(row) for row in connection.execute(sa.select(table))), key=str)
            for name, table in tables.tables.items()
        }


def attributes(storage: RDBStorage) -> dict[str, str]:
    return {row[2]: row[3] for row in contents(storage)["study_system_attributes"]}


def on_disk(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def a_bit_of_everything(study: optuna.Study) -> None:
    add(study, seconds=125.0, slot=0, attempt=1, worker="ann-17", device="NVIDIA H100",
        images_per_second=12_345.6, peak_memory_bytes=2_500_000_000)  # fmt: skip
    add(study, PRUNED, epochs={1: 0.2})
    add(study, PRUNED, epochs={}, fault="non-finite loss", cause="non-finite loss: nan in epoch 1")
    add(study, PRUNED, epochs={}, fault="infeasible", cause="needs 80 GB")
    add(study, FAIL, epochs={}, fault="error", cause="ValueError: a | b `c`", traceback="Traceback\n  ValueError",
        slot=1, attempt=2)  # fmt: skip


def test_the_dashboard_shows_notes_files_and_graphs(study: optuna.Study, storage: RDBStorage, folder: Path) -> None:
    a_bit_of_everything(study)
    assert put(study, folder) == []
    page = Page(study, storage, folder)

    for part in ("Small ones.", "digits", "`0123456789ab`", "`abc123def456`", "torch 2.15", "20 configurations"):
        assert part in page.note
    assert "python -m search worker --name watched --storage 'postgresql+psycopg://ann@example.org:5432/studies'" in (
        page.note
    )
    assert "python -m search status --name watched" in page.note
    assert "$SEARCH_STORAGE_PASSWORD_FILE" in page.note

    complete = page.trial_note(0)
    for part in ("**Complete**: 75.00 %", "slot 0, attempt 1", "ann-17", "NVIDIA H100", "12,728", "5,000,000",
                 "12,346 images/s", "2.50 GB", "2 min 5 s"):  # fmt: skip
        assert part in complete
    assert "20.00 % validation accuracy after epoch 1" in page.trial_note(1)
    assert "the training diverged" in page.trial_note(2)
    assert "**Infeasible**: this configuration cannot be trained here: `needs 80 GB`" in page.trial_note(3)
    assert "**Failed attempt**: an error: `ValueError: a | b 'c'`" in page.trial_note(4)

    assert set(page.files(0)) == {"config.json", "curve.png"}
    assert json.loads(page.files(0)["config.json"]) == {"network": {"blocks": 3}, "fit": {"lr": 0.1}}
    assert page.files(0)["curve.png"].startswith(b"\x89PNG")
    assert page.files(4) == {"config.json": page.files(0)["config.json"], "failure.log": b"Traceback\n  ValueError\n"}
    assert set(page.graphs) == GRAPHS


def test_notes_are_those_that_optuna_dashboard_reads(study: optuna.Study, folder: Path) -> None:
    add(study)
    put(study, folder)
    assert optuna_dashboard.get_note(study).startswith("# watched")
    trial = optuna.Trial(study, study.get_trials()[0]._trial_id)
    assert optuna_dashboard.get_note(trial).startswith("**Complete**")


@pytest.mark.parametrize("filled", [False, True])
def test_a_second_call_writes_nothing(study: optuna.Study, storage: RDBStorage, folder: Path, filled: bool) -> None:
    if filled:
        a_bit_of_everything(study)
        study.ask()
    put(study, folder)
    stored, files = contents(storage), on_disk(folder) if filled else None
    assert put(study, folder) == []
    assert contents(storage) == stored
    assert (on_disk(folder) if filled else None) == files
    assert folder.exists() == filled


def test_another_process_finds_what_is_published(study: optuna.Study, any_storage: URL, folder: Path) -> None:
    a_bit_of_everything(study)
    put(study, folder)
    with storage_opened(any_storage) as other:
        stored = contents(other)
        put(optuna.load_study(study_name="watched", storage=other), folder)
        assert contents(other) == stored


def test_a_new_trial_adds_its_own_and_leaves_the_others(study: optuna.Study, storage: RDBStorage, folder: Path) -> None:
    add(study)
    put(study, folder)
    optuna_dashboard.save_note(optuna.Trial(study, study.get_trials()[0]._trial_id), "a person's own words")
    files, notes = on_disk(folder), attributes(storage)
    new = add(study, value=0.8)
    put(study, folder)
    page = Page(study, storage, folder)
    assert page.trial_note(0) == "a person's own words"
    assert "80.00 %" in page.trial_note(new)
    assert set(page.files(new)) == {"config.json", "curve.png"}
    assert files.items() <= on_disk(folder).items()
    changed = {key for key, value in attributes(storage).items() if notes.get(key) != value}
    trial_id = study.get_trials()[new]._trial_id
    assert all(f":{trial_id}:" in key or "plot_data" in key for key in changed)


def test_graphs_are_replaced_and_only_where_they_change(study: optuna.Study, storage: RDBStorage, folder: Path) -> None:
    add(study)
    put(study, folder, waiting=1)
    before = attributes(storage)
    put(study, folder, waiting=2)
    after = attributes(storage)
    assert {key for key in after if before.get(key) != after[key]} == {"dashboard:plot_data:search-budget:0"}
    graphs = Page(study, storage, folder).graphs
    assert set(graphs) == GRAPHS
    assert "waiting: 2" in [bar["name"] for bar in graphs["search-budget"]["data"]]


def test_a_graph_that_shrinks_leaves_nothing_behind(
    study: optuna.Study, storage: RDBStorage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optuna_dashboard._custom_plot_data.SYSTEM_ATTR_MAX_LENGTH", 10)
    put(study, folder, waiting=10**9)
    put(study, folder, waiting=1)
    assert set(Page(study, storage, folder).graphs) == GRAPHS


def test_trials_that_finish_out_of_order_are_all_published(
    study: optuna.Study, storage: RDBStorage, folder: Path
) -> None:
    slow = study.ask()
    add(study)
    put(study, folder)
    assert Page(study, storage, folder).trial_note(0) == ""
    slow.report(0.25, 1)
    study.tell(slow, 0.25)
    put(study, folder)
    page = Page(study, storage, folder)
    assert "25.00 %" in page.trial_note(0)
    assert set(page.files(0)) == {"curve.png"}
    assert "75.00 %" in page.trial_note(1)


def test_the_finale_has_graphs_as_soon_as_there_is_something_to_show(
    study: optuna.Study, storage: RDBStorage, folder: Path
) -> None:
    for value in (0.75, 0.7):
        add(study, value=value)
    confirmation = finale.confirmation(study.get_trials())
    begun = tuple(replace(row, accuracies={}, mean=None) for row in confirmation.configurations)
    publish(study, record(), 20, 0, Folder(folder), SHOWN, replace(confirmation, configurations=begun))
    assert set(Page(study, storage, folder).graphs) == GRAPHS

    publish(study, record(), 20, 0, Folder(folder), SHOWN, confirmation)
    assert set(Page(study, storage, folder).graphs) == GRAPHS | {"search-confirmation"}

    study.set_user_attr("retrain", as_json(finale.retrain(1, ("cat", "dog"))))
    publish(study, record(), 20, 0, Folder(folder), SHOWN, confirmation)
    stored = contents(storage)
    graphs = Page(study, storage, folder).graphs
    assert set(graphs) == GRAPHS | {"search-confirmation", "search-retrain-accuracy", "search-retrain-loss"}
    assert "trial 1" in graphs["search-confirmation"]["data"][0]["y"]

    publish(study, record(), 20, 0, Folder(folder), SHOWN, confirmation)
    assert contents(storage) == stored


def test_what_an_earlier_version_published_gets_the_finales_graphs(
    study: optuna.Study, storage: RDBStorage, folder: Path
) -> None:
    add(study)
    put(study, folder)
    study.set_user_attr("published", {k: v for k, v in study.user_attrs["published"].items() if k != "finale_from"})
    study.set_user_attr("retrain", as_json(finale.retrain(0, ("cat", "dog"))))
    put(study, folder)
    assert set(Page(study, storage, folder).graphs) == GRAPHS | {"search-retrain-accuracy", "search-retrain-loss"}


class Crash(BaseException):
    """A process's end between two writes."""


@pytest.mark.slow
def test_a_crash_before_any_write_is_made_good(
    study: optuna.Study, storage: RDBStorage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_bit_of_everything(study)
    untouched = dict(study.user_attrs)
    put(study, folder)
    whole = Page(study, storage, folder).all()
    files = set(on_disk(folder))
    writers = {name: getattr(RetryingStorage, name) for name in ("set_study_system_attr", "set_study_user_attr")}
    left = 0

    def counted(name: str) -> Any:
        def write(self: RetryingStorage, *args: Any) -> None:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            writers[name](self, *args)

        return write

    for name in writers:
        monkeypatch.setattr(RetryingStorage, name, counted(name))
    crashes = 0
    while True:
        # From nothing, as if it had never been published ...
        with storage.engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM study_system_attributes WHERE key LIKE 'dashboard:%'"))
            connection.execute(sa.text("DELETE FROM study_user_attributes WHERE key = 'published'"))
        shutil.rmtree(folder)
        folder.mkdir()
        assert dict(study.user_attrs) == untouched
        left = crashes
        try:
            put(study, folder)
            break
        except Crash:
            crashes += 1
        # ... it is all there after the next call, and once.
        left = -1
        put(study, folder)
        assert Page(study, storage, folder).all() == whole
        assert set(on_disk(folder)) == files
    assert crashes > 20


def test_without_a_folder_notes_and_graphs_come_and_files_follow(
    study: optuna.Study, storage: RDBStorage, folder: Path
) -> None:
    a_bit_of_everything(study)
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    warnings = put(study, folder)
    assert warnings == [f"trials' files cannot be written to {folder}: File exists; tried again later"]
    page = Page(study, storage, folder)
    assert "75.00 %" in page.trial_note(0)
    assert set(page.graphs) == GRAPHS
    assert not page.json["trials"][0]["artifacts"]
    stored = contents(storage)
    assert put(study, folder) == warnings
    assert contents(storage) == stored

    folder.unlink()
    optuna_dashboard.save_note(optuna.Trial(study, study.get_trials()[0]._trial_id), "kept")
    assert put(study, folder) == []
    page = Page(study, storage, folder)
    assert page.trial_note(0) == "kept"
    assert [sorted(page.files(n)) for n in range(5)] == [
        ["config.json", "curve.png"], ["config.json", "curve.png"],
        ["config.json"], ["config.json"], ["config.json", "failure.log"],
    ]  # fmt: skip


def test_a_full_disk_is_a_warning_and_leaves_no_broken_file(
    study: optuna.Study, storage: RDBStorage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(study)
    add(study)

    def write_half(self: FileSystemArtifactStore, artifact_id: str, content_body: BinaryIO) -> None:
        (folder / artifact_id).write_bytes(content_body.read()[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(FileSystemArtifactStore, "write", write_half)
        assert put(study, folder) == [
            f"trials' files cannot be written to {folder}: No space left on device; tried again later"
        ]
    assert not any(trial["artifacts"] for trial in Page(study, storage, folder).json["trials"])
    assert put(study, folder) == []
    page = Page(study, storage, folder)
    assert json.loads(page.files(0)["config.json"])["fit"] == {"lr": 0.1}
    assert len(on_disk(folder)) == 4


def test_odd_trials_are_published(study: optuna.Study, storage: RDBStorage, folder: Path) -> None:
    add(study, value=math.inf, epochs={1: math.inf, 2: -math.inf}, parameters=None, seconds="?", fault=None)
    add(study, FAIL, epochs={1: math.inf}, config=None, cause="x" * 10_000, fault="of a kind yet unknown")
    study.enqueue_trial({"lr": 0.1})
    study.tell(study.ask(), state=FAIL)
    put(study, folder)
    page = Page(study, storage, folder)
    assert "no finite accuracy" in page.trial_note(0)
    assert "of a kind yet unknown" in page.trial_note(1)
    assert len(page.trial_note(1)) < 1_000
    assert "the cause is not known" in page.trial_note(2)
    assert [set(page.files(n)) for n in range(3)] == [{"config.json"}, set(), set()]
    assert set(page.graphs) == GRAPHS


def test_a_study_without_trials_has_note_and_graphs(study: optuna.Study, storage: RDBStorage, folder: Path) -> None:
    assert put(study, folder) == []
    page = Page(study, storage, folder)
    assert page.note.startswith("# watched")
    assert set(page.graphs) == GRAPHS


def test_a_persons_words_in_the_study_note_are_kept(study: optuna.Study, storage: RDBStorage, folder: Path) -> None:
    put(study, folder)
    optuna_dashboard.save_note(study, optuna_dashboard.get_note(study) + "\nAsk Ann before you stop it.")
    put(study, folder, requested=40)
    note = Page(study, storage, folder).note
    assert "40 configurations" in note
    assert note.partition(YOURS)[2] == "\nAsk Ann before you stop it."


def test_a_file_that_a_worker_uploaded_is_not_doubled(study: optuna.Study, storage: RDBStorage, folder: Path) -> None:
    folder.mkdir(parents=True)
    own = folder.parent / "curve.png"
    own.write_bytes(b"the worker's")
    trial = study.ask()
    trial.report(0.5, 1)
    upload_artifact(study_or_trial=trial, file_path=str(own), artifact_store=FileSystemArtifactStore(folder))
    study.tell(trial, 0.5)
    put(study, folder)
    assert Page(study, storage, folder).files(0) == {"curve.png": b"the worker's"}


def test_no_password_is_published(study: optuna.Study, storage: RDBStorage, folder: Path, any_storage: URL) -> None:
    url = any_storage.set(drivername="postgresql", username="ann", password="s3cret-word", host="db", port=5432)
    text = url.render_as_string(hide_password=False)
    told = f"OperationalError: no route to {text} (password=s3cret-word), {{'password': 's3cret-word'}}"
    add(study, FAIL, fault="error", cause=told, traceback=f"Traceback\n  {told}\n")
    # What a worker stores itself is not this module's: only what is added is looked at.
    before = contents(storage)
    put(study, folder, shown_url=text)
    added = {name: set(rows) - set(before[name]) for name, rows in contents(storage).items()}
    assert added["study_system_attributes"]
    assert "s3cret-word" not in str(added)
    files = b"".join(content for _, content in on_disk(folder).values())
    assert b"OperationalError: no route to postgresql://ann:***@db" in files
    assert b"s3cret-word" not in files


def test_a_study_in_a_file_says_that_workers_join_on_this_machine(
    study: optuna.Study, storage: RDBStorage, folder: Path, home: Path
) -> None:
    put(study, folder, shown_url=without_password(sa.make_url("sqlite:///studies/search.db")))
    note = Page(study, storage, folder).note
    assert "--storage 'sqlite:///studies/search.db'" in note
    assert "this machine only" in note
    assert "PASSWORD" not in note


def test_a_definition_that_changes_is_told(study: optuna.Study, storage: RDBStorage, folder: Path) -> None:
    put(study, folder)
    publish(study, record(description="Now with wider blocks."), 20, 0, Folder(folder), SHOWN)
    assert "Now with wider blocks." in Page(study, storage, folder).note
