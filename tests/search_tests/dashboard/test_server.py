import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy.engine import URL

from data.errors import UserError
from search.artifacts.store import Folder
from search.config.study_file import find_study
from search.dashboard.publish import publish
from search.dashboard.server import serve
from search.storage.connect import storage_opened
from search.study import DatasetRecord, StudyRecord, create
from support.dashboard import get, page, served


def record() -> StudyRecord:
    dataset = DatasetRecord("digits", "0123456789abcdef" * 4, tuple("0123456789"), 900, 300, fallback=False)
    return StudyRecord("watched", find_study("cpu")[1].model_copy(update={"start": ()}), dataset)


def add(study: optuna.Study, value: float, state: TrialState = TrialState.COMPLETE) -> None:
    study.add_trial(
        create_trial(
            state=state,
            value=value if state == TrialState.COMPLETE else None,
            params={"lr": value / 10},
            distributions={"lr": FloatDistribution(0.001, 1.0, log=True)},
            user_attrs={"config": {"fit": {"lr": value / 10}}, "parameters": round(1e5 * value), "flops": 10**7,
                        "seconds": 120.0, "worker": "ann-17"},
            intermediate_values={1: value / 2, 2: value},
        )
    )  # fmt: skip


def published(storage: RDBStorage, folder: Path) -> optuna.Study:
    study = create(storage, record(), {"python": "3.11.7", "commit": "abc123def456"})
    for value in (0.5, 0.8125, 0.7):
        add(study, value)
    add(study, 0.2, TrialState.PRUNED)
    assert publish(study, record(), 20, 0, Folder(folder / "artifacts"), "sqlite:///studies/search.db") == []
    return study


@pytest.fixture
def folder(home: Path) -> Path:
    return home / "artifacts"


def test_it_serves_what_is_published_and_sees_what_others_add(any_storage: URL, folder: Path, unused_port: int) -> None:
    with storage_opened(any_storage) as storage:
        study = published(storage, folder)
        with served(any_storage, folder, unused_port) as (address, process):
            assert address == f"http://127.0.0.1:{unused_port}/"
            assert b"<title>Optuna Dashboard</title>" in get(f"{address}dashboard")
            shown = page(address, study)
            assert [trial["state"] for trial in shown["trials"]] == ["Complete", "Complete", "Complete", "Pruned"]
            assert shown["best_trials"][0]["values"] == [0.8125]
            assert shown["note"]["body"].startswith("# watched")
            assert "81.25 %" in shown["trials"][1]["note"]["body"]
            assert len(shown["plotly_graph_objects"]) == 3
            trial = shown["trials"][1]
            config = next(meta for meta in trial["artifacts"] if meta["filename"] == "config.json")
            path = f"artifacts/{study._study_id}/{trial['trial_id']}/{config['artifact_id']}"
            assert json.loads(get(address + path)) == {"fit": {"lr": 0.08125}}

            add(study, 0.9)
            running = study.ask()
            publish(study, record(), 20, 0, Folder(folder / "artifacts"), "")
            deadline = time.monotonic() + 30
            while len(page(address, study)["trials"]) < 6:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            shown = page(address, study)
            assert shown["best_trials"][0]["values"] == [0.9]
            assert "90.00 %" in shown["trials"][4]["note"]["body"]
            assert shown["trials"][5]["state"] == "Running"
            study.tell(running, 0.95)
            while page(address, study)["trials"][5]["state"] != "Complete":
                assert time.monotonic() < deadline
                time.sleep(0.2)

            process.send_signal(signal.SIGINT)
            assert process.stdout is not None
            assert process.stdout.read() == "ended\n"
            assert process.wait(timeout=30) == 0


def test_it_serves_a_storage_without_studies_and_without_a_folder(any_storage: URL, folder: Path) -> None:
    with served(any_storage, folder, 0) as (address, _):
        assert json.loads(get(f"{address}api/studies")) == {"study_summaries": []}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{address}api/studies/1")


def test_a_taken_port_is_told_in_one_line(home: Path, folder: Path) -> None:
    with socket.socket() as taken, storage_opened(sqlite(home)) as storage:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as error:
            serve(storage, folder, port=port, ready=pytest.fail)
    assert str(error.value) == f"port {port} is taken by another program; choose another one with --port"


@pytest.mark.parametrize(
    ("host", "port", "complaint"),
    [
        ("127.0.0.1", 70_000, "port 70000 is none; choose one from 1 to 65535 with --port"),
        ("127.0.0.1", -1, "port -1 is none; choose one from 1 to 65535 with --port"),
        ("192.0.2.1", 0, "the dashboard cannot listen on '192.0.2.1': Cannot assign requested address"),
        ("no such host", 0, "the dashboard cannot listen on 'no such host': "),
    ],
)
def test_an_address_that_cannot_be_used_is_told_in_one_line(
    home: Path, folder: Path, host: str, port: int, complaint: str
) -> None:
    with storage_opened(sqlite(home)) as storage, pytest.raises(UserError) as error:
        serve(storage, folder, host=host, port=port, ready=pytest.fail)
    assert str(error.value).startswith(complaint)
    assert "\n" not in str(error.value)


def sqlite(home: Path) -> URL:
    return URL.create("sqlite", database=str(home / "served.db"))


@pytest.mark.slow
def test_the_page_of_a_large_study_is_quick(home: Path, folder: Path) -> None:
    """With the dashboard's own look-ups it takes 11 s, with the linear ones 0.6 s (SQLite, two CPU cores)."""
    with storage_opened(sqlite(home)) as storage:
        study = create(storage, record(), {})
        trials = [create_trial(state=TrialState.FAIL) for _ in range(1_500)]
        study.add_trials(trials)
        with storage.engine.begin() as connection:
            rows = [
                {"study": study._study_id, "key": key, "value": json.dumps(value)}
                for number in range(1, len(trials) + 1)
                for key, value in (
                    (f"dashboard:{number}:note_ver", 1),
                    (f"dashboard:{number}:note_str:0", "a"),
                    (f"dashboard:{number}:note_str:1", "b"),
                    *((f"dashboard:artifacts:{number}:{file}", '{"artifact_id": "x"}') for file in "abcdefghij"),
                )
            ]
            connection.exec_driver_sql(
                "INSERT INTO study_system_attributes (study_id, key, value_json) VALUES (:study, :key, :value)", rows
            )
        with served(sqlite(home), folder, 0) as (address, _):
            page(address, study)  # loads the trials
            start = time.monotonic()
            shown = page(address, study)
            assert time.monotonic() - start < 5
    assert {trial["note"]["body"] for trial in shown["trials"]} == {"ab"}
    assert {len(trial["artifacts"]) for trial in shown["trials"]} == {10}


def rendered(chromium: str, address: str, home: Path) -> str:
    """A page's DOM after its scripts have run."""
    command = [
        chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home / 'chromium'}",
        "--window-size=1600,2400", "--virtual-time-budget=15000", "--dump-dom", address,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.slow
def test_a_browser_shows_trials_best_value_note_graphs_and_files(home: Path, folder: Path, unused_port: int) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a browser: no chromium, chromium-browser or google-chrome on PATH")
    with storage_opened(sqlite(home)) as storage:
        study = published(storage, folder)
        best = study.best_trial
    with served(sqlite(home), folder, unused_port) as (address, _):
        page_of_study = f"{address}dashboard/studies/{study._study_id}"
        overview = rendered(chromium, page_of_study, home)
        assert "watched" in overview
        assert "0.8125" in overview
        for graph in ("search-budget", "search-device-hours", "search-accuracy-cost"):
            assert f"user-defined-plot:{graph}" in overview
        for title in ("Budget: configurations by outcome", "Device time: 8 min 0 s", "Accuracy and cost of complete"):
            assert title in overview

        note = rendered(chromium, f"{page_of_study}/note", home)
        assert "0123456789ab" in note
        assert "Add a worker" in note

        trial = rendered(chromium, f"{page_of_study}/trials?numbers={best.number}", home)
        assert "Trial 1" in trial
        assert "81.25 % validation accuracy" in trial
        assert "curve.png" in trial
        assert f"/artifacts/{study._study_id}/{best._trial_id}/" in trial
