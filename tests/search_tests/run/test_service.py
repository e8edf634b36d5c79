"""The service around a search: its storages and passwords, its workers and who watches them, and what fails there."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import pytest
import sqlalchemy as sa
import torch
from optuna.trial import TrialState
from optuna_dashboard._note import note_ver_key
from PIL import Image
from sqlalchemy.engine import URL, make_url

from data.errors import UserError
from data.split import DIVISION_SEED, load_split
from search import study as studies
from search.attributes import FAULT
from search.config.study_file import find_study
from search.host.environment import environment
from search.host.process import Process, pid_namespace, this_process
from search.ledger.budget import count_budget, is_open, request_budget
from search.ledger.heartbeat import TrialProgress, send_heartbeat
from search.ledger.leases import Ledger, open_ledger
from search.ledger.registry import DeviceOption, register_worker, take_device
from search.storage.connect import storage_opened
from search.storage.tables import WORKERS
from search.storage.url import network_file_system, storage_url
from search.study import DatasetRecord, StudyRecord
from search.worker import trial as trial_module
from search.worker.loop import run_worker
from search.worker.runner import WorkerOptions
from search.worker.stop import StopRequest
from support.command import Command, Ended
from support.database import NASTY, TRACES, dump

ROOT = Path(__file__).parents[3]


DIGITS = ("--dataset", "digits")
BUDGET = {"requested", "complete", "pruned", "failed_attempts", "running", "waiting"}
CONTRACT = {"study", "dataset", "storage", "budget", "best", "confirm", "retrain", "seconds"}

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from outside; a worker that runs in this process leaves its signals alone."""
    for name in ("SEARCH_STORAGE_PASSWORD", "SEARCH_STORAGE_PASSWORD_FILE", "PGPASSWORD", "PGPASSFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(StopRequest, "install", lambda _: None)


@contextlib.contextmanager
def stored(url: URL, tiny: Path, trials: int) -> Iterator[tuple[Ledger, optuna.Study]]:
    """A study on digits that nobody works at yet, and its ledger."""
    config = find_study(str(tiny))[1].model_copy(update={"trials": trials})
    split = load_split("digits", tiny.parent, DIVISION_SEED, torch.device("cpu"))
    record = StudyRecord("tiny", config, DatasetRecord("digits", split.fingerprint, split.classes, 1293, 144, False))
    with storage_opened(url) as storage:
        studies.create(storage, record, environment())
        ledger, study = open_ledger(storage, "tiny", config.workers)
        request_budget(ledger, trials)
        yield ledger, study


@pytest.fixture
def waiting(tiny: Path) -> Iterator[tuple[Ledger, optuna.Study]]:
    """A study of two configurations in the default storage."""
    with stored(storage_url(None), tiny, 2) as both:
        yield both


class Joined:
    """A worker from elsewhere, in a thread: it comes as soon as there is a study."""

    def __init__(self, url: URL) -> None:
        self.done: int | None = None
        self._options = WorkerOptions(url, "tiny", "cpu", Path("none"), Path("elsewhere"))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self.done is None:
            try:
                self.done = run_worker(self._options, lambda _: None, StopRequest())
            except UserError:
                time.sleep(0.2)

    def leave(self) -> int:
        self._thread.join(timeout=60)
        assert self.done is not None
        return self.done


def loaded() -> optuna.Study:
    return optuna.load_study(study_name="tiny", storage="sqlite:///studies/search.db")


def fault_free(ended: Ended) -> Ended:
    assert ended.status == 0, (ended.out, ended.err)
    return ended


def refused(search: Command, *words: object) -> str:
    ended = search(*words)
    assert ended.status == 2, (ended.status, ended.out, ended.err)
    return ended.complaint


# Real processes


@pytest.fixture
def start(home: Path, tiny: Path) -> Iterator[Start]:
    """Starts ``python -m search``, with trials that last long enough to look at them."""
    tiny.write_text(tiny.read_text().replace("epochs = 2\ntrain_images = 96", "epochs = 40\ntrain_images = 200"))
    processes = []

    def call(*words: object, **more: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "search", *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield call
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.communicate()


def read_until(process: "subprocess.Popen[str]", pattern: str) -> tuple[str, re.Match[str]]:
    """What a process prints up to a line that holds the pattern."""
    assert process.stdout is not None
    lines = ""
    for line in process.stdout:
        lines += line
        if found := re.search(pattern, line):
            return lines, found
    raise AssertionError((lines, process.communicate()[1]))


def ended_well(process: "subprocess.Popen[str]") -> tuple[str, str]:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, (out, err)
    return out, err


def get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return json.loads(answer.read())


# Passwords


@pytest.fixture
def guarded(postgres_url: str) -> URL:
    """An empty database of a role whose password is `NASTY`, as a URL without it."""
    url = make_url(postgres_url)
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        if not connection.scalar(sa.text("SELECT count(*) FROM pg_roles WHERE rolname = 'keeper'")):
            connection.exec_driver_sql(f"CREATE ROLE keeper LOGIN PASSWORD '{NASTY.replace('%', '%%')}'")
            rules = Path(connection.scalar(sa.text("SHOW hba_file")))
            rules.write_text("local all keeper scram-sha-256\n" + rules.read_text())
            connection.exec_driver_sql("SELECT pg_reload_conf()")
        connection.exec_driver_sql(f'ALTER DATABASE "{url.database}" OWNER TO keeper')
    admin.dispose()
    return url.set(username="keeper", password=None)


def text_of(url: URL) -> str:
    return url.render_as_string(hide_password=False)


@pytest.mark.slow
def test_a_password_from_a_file_leaves_no_trace(
    search: Command, tiny: Path, home: Path, guarded: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "secret").write_text(f"{NASTY}\r\n")
    monkeypatch.setenv("SEARCH_STORAGE_PASSWORD_FILE", str(home / "secret"))
    run = fault_free(search("run", "--study", tiny, *DIGITS, "--trials", 2, "--storage", text_of(guarded)))
    table = fault_free(search("status", "--storage", text_of(guarded)))
    assert "2 of 2 configurations" in table.out
    (home / "secret").unlink()
    files = [path for path in home.rglob("*") if path.is_file() and "cache" not in path.parts]
    assert {"summary.json", "config.json", "model.safetensors"} <= {path.name for path in files}
    everything = dump(guarded.set(password=NASTY))
    assert "python -m search worker --name tiny" in everything  # the study's note, so it would be found
    everything += "".join(path.read_bytes().decode("latin-1") for path in files)
    everything += run.out + run.err + table.out + table.err
    assert not [trace for trace in TRACES if trace in everything]


@pytest.mark.parametrize("way", ["variable", "file", "file without end of line", "URL", "URL before a variable"])
def test_a_password_is_taken_from(
    search: Command, tiny: Path, home: Path, guarded: URL, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    right = guarded.set(password=NASTY)
    with stored(right, tiny, 1):
        pass
    file = home / "secret"
    if way == "variable":
        monkeypatch.setenv("SEARCH_STORAGE_PASSWORD", NASTY)
        monkeypatch.setenv("SEARCH_STORAGE_PASSWORD_FILE", str(home / "absent"))  # the variable goes first
    elif way == "URL before a variable":
        monkeypatch.setenv("SEARCH_STORAGE_PASSWORD", "wrong")
    elif way.startswith("file"):
        file.write_text(NASTY + ("" if "without" in way else "\n"))
        monkeypatch.setenv("SEARCH_STORAGE_PASSWORD_FILE", str(file))
    url = right if way.startswith("URL") else guarded
    ended = fault_free(search("status", "--storage", text_of(url), "--format", "json"))
    assert json.loads(ended.out)["budget"]["waiting"] == 1
    assert not [trace for trace in TRACES if trace in ended.out + ended.err]


@pytest.mark.parametrize("way", ["none", "variable", "URL before the right variable"])
def test_a_wrong_password_is_not_repeated(
    search: Command, home: Path, guarded: URL, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    url = guarded
    if way == "variable":
        monkeypatch.setenv("SEARCH_STORAGE_PASSWORD", f"{NASTY}x")
    elif way.startswith("URL"):
        monkeypatch.setenv("SEARCH_STORAGE_PASSWORD", NASTY)
        url = guarded.set(password=f"{NASTY}x")
    complaint = refused(search, "status", "--storage", text_of(url))
    expected = "no password supplied" if way == "none" else "password authentication failed"
    assert expected in complaint
    assert not [trace for trace in TRACES if trace in complaint]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"\xff\xfe\x00", "can't decode"), ("folder", "Is a directory")],
    ids=["absent", "binary", "folder"],
)
def test_a_password_file_that_cannot_be_read(
    search: Command, home: Path, guarded: URL, monkeypatch: pytest.MonkeyPatch, content: object, reason: str
) -> None:
    file = home / "secret"
    if content == "folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    monkeypatch.setenv("SEARCH_STORAGE_PASSWORD_FILE", str(file))
    complaint = refused(search, "status", "--storage", text_of(guarded))
    assert complaint.startswith(f"$SEARCH_STORAGE_PASSWORD_FILE: {file} cannot be read: ")
    assert reason in complaint


@pytest.mark.slow
def test_real_workers_get_the_password_and_nobody_sees_it(start: Start, tiny: Path, home: Path, guarded: URL) -> None:
    secret = home / "secret"
    secret.write_text(f"{NASTY}\n")
    words = ("run", "--study", tiny, *DIGITS, "--trials", 4, "--workers", 2, "--storage", text_of(guarded))
    process = start(*words, "--no-finale", "--dashboard", SEARCH_STORAGE_PASSWORD_FILE=str(secret))
    out, _ = read_until(process, "trial 1: epoch 1/40")
    family = psutil.Process(process.pid).children(recursive=True)
    lines = [" ".join(one.cmdline()) for one in family]
    assert sum("search worker" in line for line in lines) == 2
    assert sum("search dashboard" in line for line in lines) == 1
    rest, err = ended_well(process)
    stated = json.loads(Path("studies/tiny/summary.json").read_text())
    assert stated["budget"]["complete"] + stated["budget"]["pruned"] == 4
    with storage_opened(guarded.set(password=NASTY)) as storage:
        study = optuna.load_study(study_name="tiny", storage=storage)
        assert len({trial.user_attrs["worker"] for trial in study.trials}) == 2
    secret.unlink()
    logs = {path.name: path.read_text() for path in Path("studies/tiny").rglob("*.log")}
    assert {"worker-0.log", "worker-1.log", "dashboard.log"} <= set(logs)
    everything = "\n".join([out, rest, err, *lines, *logs.values(), json.dumps(stated)])
    everything += dump(guarded.set(password=NASTY))
    assert not [trace for trace in TRACES if trace in everything]


# A PostgreSQL of one's own


@pytest.fixture
def roomy(home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to run in, with `tiny.toml`, that the user whom root's PostgreSQL runs as can enter.

    Not `tmp_path`: every pytest that root starts closes that.
    """
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        Path("tiny.toml").write_text(tiny.read_text())
        yield Path(folder).resolve()
        for process in servers(Path(folder).resolve()):
            process.send_signal(signal.SIGQUIT)
        psutil.wait_procs(servers(Path(folder).resolve()), timeout=20)


def servers(folder: Path) -> list[psutil.Process]:
    """Every process of a PostgreSQL below a folder."""
    found = psutil.process_iter(["name", "cwd"])
    return [one for one in found if one.info["name"] == "postgres" and (one.info["cwd"] or "").startswith(f"{folder}/")]


def test_storage_postgres_works_from_nothing_and_ends_with_the_command(
    search: Command, roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--study", "tiny.toml", *DIGITS, "--trials", 1, "--no-finale")
    ended = fault_free(search("run", *words, "--storage", "postgres"))
    assert servers(roomy) == []
    file = roomy / "studies" / "postgres" / "password"
    told = re.fullmatch(
        r"storage: (postgresql\+psycopg://search@127\.0\.0\.1:\d+/search) for other workers, "
        rf"with SEARCH_STORAGE_PASSWORD_FILE={file}\n",
        ended.err,
    )
    assert told
    assert f"storage {told[1].replace('@', ':***@')}" in ended.out

    monkeypatch.setenv("SEARCH_STORAGE", "postgres")
    stated = fault_free(search("status", "--format", "json"))
    assert json.loads(stated.out)["budget"]["complete"] == 1
    assert servers(roomy) == []
    password = file.read_text().strip()
    outputs = [path for path in (roomy / "studies" / "tiny").rglob("*") if path.is_file()]
    assert outputs
    everything = ended.out + ended.err + stated.out + stated.err
    everything += "".join(path.read_bytes().decode("latin-1") for path in outputs)
    assert password not in everything
    assert not (roomy / "studies" / "search.db").exists()


def test_a_folder_that_holds_something_else_is_not_made_a_database(search: Command, roomy: Path) -> None:
    (roomy / "studies" / "postgres").mkdir(parents=True)
    (roomy / "studies" / "postgres" / "letter").write_text("Dear reader")
    complaint = refused(search, "status", "--storage", "postgres")
    assert "holds something else; PostgreSQL needs an empty or a new one" in complaint


@pytest.mark.slow
def test_other_workers_join_by_what_storage_postgres_prints(start: Start, roomy: Path) -> None:
    words = ("--study", "tiny.toml", *DIGITS, "--trials", 3, "--storage", "postgres", "--workers", 0)
    run = start("run", *words, "--max-retrain-epochs", 1)
    assert run.stderr is not None
    told = re.fullmatch(r"storage: (\S+) for other workers, with (SEARCH_\w+)=(\S+)\n", run.stderr.readline())
    assert told
    url, variable, file = told.groups()
    read_until(run, "0 of 3 configurations done")
    table, _ = ended_well(start("status", "--storage", "postgres"))
    assert "0 of 3 configurations" in table
    assert servers(roomy)  # that command did not take it away from `run`
    worker = start("worker", "--name", "tiny", "--storage", url, **{variable: file})
    read_until(worker, "epoch 1/")
    lines = [" ".join(psutil.Process(one.pid).cmdline()) for one in (run, worker)]
    outputs = [*ended_well(worker), *ended_well(run)]
    assert "5 configurations done by this worker" in outputs[0]  # 3 of the search, 2 of its confirmation
    assert "3 of 3 configurations" in outputs[2]
    assert servers(roomy) == []
    assert Path(file).read_text().strip() not in "".join([table, *lines, *outputs])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", make_url(url).port or 0))


# Who looks at a study


def test_status_keeps_its_contract_with_scripts(search: Command, waiting: tuple[Ledger, optuna.Study]) -> None:
    stated = json.loads(fault_free(search("status", "--format", "json")).out)
    assert set(stated) >= CONTRACT
    assert set(stated["budget"]) == BUDGET
    assert stated["budget"] == dict.fromkeys(BUDGET, 0) | {"requested": 2, "waiting": 2}
    assert (stated["best"], stated["retrain"], stated["workers"], stated["running_trials"]) == (None, None, [], [])


def test_status_lists_the_workers(search: Command, waiting: tuple[Ledger, optuna.Study]) -> None:
    ledger, _ = waiting
    there = Process("ann", "another machine", 17, "1")
    gone = Process("bob", pid_namespace(), this_process().pid, "before this process")
    for process in (there, gone):
        worker = register_worker(ledger, process, None, None)
        take_device(ledger, worker, [DeviceOption("cuda:0", "NVIDIA H100", process.host)])
        send_heartbeat(ledger, worker, None, TrialProgress(5, 3, 12, 0.5, 1000.0))
    ended = fault_free(search("status"))
    assert re.search(r"^ann:17 +idle +NVIDIA H100 +5, epoch 3/12 +\d s ago", ended.out, flags=re.MULTILINE)
    assert re.search(rf"^bob:{os.getpid()} +dead +NVIDIA H100", ended.out, flags=re.MULTILINE)
    first, second = json.loads(fault_free(search("status", "--format", "json")).out)["workers"]
    assert first["last_heartbeat_seconds"] < 60
    assert {**first, "last_heartbeat_seconds": 0} == {
        "worker": "ann:17", "state": "idle", "device": "NVIDIA H100", "slot": None,
        "progress": {"trial": 5, "epoch": 3, "epochs": 12, "accuracy": 0.5, "images_per_second": 1000.0},
        "start_up_seconds": None, "last_heartbeat_seconds": 0,
    }  # fmt: skip
    assert second["state"] == "dead"


@pytest.mark.parametrize(("silent", "state"), [(29, "idle"), (31, "silent"), (61, "dead")])
def test_a_worker_elsewhere_is_known_by_its_heartbeats(
    search: Command, waiting: tuple[Ledger, optuna.Study], silent: float, state: str
) -> None:
    ledger, _ = waiting
    worker = register_worker(ledger, Process("ann", "another machine", 17, "1"), None, None)
    with ledger.engine.begin() as connection:
        earlier = sa.update(WORKERS).values(heartbeat=WORKERS.c.heartbeat - silent)
        connection.execute(earlier.where(WORKERS.c.id == worker))
    assert re.search(rf"^ann:17 +{state} ", fault_free(search("status")).out, flags=re.MULTILINE)


@pytest.mark.parametrize("form", ["table", "json"])
def test_status_watch_ends_with_the_budget(
    search: Command, waiting: tuple[Ledger, optuna.Study], threads: None, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr("search.cli.status.STATUS_SECONDS", 0.1)
    ledger, _ = waiting
    joined = Joined(storage_url(None))
    ended = fault_free(search("status", "--watch", "--format", form))
    assert not is_open(ledger)
    assert joined.leave() == 2
    if form == "table":
        assert "2 of 2 configurations" in ended.out
        return
    decoder, text, budgets = json.JSONDecoder(), ended.out.strip(), []
    while text:
        stated, end = decoder.raw_decode(text)
        budgets.append(stated["budget"]["complete"])
        text = text[end:].strip()
    assert budgets == sorted(budgets)
    assert (budgets[0], budgets[-1]) == (0, 2)


def test_status_watch_of_a_finished_study_ends_at_once(search: Command, tiny: Path) -> None:
    fault_free(search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale"))
    begun = time.monotonic()
    assert "1 of 1 configurations" in fault_free(search("status", "--watch")).out
    assert time.monotonic() - begun < 2


def test_every_finished_trial_has_a_note_and_files(search: Command, tiny: Path, home: Path) -> None:
    fault_free(search("run", "--study", tiny, *DIGITS, "--trials", 3, "--no-finale"))
    study = loaded()
    attributes = study._storage.get_study_system_attrs(study._study_id)
    folder = home / "studies" / "tiny" / "artifacts"
    named = set()
    for trial in study.trials:
        assert attributes[note_ver_key(trial._trial_id)] == 1
        prefix = f"dashboard:artifacts:{trial._trial_id}:"
        files = [json.loads(value) for key, value in attributes.items() if key.startswith(prefix)]
        assert {file["filename"] for file in files} == {"config.json", "curve.png"}
        assert all((folder / file["artifact_id"]).stat().st_size for file in files)
        named |= {file["artifact_id"] for file in files}
    assert {path.name for path in folder.iterdir()} == named


def test_artifacts_that_cannot_be_written_are_told_once_and_cost_nothing(
    search: Command, tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.run.stage.PUBLISH_SECONDS", 0.1)
    (home / "studies" / "tiny").mkdir(parents=True)
    (home / "studies" / "tiny" / "artifacts").write_text("in the way")
    ended = fault_free(search("run", "--study", tiny, *DIGITS, "--trials", 4))
    assert ended.out.count("warning: trials' files cannot be written to studies/tiny/artifacts: ") == 1
    assert "4 of 4 configurations" in ended.out
    assert "test images read once" in ended.out
    (home / "studies" / "tiny" / "artifacts").unlink()
    assert "warning" not in fault_free(search("run", "--name", "tiny")).out
    assert len(list((home / "studies" / "tiny" / "artifacts").iterdir())) == 2 * (4 + 2)  # the confirmation's too


# The dashboard


def test_a_taken_port_is_refused_in_one_line(search: Command, waiting: tuple[Ledger, optuna.Study]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        complaint = refused(search, "dashboard", "--port", port)
    signal.signal(signal.SIGTERM, handler)
    assert complaint == f"port {port} is taken by another program; choose another one with --port"


@pytest.mark.slow
def test_the_dashboard_listens_to_this_machine_alone(start: Start, waiting: tuple[Ledger, optuna.Study]) -> None:
    process = start("dashboard", "--port", 0)
    _, found = read_until(process, r"^dashboard: (http://127\.0\.0\.1:(\d+)/)$")
    (listening,) = [one for one in psutil.Process(process.pid).net_connections() if one.status == "LISTEN"]
    assert (listening.laddr.ip, listening.laddr.port) == ("127.0.0.1", int(found[2]))
    (shown,) = get(f"{found[1]}api/studies")["study_summaries"]
    assert shown["study_name"] == "tiny"
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode in (0, 130)
    assert "Traceback" not in err


@pytest.mark.slow
def test_run_serves_a_dashboard_for_as_long_as_it_lasts(start: Start) -> None:
    with contextlib.ExitStack() as taking:
        with contextlib.suppress(OSError):  # then another program has it, which is as good
            taking.enter_context(socket.create_server(("127.0.0.1", 8080)))
        process = start("run", "--study", "tiny.toml", *DIGITS, "--trials", 2, "--no-finale", "--dashboard")
        _, found = read_until(process, r"dashboard: (http://127\.0\.0\.1:(\d+)/)$")
        address, port = found[1], int(found[2])
        assert port != 8080
        read_until(process, "trial 0: epoch 2/")
        (shown,) = get(f"{address}api/studies")["study_summaries"]
        page = get(f"{address}api/studies/{shown['study_id']}")
        assert page["trials"][0]["state"] == "Running"
        ended_well(process)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


# Several workers


def test_two_workers_share_a_budget(search: Command, tiny: Path, home: Path) -> None:
    ended = fault_free(search("run", "--study", tiny, *DIGITS, "--trials", 7, "--workers", 2))
    assert "7 of 7 configurations" in ended.out
    assert "test images read once" in ended.out
    with storage_opened(storage_url(None)) as storage, storage.engine.connect() as connection:
        rows = connection.execute(sa.select(WORKERS.c.study_id, WORKERS.c.number, WORKERS.c.farewell)).all()
    search_id = min(row.study_id for row in rows)  # its confirmation has another, and workers of its own
    assert sorted(row.number for row in rows if row.study_id == search_id) == [0, 1]
    assert {row.farewell for row in rows} <= {"the budget is done", "preempted: asked to go"}
    trials = loaded().trials
    assert [trial.state for trial in trials].count(TrialState.COMPLETE) == 7
    assert sorted(trial.user_attrs["slot"] for trial in trials) == list(range(7))


def test_without_workers_of_its_own_a_run_waits_for_others(search: Command, tiny: Path, home: Path) -> None:
    joined = Joined(storage_url(None))
    ended = fault_free(search("run", "--study", tiny, *DIGITS, "--trials", 3, "--workers", 0))
    assert joined.leave() == 3 + 2  # the search and its confirmation
    assert "3 of 3 configurations" in ended.out
    assert "test images read once" in ended.out
    assert not (home / "studies" / "tiny" / "workers").exists()


@pytest.mark.slow
def test_a_timeout_with_two_workers_leaves_nothing_running(search: Command, tiny: Path, home: Path) -> None:
    tiny.write_text(tiny.read_text().replace("epochs = 2\n", "epochs = 8\n"))
    words = ("run", "--study", tiny, *DIGITS, "--workers", 2)
    ended = fault_free(search(*words, "--trials", 1000, "--timeout", 4, "--max-retrain-epochs", 1))
    assert "The time was up before the budget was done; to go on: python -m search run" in ended.out
    assert "test images read once" in ended.out
    trials = loaded().trials
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    done = sum(trial.state.is_finished() for trial in trials) - len(failed)
    assert 1 <= len(failed) <= 2
    assert {trial.user_attrs[FAULT] for trial in failed} == {"preempted"}
    stated = json.loads((home / "studies" / "tiny" / "summary.json").read_text())["budget"]
    assert (stated["running"], stated["waiting"]) == (0, 1000 - done)
    again = fault_free(search(*words, "--trials", done + len(failed), "--no-finale"))
    assert f"{done + len(failed)} of {done + len(failed)} configurations" in again.out
    retried = [trial.params for trial in loaded().trials[len(trials) :]]
    assert all(trial.params in retried for trial in failed)


@pytest.mark.parametrize("count", ["-1", "many", "1.5", "9999", ""])
def test_a_number_of_workers_that_is_none(search: Command, home: Path, count: str) -> None:
    complaint = refused(search, "run", "--workers", count)
    assert complaint == f"--workers takes auto or a number from 0 to 1024, not {count!r}"


# A worker by hand


def test_a_worker_names_the_studies_that_there_are(search: Command, waiting: tuple[Ledger, optuna.Study]) -> None:
    assert refused(search, "worker", "--name", "huge") == "no study 'huge': this storage has tiny"


def test_a_worker_of_a_storage_that_is_not_there(
    search: Command, home: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.worker.loop.OPENING_SECONDS", 2.0)
    assert "no database absent.db" in refused(search, "worker", "--name", "s", "--storage", "sqlite:///absent.db")
    assert not (home / "absent.db").exists()
    url = f"postgresql://u@127.0.0.1:{unused_port}/d"
    assert "Connection refused" in refused(search, "worker", "--name", "s", "--storage", url)
    assert "Missing option '--name'" in refused(search, "worker")


def test_a_worker_with_other_images_is_refused_and_takes_nothing(
    search: Command, home: Path, waiting: tuple[Ledger, optuna.Study]
) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (home / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / "pictures" / name / f"{number}.png")
    complaint = refused(search, "worker", "--name", "tiny", "--dataset", "folder:pictures")
    assert "study 'tiny' was begun on other images" in complaint
    ledger, study = waiting
    assert (count_budget(ledger).waiting, study.trials) == (2, [])


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_worker_with_a_device_that_is_not_there(
    search: Command, waiting: tuple[Ledger, optuna.Study], device: str
) -> None:
    assert device in refused(search, "worker", "--name", "tiny", "--device", device)
    assert count_budget(waiting[0]).waiting == 2


def test_a_worker_leaves_after_as_many_configurations_as_it_was_asked_for(
    search: Command, threads: None, waiting: tuple[Ledger, optuna.Study]
) -> None:
    ended = fault_free(search("worker", "--name", "tiny", "--max-trials", 1))
    assert re.search(r"^1 configurations? done by this worker$", ended.out, flags=re.MULTILINE)
    assert (count_budget(waiting[0]).complete, count_budget(waiting[0]).waiting) == (1, 1)
    assert "--max-trials" in refused(search, "worker", "--name", "tiny", "--max-trials", 0)


def test_a_worker_goes_on_where_it_cannot_write_checkpoints(
    search: Command, home: Path, waiting: tuple[Ledger, optuna.Study]
) -> None:
    (home / "file").touch()
    ended = fault_free(search("worker", "--name", "tiny", "--out", home / "file" / "below"))
    assert "warning: no checkpoint, so a killed trial starts afresh" in ended.out
    assert count_budget(waiting[0]).complete == 2


# Where a SQLite file may lie


@pytest.mark.parametrize(
    ("mounts", "kind"),
    [
        ("server:/pool {} nfs4 rw 0 0", "nfs4"),
        ("host {}/studies fuse.sshfs rw 0 0", "fuse.sshfs"),
        ("share {} cifs rw 0 0\n/dev/sda {}/studies ext4 rw 0 0", None),
        ("/dev/sda {} ext4 rw 0 0", None),
        ("short", None),
    ],
)
def test_network_file_systems_are_known_by_the_nearest_mount(home: Path, mounts: str, kind: str | None) -> None:
    (home / "mounts").write_text(f"/dev/sda / ext4 rw 0 0\n{mounts.replace('{}', str(home))}\n")
    assert network_file_system(storage_url(None), home / "mounts") == kind
    assert network_file_system(storage_url("postgresql://u@h/d"), home / "mounts") is None
    assert network_file_system(storage_url(None), home / "absent") is None


def test_sqlite_on_a_network_file_system_is_warned_of_and_works(
    search: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.run.open_search.network_file_system", lambda _: "nfs4")
    monkeypatch.setattr("search.worker.loop.network_file_system", lambda _: "nfs4")
    warning = "warning: this SQLite database lies on a network file system (nfs4), whose locks cannot be trusted"
    ended = fault_free(search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale"))
    assert ended.out.count(warning) == 1
    assert "1 of 1 configurations" in ended.out
    assert warning in fault_free(search("worker", "--name", "tiny")).out


# A full disk


@pytest.fixture
def disk(home: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = home / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


IMPATIENT = "\n[workers]\nmax_outage = 1\nheartbeat = 0.2\nlost_after = 2\n"


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_costs_nothing_that_is_stored(
    search: Command, tiny: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_text(tiny.read_text() + IMPATIENT)
    plain, calls = trial_module.fit, iter(range(1000))

    def fit(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:
            fill(disk)
        return plain(*args, **kwargs)

    monkeypatch.setattr(trial_module, "fit", fit)
    storage = f"sqlite:///{disk}/study.db"
    words = ("run", "--study", tiny, *DIGITS, "--trials", 5, "--storage", storage)
    begun = time.monotonic()
    full = search(*words)
    assert time.monotonic() - begun < 20
    assert full.status == 1
    assert full.out.count("does not answer (database or disk is full); trying again") <= 2  # worker and `run`
    assert re.fullmatch(
        r"storage sqlite:///.*/study\.db has not answered for 1 s: database or disk is full; "
        "nothing stored is lost, and the same command goes on",
        full.complaint,
    )
    before = optuna.load_study(study_name="tiny", storage=storage).trials
    assert [trial.state for trial in before[:2]] == [TrialState.COMPLETE] * 2
    assert "2 of 5 configurations" in fault_free(search("status", "--storage", storage)).out  # looking needs no room

    (disk / "ballast").unlink()
    ended = fault_free(search(*words))
    assert "5 of 5 configurations" in ended.out
    after = optuna.load_study(study_name="tiny", storage=storage).trials
    assert [trial.state for trial in after].count(TrialState.COMPLETE) == 5
    assert [(trial.params, trial.value) for trial in after[:2]] == [(trial.params, trial.value) for trial in before[:2]]
    assert TrialState.RUNNING not in {trial.state for trial in after}


@pytest.mark.slow
def test_a_disk_that_is_full_of_everything(start: Start, tiny: Path, disk: Path) -> None:
    tiny.write_text(tiny.read_text() + IMPATIENT)
    storage = f"sqlite:///{disk}/study.db"
    words = ("run", "--study", tiny, *DIGITS, "--trials", 3, "--storage", storage, "--out", disk / "out")
    process = start(*words, "--max-retrain-epochs", 1)
    read_until(process, "trial 1: epoch 2/")
    fill(disk)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, (out, err)
    assert err.startswith("search: ")
    assert err.count("\n") == 1, err
    assert "database or disk is full" in err
    (disk / "ballast").unlink()
    out, _ = ended_well(start(*words, "--max-retrain-epochs", 1))
    assert "warning: no report: " in out  # it alone is larger than this disk
    assert "3 of 3 configurations" in out
    assert json.loads((disk / "out" / "summary.json").read_text())["budget"]["complete"] == 3
