"""A study's files in an S3-compatible store: a real server, really stopped, and machines that share nothing else."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import TrialState

from data.errors import UserError
from model.checkpoint import read_about, save_checkpoint
from model.config import FitConfig, NetworkConfig
from model.fit import start_state
from model.network import build_network
from search.artifacts.mirror import Mirror
from search.artifacts.resume import CheckpointSource, newest_checkpoint
from search.artifacts.store import Bucket, Folder, Store, check_store, open_store, store_of, store_url
from search.attributes import ARTIFACTS
from search.dashboard.publish import publish
from search.events import EpochFinished, Event, Note
from search.finale import train as training
from search.ledger.budget import count_budget
from search.ledger.leases import open_ledger
from search.storage.connect import storage_opened
from search.storage.url import storage_url
from search.study import record_of
from search.worker.loop import run_worker
from search.worker.runner import WorkerOptions
from search.worker.stop import StopRequest
from support.command import Command
from support.dashboard import get, page, served
from support.database import dump
from support.s3 import BUCKET, KEY, SECRET, TRACES, S3Server

ROOT = Path(__file__).parents[3]


DIGITS = ("--dataset", "digits")
STORAGE = "sqlite:///studies/search.db"


def loaded(name: str = "tiny") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=STORAGE)


# What a store is


def test_a_store_gives_back_what_it_was_given(s3: S3Server) -> None:
    store = open_store(s3.url).below("study")
    content = bytes(range(256)) * 80_000  # 20 MB: several parts
    store.write("checkpoints/a", io.BytesIO(content))
    assert store.open_reader("checkpoints/a").read() == content
    store.write("checkpoints/a", io.BytesIO(b"newer"))
    assert store.open_reader("checkpoints/a").read() == b"newer"
    assert s3.names() == {"study/checkpoints/a"}
    store.remove("checkpoints/a")
    store.remove("checkpoints/a")
    assert s3.names() == set()
    with pytest.raises(ArtifactNotFound):
        store.open_reader("checkpoints/a")


def test_two_studies_of_one_store_do_not_meet(s3: S3Server) -> None:
    first, second = open_store(s3.url).below("one"), open_store(f"s3://{BUCKET}").below("shared").below("other")
    first.write("x", io.BytesIO(b"1"))
    second.write("x", io.BytesIO(b"2"))
    assert s3.names() == {"one/x", "other/x"}
    assert (first.open_reader("x").read(), second.open_reader("x").read()) == (b"1", b"2")


@pytest.mark.parametrize(
    "text",
    [
        f"s3://{KEY}:{SECRET}@models/prefix",
        "s3://models/a?secret=1",
        "s3://models/../other",
        "s3://models/./a",
        "s3://models//a",
        "s3:///a",
        "https://example.org/models",
        "some/folder",
        "s3://models/a b",
    ],
)
def test_what_is_no_url_of_a_bucket_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UserError, match="s3://BUCKET/PREFIX") as error:
        store_url(text, None)
    assert text not in str(error.value)
    assert not [trace for trace in TRACES if trace in str(error.value)]


def test_the_environment_names_a_store_for_studies_that_have_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study(study_name="s")
    assert store_url(None, None) is None
    assert store_url(None, study) is None
    assert store_of(study) is None
    monkeypatch.setenv("SEARCH_ARTIFACTS", "s3://models/environment/")
    assert store_url(None, study) == "s3://models/environment"
    assert store_url("s3://models", None) == "s3://models"
    study.set_user_attr(ARTIFACTS, "s3://models/own")
    assert store_url(None, study) == store_url("s3://models/own/", study) == "s3://models/own"
    with pytest.raises(UserError, match="study 's' keeps its artifacts in s3://models/own, not in s3://models/other"):
        store_url("s3://models/other", study)


# A run


def test_a_run_leaves_in_the_store_what_lies_in_its_folder(
    search: Command, tiny: Path, home: Path, s3: S3Server
) -> None:
    ended = search("run", "--study", tiny, *DIGITS, "--artifacts", s3.url)
    assert (ended.status, ended.err) == (0, "")
    assert f"artifacts and checkpoints: {s3.url}/tiny" in ended.out
    assert "warning" not in ended.out
    here = {path.relative_to(home / "studies").as_posix(): path for path in (home / "studies" / "tiny").rglob("*")}
    shared = {
        "best/model.safetensors",
        "best/config.json",
        "best/metrics.json",
        "summary.json",
        "report.html",
        "report.md",
    }
    top = s3.root / BUCKET / "shared"
    for name in shared:
        assert (top / "tiny" / name).read_bytes() == here[f"tiny/{name}"].read_bytes(), name
    # A configuration and a curve of each trial; no checkpoint is left, nor what the check wrote.
    others = s3.names() - {f"tiny/{name}" for name in shared}
    assert sum(name.startswith("tiny/artifacts/") for name in others) == 2 * 4
    assert sum(name.startswith("tiny.confirm/artifacts/") for name in others) == 2 * 2
    assert len(others) == 2 * 4 + 2 * 2
    assert not (home / "studies" / "tiny" / "artifacts").exists()
    assert loaded().user_attrs[ARTIFACTS] == loaded("tiny.confirm").user_attrs[ARTIFACTS] == s3.url


@pytest.mark.slow
def test_keys_are_nowhere(search: Command, tiny: Path, home: Path, s3: S3Server) -> None:
    ended = search("run", "--study", tiny, *DIGITS, "--trials", 1, "--artifacts", s3.url)
    assert ended.status == 0
    everything = ended.out + ended.err + dump(storage_url(STORAGE))
    assert s3.url in everything  # so they would be found
    for top in (home / "studies", s3.root):
        everything += "".join(path.read_bytes().decode("latin-1") for path in top.rglob("*") if path.is_file())
    assert not [trace for trace in TRACES if trace in everything]


@pytest.mark.slow
def test_a_model_that_another_machine_made_is_fetched(
    search: Command, tiny: Path, home: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--artifacts", s3.url)
    made = (home / "studies" / "tiny" / "best" / "model.safetensors").read_bytes()
    shutil.rmtree(home / "studies" / "tiny")
    monkeypatch.setattr(training, "fit", None)  # nothing is trained again
    ended = search("retrain", "--out", home / "elsewhere")
    assert (ended.status, ended.err) == (0, "")
    assert (home / "elsewhere" / "best" / "model.safetensors").read_bytes() == made
    assert search("predict", "--model", home / "elsewhere" / "best", *pictures(home)).status == 0


def pictures(home: Path) -> list[Path]:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(home / "picture.png")
    return [home / "picture.png"]


def test_a_study_that_gets_a_store_later_publishes_there_what_it_has(
    search: Command, tiny: Path, home: Path, s3: S3Server
) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 2, "--no-finale")
    assert s3.names() == set()
    assert len(list((home / "studies" / "tiny" / "artifacts").iterdir())) == 2 * 2
    assert search("run", "--study", tiny, *DIGITS, "--trials", 2, "--no-finale", "--artifacts", s3.url).status == 0
    assert sum(name.startswith("tiny/artifacts/") for name in s3.names()) == 2 * 2
    again = search("run", "--study", tiny, *DIGITS, "--trials", 2, "--no-finale")  # it knows by itself
    assert f"artifacts and checkpoints: {s3.url}/tiny" in again.out
    other = search("run", "--study", tiny, *DIGITS, "--trials", 2, "--no-finale", "--artifacts", "s3://other")
    assert other.status == 2
    assert f"keeps its artifacts in {s3.url}, not in s3://other" in other.complaint


# What is wrong at the start


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("bucket", "artifacts cannot be kept in s3://nowhere/tiny: there is no such bucket (NoSuchBucket)"),
        ("secret", "artifacts cannot be kept in {url}/tiny: access is denied; look at boto3's credentials ("),
        ("no keys", "artifacts cannot be kept in {url}/tiny: boto3 finds no credentials; set AWS_ACCESS_KEY_ID"),
        ("server", "artifacts cannot be kept in {url}/tiny: it cannot be reached; look at AWS_ENDPOINT_URL"),
        ("endpoint", "boto3 is set up wrongly: Invalid endpoint"),
        ("boto3", 'artifacts in {url} need an extra: pip install "block-search[s3]"'),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line_at_the_start(
    search: Command, tiny: Path, home: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch, wrong: str, complaint: str
) -> None:
    url = "s3://nowhere" if wrong == "bucket" else s3.url
    if wrong == "secret":
        s3.set_up(monkeypatch, secret=SECRET.upper())
    elif wrong == "no keys":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    elif wrong == "server":
        s3.stop()
    elif wrong == "endpoint":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    elif wrong == "boto3":
        monkeypatch.setitem(sys.modules, "boto3", None)
    begun = time.monotonic()
    ended = search("run", "--study", tiny, *DIGITS, "--artifacts", url)
    assert ended.status == 2
    assert ended.complaint.startswith(complaint.format(url=s3.url))
    assert not [trace for trace in (*TRACES, SECRET.upper()) if trace in ended.out + ended.err]
    assert time.monotonic() - begun < 20
    assert search("status").status == 2, "no study has been created"


# Checkpoints on their way from machine to machine

IDENTITY = {"of": "this training"}


@pytest.fixture
def save() -> Callable[..., None]:
    """Writes a checkpoint of a training that has come so far."""
    network = build_network(NetworkConfig((8,), 1, (True,)), 0, torch.device("cpu"))
    state = start_state(network, FitConfig(epochs=2, precision="float32"), torch.device("cpu"))

    def write(path: Path, epochs: int, identity: object = IDENTITY) -> None:
        save_checkpoint(path, network, state, {"identity": identity, "curve": list(range(epochs))})

    return write


Save = Callable[..., None]


def epochs_at(path: Path) -> int | None:
    about = read_about(path)
    return about and len(about["curve"])


@pytest.mark.parametrize(
    ("local", "copied", "taken"),
    [(None, 3, 3), (2, 3, 3), (3, 2, 3), (3, None, 3), (None, None, None), ("other", 2, 2), (2, "other", 2)],
)
def test_of_two_checkpoints_the_newest_of_this_training_is_taken(
    save: Save, tmp_path: Path, local: object, copied: object, taken: int | None
) -> None:
    stored, elsewhere = Folder(tmp_path / "stored"), tmp_path / "elsewhere"
    for out, what in ((tmp_path / "here", local), (elsewhere, copied)):
        if what is not None:
            save(out / "c", 9 if what == "other" else what, IDENTITY if what != "other" else "other")
    Mirror(elsewhere, stored, pytest.fail).upload(elsewhere / "c")
    mirror = Mirror(tmp_path / "here", stored, pytest.fail)
    path = tmp_path / "here" / "c"
    about = newest_checkpoint(CheckpointSource(mirror, path, IDENTITY))
    assert (about and len(about["curve"])) == taken
    if taken is not None:
        assert epochs_at(path) == taken
        assert [file.name for file in path.parent.iterdir()] == ["c"]


def test_a_damaged_copy_is_left_alone(save: Save, tmp_path: Path) -> None:
    stored = Folder(tmp_path / "stored")
    save(tmp_path / "here" / "c", 1)
    stored.write("c", io.BytesIO(b"no checkpoint"))
    mirror = Mirror(tmp_path / "here", stored, pytest.fail)
    about = newest_checkpoint(CheckpointSource(mirror, tmp_path / "here" / "c", IDENTITY))
    assert about is not None
    assert len(about["curve"]) == 1


class Broken:
    """A store that is away, and counts how often it is asked."""

    text = "s3://away"

    def __init__(self) -> None:
        self.asked = 0

    def _ask(self, *_: object) -> Any:
        self.asked += 1
        raise OSError("it cannot be reached")

    open_reader = write = remove = _ask


def test_a_store_that_is_away_is_told_once_and_asked_once_a_minute(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("search.artifacts.mirror.time.monotonic", lambda: now)
    store, warnings = Broken(), []
    mirror, path = Mirror(tmp_path, store, warnings.append), tmp_path / "c"
    save(path, 1)
    for _ in range(3):
        mirror.upload_if_reachable(path)
        mirror.remove(path)
        newest_checkpoint(CheckpointSource(mirror, path, IDENTITY))
    assert store.asked == 1
    now += 61
    mirror.upload_if_reachable(path)
    assert store.asked == 2
    mirror.upload(path, path)  # a result is not left out; but once is enough to see
    assert store.asked == 3
    assert warnings == ["no copies in s3://away: it cannot be reached; they are missing should this machine die"]


def test_without_a_store_nothing_is_done(save: Save, tmp_path: Path) -> None:
    mirror, path = Mirror(tmp_path, None, pytest.fail), tmp_path / "c"
    save(path, 1)
    mirror.upload(path)
    mirror.upload_if_reachable(path)
    mirror.remove(path)
    assert not mirror.download(path)
    assert newest_checkpoint(CheckpointSource(mirror, path, IDENTITY)) is not None
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


# Deaths


def test_a_store_that_goes_away_in_mid_study_is_a_warning_and_trials_go_on(
    search: Command, tiny: Path, home: Path, s3: S3Server
) -> None:
    """One worker: copies of the first epoch arrive, then nothing does."""
    begun = search(
        "run", "--study", tiny, *DIGITS, "--workers", 0, "--timeout", 1, "--no-finale", "--artifacts", s3.url
    )
    assert f"--artifacts {s3.url}" in begun.out.split("to go on: ")[1]
    events: list[Event] = []

    def show(event: Event) -> None:
        events.append(event)
        if isinstance(event, EpochFinished):
            s3.stop()

    assert (
        run_worker(WorkerOptions(storage_url(STORAGE), "tiny", "cpu", home, home / "elsewhere"), show, StopRequest())
        == 4
    )
    assert [trial.state for trial in loaded().trials] == [TrialState.COMPLETE] * 4
    warnings = [event.text for event in events if isinstance(event, Note) and "warning" in event.text]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: no copies in {s3.url}/tiny: it cannot be reached")
    # `run` itself: what it cannot publish or copy it says, and ends well.
    s3.start()
    again = search("run", "--study", tiny, *DIGITS, "--no-finale")
    assert again.status == 0
    assert "warning" not in again.out


@pytest.mark.slow
def test_a_retrain_that_dies_goes_on_elsewhere(
    search: Command, tiny: Path, home: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        """The process is no more."""

    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale", "--artifacts", s3.url)
    plain, epochs = training._thinned, []

    def dying(result: Any, whole: int) -> list[list[float]]:
        epochs.append(result.epoch)
        if len(epochs) == 4:
            raise KilledError
        return plain(result, whole)

    monkeypatch.setattr(training, "_thinned", dying)
    with pytest.raises(KilledError):
        search("retrain")
    # Two epochs watched, the first of two on all images done, the second lost; and with it the machine.
    assert epochs == [1, 2, 1, 2]
    shutil.rmtree(home / "studies" / "tiny")
    ended = search("retrain", "--out", home / "elsewhere")
    assert (ended.status, ended.err) == (0, "")
    assert epochs[4:] == [2]
    assert (home / "elsewhere" / "best" / "model.safetensors").read_bytes()
    assert {"tiny/best/model.safetensors", "tiny/report.html"} <= s3.names()
    assert not [name for name in s3.names() if "checkpoints" in name]


@pytest.mark.slow
def test_a_trial_goes_on_where_a_machine_that_is_gone_had_left_it(tiny: Path, home: Path, s3: S3Server) -> None:
    """Killed with -9 in mid-trial, its folder deleted: what the next worker knows is in database and store."""
    tiny.write_text(tiny.read_text().replace("epochs = 2\ntrain_images = 96", "epochs = 40\ntrain_images = 200"))

    def start(*words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "search", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    made = start("run", "--study", "tiny.toml", *DIGITS, "--trials", "1", "--workers", "0", "--timeout", "1",
                 "--no-finale", "--artifacts", s3.url)  # fmt: skip
    assert "to go on" in made.communicate(timeout=100)[0]
    worker = start("worker", "--name", "tiny", "--out", "first")
    assert worker.stdout is not None
    for line in worker.stdout:
        if ": epoch 3" in line:
            break
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert list((home / "first" / "checkpoints").glob("slot-*"))
    shutil.rmtree(home / "first")
    assert s3.names() >= {"tiny/checkpoints/slot-000000.safetensors"}
    out, _ = start("worker", "--name", "tiny", "--out", "second").communicate(timeout=200)
    assert "goes on after epoch" in out, out
    killed, again = loaded().trials
    assert (killed.state, again.state) == (TrialState.FAIL, TrialState.COMPLETE)
    resumed = int(out.split("goes on after epoch ")[1].split(",")[0])
    assert resumed >= 2
    assert list(again.intermediate_values) == list(range(1, 41))
    assert again.params == killed.params
    assert not [name for name in s3.names() if "checkpoints" in name]


# The dashboard


def test_the_dashboard_serves_files_from_stores_and_from_folders(
    search: Command, tiny: Path, home: Path, s3: S3Server
) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale", "--artifacts", s3.url, "--name", "far")
    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale", "--name", "near")
    studies = {name: loaded(name) for name in ("far", "near")}
    configs = {name: study.trials[0].user_attrs["config"] for name, study in studies.items()}
    with served(storage_url(f"sqlite:///{home / 'studies' / 'search.db'}"), home / "studies", 0) as (address, _):

        def addresses(name: str) -> dict[str, str]:
            (trial,) = page(address, studies[name])["trials"]
            top = f"{address}artifacts/{studies[name]._study_id}/{trial['trial_id']}"
            return {meta["filename"]: f"{top}/{meta['artifact_id']}" for meta in trial["artifacts"]}

        for name, config in configs.items():
            assert json.loads(get(addresses(name)["config.json"])) == config
            assert get(addresses(name)["curve.png"]).startswith(b"\x89PNG")
        s3.stop()
        assert json.loads(get(addresses("near")["config.json"])) == configs["near"]
        assert set(addresses("far")) == {"config.json", "curve.png"}  # the page itself needs no store


def test_files_that_do_not_reach_the_store_are_owed_and_told(search: Command, tiny: Path, s3: S3Server) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale", "--artifacts", s3.url)
    before = s3.names()
    s3.stop()
    with storage_opened(storage_url(STORAGE)) as storage:
        study = optuna.load_study(study_name="tiny", storage=storage)
        study.set_user_attr("published", None)
        record = record_of(study)
        assert record is not None
        ledger, _ = open_ledger(storage, "tiny", record.config.workers)
        count = count_budget(ledger)
        place = store_of(study)
        assert isinstance(place, Bucket)
        files: Store = place.below("artifacts")

        def put() -> list[str]:
            return publish(study, record, count.requested, count.waiting, files, "")

        (warning,) = put()
        assert warning.startswith(f"trials' files cannot be written to {s3.url}/tiny/artifacts: it cannot be reached")
        s3.start()
        for name in before:
            if "artifacts" in name:
                (s3.root / BUCKET / "shared" / name).unlink()
        assert put() == []
    assert s3.names() == before


def test_the_check_needs_to_write_read_and_remove(s3: S3Server) -> None:
    store = open_store(s3.url)
    check_store(store)
    assert s3.names() == set()
    forgetful = Broken()
    forgetful.write = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(UserError, match="cannot be reached"):
        check_store(forgetful)  # type: ignore[arg-type]
