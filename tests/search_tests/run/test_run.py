"""The whole command, on digits."""

import json
import re
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import URL

from model.saved import load_model
from search.storage.connect import open_storage
from search.storage.url import storage_url
from support.command import Command

DIGITS = ("--dataset", "digits")


def summary(home: Path, name: str = "tiny") -> dict[str, object]:
    content: dict[str, object] = json.loads((home / "studies" / name / "summary.json").read_text())
    return content


def attributes() -> dict[str, object]:
    return dict(optuna.load_study(study_name="tiny", storage="sqlite:///studies/search.db").user_attrs)


def test_from_nothing_to_a_retrained_model(search: Command, tiny: Path, home: Path) -> None:
    ended = search("run", "--study", tiny, *DIGITS)
    assert ended.status == 0, ended.err
    assert ended.err == ""
    assert "4 of 4 configurations" in ended.out
    assert "test images read once" in ended.out
    written = summary(home)
    assert written["budget"] == {
        "requested": 4, "complete": 4, "pruned": 0, "failed_attempts": 0, "running": 0, "waiting": 0,
    }  # fmt: skip
    assert written["storage"] == "sqlite:///studies/search.db"
    assert set(written) >= {"study", "dataset", "storage", "budget", "best", "confirm", "retrain", "seconds"}
    best, retrain = written["best"], written["retrain"]
    assert isinstance(best, dict)
    assert isinstance(retrain, dict)
    assert set(best) >= {"trial", "val_accuracy", "params"}
    assert set(retrain) >= {"epochs", "converged", "train_accuracy", "test_accuracy"}
    assert retrain["test_accuracy"]["n"] == 1
    folder = home / "studies" / "tiny" / "best"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "metrics.json"}
    assert load_model(folder).classes == tuple("0123456789")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(metrics["runs"][0]["curve"]) == len(metrics["watched"][0]["curve"]) == 2


def test_plain_optuna_reads_the_study(search: Command, tiny: Path, home: Path) -> None:
    search("run", "--study", tiny, *DIGITS, "--no-finale")
    study = optuna.load_study(study_name="tiny", storage="sqlite:///studies/search.db")
    assert study.best_value == max(trial.value or 0 for trial in study.trials)
    assert study.metric_names == ["validation accuracy"]


def test_the_same_command_again_does_nothing_more(search: Command, tiny: Path, home: Path) -> None:
    first = search("run", "--study", tiny, *DIGITS)
    before, stored = summary(home), attributes()
    again = search("run", "--study", tiny, *DIGITS)
    after = summary(home)
    assert {**attributes(), "seconds": 0} == {**stored, "seconds": 0}
    assert first.status == again.status == 0
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    assert "retrain: epoch" in first.out
    assert "retrain: epoch" not in again.out


def test_a_larger_number_extends_and_counts_each_read_of_the_test_images(
    search: Command, tiny: Path, home: Path
) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 2)
    extended = search("run", "--study", tiny, *DIGITS, "--trials", 9, "--no-finale")
    assert extended.status == 0, extended.err
    assert "9 of 9 configurations" in extended.out
    search("run", "--name", "tiny", "--max-retrain-epochs", 1)
    assert summary(home)["holdout_reads"] == 2
    study = optuna.load_study(study_name="tiny", storage="sqlite:///studies/search.db")
    reads = study.user_attrs["holdout_reads"]
    assert [set(read) for read in reads] == [{"when", "by", "trial", "seed"}] * 2


def test_a_study_goes_on_by_its_name_alone(search: Command, tiny: Path, home: Path) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale")
    tiny.unlink()
    ended = search("run", "--name", "tiny", "--trials", 3, "--no-finale")
    assert ended.status == 0, ended.err
    assert "goes on where it stopped" in ended.out
    assert summary(home)["budget"]["complete"] == 3  # type: ignore[index]


def test_a_changed_space_is_refused_with_the_difference(search: Command, tiny: Path) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale")
    tiny.write_text(tiny.read_text().replace("high = 0.2, log", "high = 0.4, log"))
    refused = search("run", "--study", tiny, *DIGITS, "--trials", 2)
    assert refused.status == 2
    assert "space.lr.high: 0.2 -> 0.4; give the changed one another --name" in refused.complaint
    assert search("run", "--study", tiny, "--name", "other", *DIGITS, "--trials", 1, "--no-finale").status == 0


def test_another_trial_length_is_refused_with_the_difference(search: Command, tiny: Path) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale")
    refused = search("run", "--study", tiny, *DIGITS, "--max-epochs", 1, "--train-images", 64)
    assert refused.status == 2
    assert "trial.epochs: 2 -> 1; trial.train_images: 96 -> 64" in refused.complaint


def test_budget_pruner_and_retrain_may_change(search: Command, tiny: Path, home: Path) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale")
    tiny.write_text(
        tiny.read_text().replace(
            "[retrain]\nepochs = 2\nmax_epochs = 2", "[pruner]\nkind = 'none'\n[retrain]\nepochs = 1\nmax_epochs = 1"
        )
    )
    ended = search("run", "--study", tiny, *DIGITS, "--trials", 2)
    assert ended.status == 0, ended.err
    assert summary(home)["retrain"]["epochs"] == 1  # type: ignore[index]


def test_other_images_are_refused(search: Command, tiny: Path, home: Path) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale")
    refused = search("run", "--study", tiny, "--dataset", "cifar10", "--trials", 1)
    assert (refused.status, "was begun on digits, not on cifar10" in refused.complaint) == (2, True)
    engine = sa.create_engine("sqlite:///studies/search.db")
    with engine.begin() as connection:
        query = "UPDATE study_user_attributes SET value_json = replace(value_json, :print, 'aa') WHERE key = 'dataset'"
        connection.execute(sa.text(query), {"print": summary(home)["dataset"]["fingerprint"]})  # type: ignore[index]
    engine.dispose()
    refused = search("run", "--study", tiny, *DIGITS, "--trials", 2)
    assert refused.status == 2
    assert "was begun on other images (fingerprint aa" in refused.complaint


def test_quick_tries_shorten_everything(search: Command, tiny: Path, home: Path) -> None:
    options = ("--trials", 2, "--max-epochs", 1, "--train-images", 40, "--max-retrain-epochs", 1, "--seed", 5)
    ended = search("run", "--study", tiny, *DIGITS, *options, "--out", home / "elsewhere")
    assert ended.status == 0, ended.err
    written = json.loads((home / "elsewhere" / "summary.json").read_text())
    assert written["retrain"]["epochs"] == 1
    study = optuna.load_study(study_name="tiny", storage="sqlite:///studies/search.db")
    assert all(list(trial.intermediate_values) == [1] for trial in study.trials)
    assert study.user_attrs["definition"]["seed"] == 5


def test_a_study_keeps_its_seed(search: Command, tiny: Path) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale", "--seed", 5)
    search("run", "--study", tiny, *DIGITS, "--trials", 2, "--no-finale")
    study = optuna.load_study(study_name="tiny", storage="sqlite:///studies/search.db")
    assert study.user_attrs["definition"]["seed"] == 5


@pytest.mark.slow
def test_timeout_ends_the_search_and_the_finale_follows(search: Command, tiny: Path, home: Path) -> None:
    ended = search("run", "--study", tiny, *DIGITS, "--trials", 100_000, "--timeout", 3)
    assert ended.status == 0, ended.err
    assert "The time was up before the budget was done; to go on: python -m search run" in ended.out
    written = summary(home)
    assert 0 < written["budget"]["complete"] < 100_000  # type: ignore[index]
    assert written["retrain"] is not None


def test_digits_stand_in_with_a_warning_where_nothing_else_is_to_be_had(
    search: Command, tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.cifar10.can_fetch", lambda _: False)
    ended = search("run", "--study", tiny, "--trials", 1)
    assert ended.status == 0, ended.err
    assert ended.out.count("CIFAR-10 was not to be had when this study began") == 2
    assert summary(home)["dataset"]["name"] == "digits"  # type: ignore[index]
    assert summary(home)["warnings"]
    assert "was not to be had" in search("status", "--name", "tiny").out


def test_any_storage_does(search: Command, tiny: Path, home: Path, any_storage: URL) -> None:
    url = any_storage.render_as_string(hide_password=False)
    ended = search("run", "--study", tiny, *DIGITS, "--trials", 2, "--storage", url)
    assert ended.status == 0, ended.err
    status = search("status", "--storage", url, "--format", "json")
    assert json.loads(status.out)["budget"]["complete"] == 2


def test_status_says_how_a_study_stands(search: Command, tiny: Path) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 2)
    table = search("status")
    assert table.status == 0
    assert "2 of 2 configurations" in table.out
    stated = json.loads(search("status", "--name", "tiny", "--format", "json").out)
    assert stated["study"] == "tiny"
    assert stated["running_trials"] == []
    assert stated["retrain"]["test_accuracy"]["n"] == 1


def test_status_shows_running_trials(search: Command, tiny: Path) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale")
    study = optuna.load_study(study_name="tiny", storage=open_storage(storage_url(None)))
    study.ask().report(0.25, 1)
    assert re.search(r"trial 1 +1 +25.00 %", search("status").out)


def test_data_is_fetched_and_verified_ahead_of_time(search: Command) -> None:
    ended = search("data", "--dataset", "digits")
    assert ended.status == 0
    assert "1,293 fit and 144 validation images, 10 classes" in ended.out


@pytest.mark.slow
def test_a_quick_try_on_real_cifar10(search: Command, tiny: Path, home: Path, cifar10_dir: Path) -> None:
    ended = search("run", "--study", tiny, "--trials", 1, "--data-dir", cifar10_dir, "--max-retrain-epochs", 1)
    assert ended.status == 0, ended.err
    assert summary(home)["dataset"]["fit"] == 45_000  # type: ignore[index]
