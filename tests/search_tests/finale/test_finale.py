"""From the best trials to an honest number: confirmation, retrain, test; each part by itself and after a death."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState
from safetensors.torch import load_file
from sqlalchemy.engine import URL

from model.config import FitConfig, NetworkConfig
from model.fit import NonFiniteLossError
from model.result import EpochResult
from search.artifacts.mirror import Mirror
from search.config.settings import TrialConfig
from search.finale import train as training
from search.finale.confirm import confirm_seeds
from search.samplers.slots import trial_seed
from search.storage.connect import storage_opened
from search.study import load, record_of
from search.worker.loop import run_worker
from search.worker.runner import WorkerOptions
from search.worker.stop import StopRequest
from support.command import Command

DIGITS = ("--dataset", "digits")
STORAGE = "sqlite:///studies/search.db"


@pytest.fixture
def finale(tiny: Path) -> Path:
    """Three configurations confirmed over two seeds, two final trainings, up to two doublings."""
    text = tiny.read_text().replace("configurations = 2\nseeds = 1", "configurations = 3\nseeds = 2")
    text = text.replace("epochs = 2\nmax_epochs = 2\nseeds = 1", "epochs = 1\nmax_epochs = 4\nseeds = 2")
    tiny.write_text(text)
    return tiny


def loaded(name: str = "tiny") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=STORAGE)


def summary(home: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((home / "studies" / "tiny" / "summary.json").read_text())
    return content


def test_run_confirms_retrains_and_tests_once_a_seed(search: Command, finale: Path, home: Path) -> None:
    ended = search("run", "--study", finale, *DIGITS)
    assert (ended.status, ended.err) == (0, "")
    study, confirming = loaded(), loaded("tiny.confirm")
    written = summary(home)

    confirmed = written["confirm"]
    assert (confirmed["study"], confirmed["runs"], confirmed["done"]) == ("tiny.confirm", 6, 6)
    best = sorted((t for t in study.trials if t.state == TrialState.COMPLETE), key=lambda t: -t.value)[:3]
    assert {row["trial"] for row in confirmed["configurations"]} == {trial.number for trial in best}
    config = record_of(study).config  # type: ignore[union-attr]
    fresh = {str(seed) for seed in confirm_seeds(config)}
    assert all(set(row["accuracies"]) == fresh for row in confirmed["configurations"])
    assert not fresh & {str(trial_seed(config, slot)) for slot in range(1000)}
    assert confirmed["winner"] in confirmed["tied"]
    assert confirmed["tie"] == (len(confirmed["tied"]) > 1)
    optimism = confirmed["optimism"]
    mean = next(row["mean"] for row in confirmed["configurations"] if row["trial"] == best[0].number)
    assert optimism == {
        "trial": best[0].number,
        "score": best[0].value,
        "confirmed": mean,
        "difference": pytest.approx(best[0].value - mean),
    }
    # The confirmation trains exactly what the search did but for the seed.
    for run in confirming.trials:
        twin = next(trial for trial in best if trial.params == run.params)
        assert run.user_attrs["config"]["network"] == twin.user_attrs["config"]["network"]
        differs = {k for k, v in run.user_attrs["config"]["fit"].items() if v != twin.user_attrs["config"]["fit"][k]}
        assert differs == {"seed"}

    retrain = study.user_attrs["retrain"]
    assert retrain["trial"] == confirmed["winner"]
    lengths = [row["epochs"] for row in retrain["watched"]]
    assert lengths == [1, 2, 4][: len(lengths)]
    assert retrain["epochs"] in lengths
    assert [len(run["curve"]) for run in retrain["runs"]] == [retrain["epochs"]] * 2
    assert not any("validation_accuracy" in row for run in retrain["runs"] for row in run["curve"])
    assert retrain["test_accuracy"]["n"] == 2
    reads = study.user_attrs["holdout_reads"]
    assert [read["seed"] for read in reads] == [run["seed"] for run in retrain["runs"]]
    assert len({run["seed"] for run in retrain["runs"]} | {retrain["watched"][0]["seed"]}) == 3
    assert sum(map(sum, retrain["confusion"])) == 2 * 360
    assert set(retrain["per_class_accuracy"]) == set("0123456789")
    assert set(retrain["latency"]) == {"1", "256"}
    assert not list((home / "studies" / "tiny" / "checkpoints").glob("*"))
    # Digits mirrored are no digits.
    assert not retrain["choices"]["flip"]
    assert "flip" not in retrain["watched"][0]


def test_each_part_by_itself(search: Command, finale: Path, home: Path) -> None:
    search("run", "--study", finale, *DIGITS, "--no-finale")
    assert summary(home)["confirm"] is None
    confirmed = search("confirm")
    assert (confirmed.status, confirmed.err) == (0, "")
    assert summary(home)["confirm"]["done"] == 6
    assert summary(home)["retrain"] is None
    retrained = search("retrain", "--name", "tiny", "--max-retrain-epochs", 1)
    assert (retrained.status, retrained.err) == (0, "")
    assert summary(home)["retrain"]["epochs"] == 1
    assert summary(home)["retrain"]["stopped_by"] == "max epochs"
    assert (home / "studies" / "tiny" / "best" / "model.safetensors").exists()


def test_an_unconfirmed_search_is_retrained_at_its_word(search: Command, finale: Path, home: Path) -> None:
    search("run", "--study", finale, *DIGITS, "--no-finale")
    assert search("retrain").status == 0
    assert summary(home)["retrain"]["trial"] == summary(home)["best"]["trial"]


@pytest.mark.slow
def test_a_longer_search_confirms_only_what_is_new(search: Command, finale: Path) -> None:
    search("run", "--study", finale, *DIGITS, "--trials", 3, "--no-finale")
    search("confirm")
    first = loaded("tiny.confirm").trials
    search("run", "--study", finale, *DIGITS, "--trials", 8, "--no-finale")
    ended = search("confirm")
    assert ended.status == 0, ended.err
    second = loaded("tiny.confirm").trials
    assert [trial.params for trial in second[: len(first)]] == [trial.params for trial in first]
    done = Counter((str(trial.params), trial.user_attrs["config"]["fit"]["seed"]) for trial in second)
    assert set(done.values()) == {1}
    best = sorted(loaded().trials, key=lambda trial: -(trial.value or 0))[:3]
    assert {str(trial.params) for trial in best} <= {params for params, _ in done}


@pytest.mark.slow
def test_workers_from_elsewhere_do_the_confirmation(search: Command, finale: Path, any_storage: URL) -> None:
    """`run --workers 0` only watches: the search and then its confirmation are done by a worker that joined once."""
    url = any_storage.render_as_string(hide_password=False)
    search("run", "--study", finale, *DIGITS, "--trials", 1, "--storage", url, "--no-finale")
    done: list[int] = []

    def join() -> None:
        while load_budget(any_storage) != 3:
            time.sleep(0.05)
        options = WorkerOptions(any_storage, "tiny", "cpu", Path("none"), Path("elsewhere"))
        done.append(run_worker(options, lambda _: None, StopRequest()))

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    ended = search("run", "--name", "tiny", "--trials", 3, "--storage", url, "--workers", 0)
    assert ended.status == 0, ended.err
    thread.join(timeout=60)
    assert done == [2 + 6]


def load_budget(url: URL) -> int:
    with storage_opened(url) as storage:
        found = load(storage, "tiny")
        return int(found.user_attrs["definition"]["trials"]) if found.user_attrs.get("finale") else 0


class KilledError(BaseException):
    """The process is no more."""


@pytest.mark.parametrize("death", [4, *(pytest.param(death, marks=pytest.mark.slow) for death in (1, 6))])
def test_a_retrain_that_dies_goes_on_to_the_same_weights(
    search: Command, finale: Path, home: Path, monkeypatch: pytest.MonkeyPatch, death: int
) -> None:
    """Killed after its so-many-th epoch, whichever training that falls into."""
    search("run", "--study", finale, *DIGITS, "--trials", 2, "--no-finale")
    shutil.copytree(home / "studies", home / "copy")
    assert search("retrain").status == 0
    straight = loaded().user_attrs["retrain"]
    weights = load_file(home / "studies" / "tiny" / "best" / "model.safetensors")
    shutil.rmtree(home / "studies")
    shutil.move(home / "copy", home / "studies")

    plain, epochs = training._thinned, 0

    def dying(result: EpochResult, whole: int) -> list[list[float]]:
        nonlocal epochs
        epochs += 1
        if epochs == death + 1:
            raise KilledError
        return plain(result, whole)

    monkeypatch.setattr(training, "_thinned", dying)
    with pytest.raises(KilledError):
        search("retrain")
    assert search("retrain").status == 0
    again = loaded().user_attrs["retrain"]
    for name, value in load_file(home / "studies" / "tiny" / "best" / "model.safetensors").items():
        assert value.equal(weights[name]), name
    assert untimed(again) == untimed(straight)
    assert len(loaded().user_attrs["holdout_reads"]) == 2


def untimed(value: Any) -> Any:
    """Without what no two runs have in common."""
    if isinstance(value, dict):
        times = ("seconds", "images_per_second", "latency", "read_at")
        return {key: untimed(inner) for key, inner in value.items() if key not in times}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_kill_9_in_the_retrain_and_again(tiny: Path, home: Path) -> None:
    tiny.write_text(tiny.read_text().replace("epochs = 2\nmax_epochs = 2", "epochs = 16\nmax_epochs = 16"))
    command = [sys.executable, "-m", "search"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}

    def start(*words: str) -> "subprocess.Popen[bytes]":
        nowhere = subprocess.DEVNULL
        return subprocess.Popen([*command, *words], env=environment, stdout=nowhere, stderr=nowhere)

    assert start("run", "--study", "tiny.toml", *DIGITS, "--trials", "1", "--no-finale").wait(120) == 0
    shutil.copytree(home / "studies", home / "copy")
    assert start("retrain").wait(200) == 0
    straight = (home / "studies" / "tiny" / "best" / "model.safetensors").read_bytes()
    shutil.rmtree(home / "studies")
    shutil.move(home / "copy", home / "studies")
    kills = 0
    for _ in range(2):
        process = start("retrain")
        seen = progress()
        while process.poll() is None and progress() == seen:
            time.sleep(0.1)
        time.sleep(0.3)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    assert start("retrain").wait(200) == 0
    assert (home / "studies" / "tiny" / "best" / "model.safetensors").read_bytes() == straight


def progress() -> Any:
    try:
        return loaded().user_attrs.get("retrain_progress")
    except sa.exc.OperationalError:
        return None


@pytest.mark.slow
def test_lost_checkpoints_and_lost_files_are_made_again(search: Command, finale: Path, home: Path) -> None:
    search("run", "--study", finale, *DIGITS, "--trials", 2)
    best = home / "studies" / "tiny" / "best"
    weights = load_file(best / "model.safetensors")
    shutil.rmtree(best)
    assert search("retrain").status == 0
    assert all(value.equal(weights[name]) for name, value in load_file(best / "model.safetensors").items())
    assert len(loaded().user_attrs["holdout_reads"]) == 2  # the test images are not read again


def test_a_damaged_checkpoint_is_left_aside_with_a_warning(tmp_path: Path) -> None:
    import torch

    from data.split import DIVISION_SEED, load_split

    split = load_split("digits", tmp_path, DIVISION_SEED, torch.device("cpu"))
    config = TrialConfig(NetworkConfig((8,), 1, (True,)), FitConfig(epochs=2, precision="float32"))
    path, told, warned = tmp_path / "c.safetensors", [], []
    files = Mirror(tmp_path, None, warned.append)
    first = training.train(config, split, path, files, 1.0, told.append, warned.append)
    path.write_bytes(path.read_bytes()[:-100])
    second = training.train(config, split, path, files, 1.0, told.append, warned.append)
    assert [result.epoch for result in told] == [1, 2, 1, 2]
    assert all(b.equal(a) for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True))


# Words that cannot be followed


@pytest.mark.parametrize("part", ["confirm", "retrain", "report"])
def test_what_there_is_none_of(search: Command, finale: Path, part: str) -> None:
    assert "no database" in search(part).complaint
    search("run", "--study", finale, *DIGITS, "--trials", 1, "--no-finale")
    ended = search(part, "--name", "other")
    assert (ended.status, "no study 'other': this storage has tiny" in ended.complaint) == (2, True)
    search("confirm")
    ended = search(part, "--name", "tiny.confirm")
    assert (ended.status, "name the study that it confirms" in ended.complaint) == (2, True)


@pytest.mark.parametrize("part", ["confirm", "retrain"])
def test_nothing_to_confirm_or_retrain(search: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise NonFiniteLossError("loss is nan")

    monkeypatch.setattr("search.worker.trial.fit", diverge)
    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale")
    ended = search(part)
    assert ended.status == 1
    assert "no trial ran to its end" in ended.complaint


def test_a_winner_that_diverges_in_its_retrain_is_said_so(
    search: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise NonFiniteLossError("loss is nan in epoch 1")

    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale")
    monkeypatch.setattr("search.finale.train.fit", diverge)
    ended = search("retrain")
    assert (ended.status, ended.complaint) == (1, "the retrain diverged: loss is nan in epoch 1")


@pytest.mark.parametrize("part", ["confirm", "retrain"])
def test_other_images_are_refused(search: Command, finale: Path, home: Path, part: str) -> None:
    search("run", "--study", finale, *DIGITS, "--trials", 1, "--no-finale")
    engine = sa.create_engine(STORAGE)
    with engine.begin() as connection:
        prints = {"print": summary(home)["dataset"]["fingerprint"]}
        query = "UPDATE study_user_attributes SET value_json = replace(value_json, :print, 'aa') WHERE key = 'dataset'"
        connection.execute(sa.text(query), prints)
    engine.dispose()
    ended = search(part)
    assert ended.status == 2
    assert "was begun on other images" in ended.complaint


def test_the_name_of_a_confirmation_is_no_name_for_a_search(search: Command, tiny: Path) -> None:
    assert "confirmation" in search("run", "--study", tiny, *DIGITS, "--name", "x.confirm").complaint


# The pruning audit


def test_audited_trials_run_to_their_end_and_say_where_they_would_have_stopped(search: Command, tiny: Path) -> None:
    table = (
        "[pruner]\nkind = 'percentile'\npercentile = 1.0\nstartup_trials = 1\nwarmup_epochs = 0\naudit = {}\n[confirm]"
    )
    text = tiny.read_text()
    tiny.write_text(text.replace("[confirm]", table.format(1.0)))
    search("run", "--study", tiny, *DIGITS, "--trials", 8, "--no-finale", "--name", "audited")
    trials = loaded("audited").trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    audited = [trial for trial in trials if "would_stop" in trial.user_attrs]
    assert audited
    assert {trial.user_attrs["would_stop"] for trial in audited} == {1}
    tiny.write_text(text.replace("[confirm]", table.format(0.0)))
    search("run", "--study", tiny, *DIGITS, "--trials", 8, "--no-finale", "--name", "plain")
    states = Counter(trial.state for trial in loaded("plain").trials)
    assert states[TrialState.PRUNED] >= 1
    assert not any("would_stop" in trial.user_attrs for trial in loaded("plain").trials)


def test_about_as_many_are_audited_as_asked_for() -> None:
    from search.config.study_file import find_study
    from search.samplers.slots import is_audited

    config = find_study("cpu")[1]
    share = sum(is_audited(config, slot) for slot in range(10_000)) / 10_000
    assert 0.04 < share < 0.06
