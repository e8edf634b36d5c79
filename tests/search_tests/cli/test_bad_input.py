"""Every mistake gets one line that says what is wrong and what would be right, and exit status 2."""

from pathlib import Path

import optuna
import pytest

from search.worker.stop import StopRequest
from support.command import Command


@pytest.fixture(autouse=True)
def own_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that runs in this process leaves its signals alone."""
    monkeypatch.setattr(StopRequest, "install", lambda _: None)


def refused(search: Command, *words: object) -> str:
    ended = search(*words)
    assert ended.status == 2, (ended.status, ended.out, ended.err)
    return ended.complaint


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("run", "--study", "cifar11"), "unknown study 'cifar11'; give a .toml file or one of: cifar10, cpu, seed"),
        (("run", "--study", "absent.toml"), "no study file absent.toml"),
        (("run", "--trials", "0"), "Invalid value for '--trials'"),
        (("run", "--trials", "-3"), "Invalid value for '--trials'"),
        (("run", "--trials", "many"), "Invalid value for '--trials'"),
        (("run", "--max-epochs", "0"), "Invalid value for '--max-epochs'"),
        (("run", "--seed", "-1"), "Invalid value for '--seed'"),
        (("run", "--speed", "3"), "No such option: --speed"),
        (("search",), "No such command 'search'"),
        (("run", "--dataset", "imagenet"), "unknown data set 'imagenet'; choose auto, cifar10, digits or folder:DIR"),
        (("run", "--dataset", "folder:absent"), "folder:absent is not a folder"),
        (("run", "--device", "cuda:7"), "cuda:7 is not there: this machine has"),
        (("run", "--device", "gpu"), "unknown device 'gpu'; choose auto, cpu, cuda, cuda:N or cuda:N,M"),
        (("run", "--name", "a/b"), "'a/b' cannot name a study"),
        (("run", "--name", ""), "'' cannot name a study"),
        (("run", "--storage", "mysql://u:secretword@h/d"), "storage driver 'mysql' is not supported"),
        (("run", "--storage", "nonsense"), "not a database URL"),
        (("status", "--storage", "sqlite:///absent.db"), "no database absent.db"),
        (("status", "--format", "xml"), "'xml' is not one of 'table', 'json'"),
        (("status", "--name", "a/b", "--storage", "sqlite:///absent.db"), "no database absent.db"),
        (("data", "--dataset", "auto"), "name the data set"),
        (("run", "--timeout", "0"), "Invalid value for '--timeout'"),
        (("run", "--timeout", "soon"), "Invalid value for '--timeout'"),
        (("run", "--timeout", "nan"), "Invalid value for '--timeout'"),
        (("run", "--workers"), "'--workers' requires an argument"),
        (("run", "--workers-per-gpu", "0"), "--workers-per-gpu takes auto or a number from 1 to 1024, not '0'"),
        (("run", "--workers-per-gpu", "some"), "--workers-per-gpu takes auto or a number from 1 to 1024, not 'some'"),
        (("run", "--device", "cuda:0,x"), "unknown device 'cuda:0,x'"),
        (("worker",), "Missing option '--name'"),
        (("worker", "--name", "s", "--storage", "sqlite:///absent.db"), "no database absent.db"),
        (("worker", "--name", "s", "--max-trials", "0"), "Invalid value for '--max-trials'"),
        (("worker", "--name", "s", "--storage", "mysql://u:secretword@h/d"), "storage driver 'mysql'"),
        (("dashboard", "--storage", "sqlite:///absent.db"), "no database absent.db"),
        (("dashboard", "--port", "70000"), "Invalid value for '--port'"),
    ],
)
def test_wrong_words(search: Command, home: Path, words: tuple[str, ...], text: str) -> None:
    if "cuda:7" in words:
        import torch

        if torch.cuda.device_count() > 7:
            pytest.skip("this machine has eight GPUs")
    complaint = refused(search, *words)
    assert text in complaint
    assert "secretword" not in complaint


def test_a_storage_in_a_folder_that_cannot_be_made(search: Command, tiny: Path, home: Path) -> None:
    (home / "file").touch()
    words = ("run", "--study", tiny, "--dataset", "digits", "--storage", "sqlite:///file/search.db")
    assert "storage sqlite:///file/search.db: folder file cannot be made" in refused(search, *words)


def test_a_name_that_no_folder_could_have_creates_nothing(search: Command, tiny: Path, home: Path) -> None:
    for name in ("..", "a b", "x" * 101, "-"):
        refused(search, "run", "--study", tiny, "--dataset", "digits", f"--name={name}")
    assert not (home / "studies").exists()


def test_a_wrong_password(search: Command, home: Path, unused_port: int) -> None:
    url = f"postgresql://u:secretword@127.0.0.1:{unused_port}/d"
    complaint = refused(search, "run", "--dataset", "digits", "--storage", url)
    assert "cannot be used" in complaint
    assert "secretword" not in complaint


def test_an_output_folder_that_cannot_be_written(search: Command, tiny: Path, home: Path) -> None:
    (home / "file").touch()
    complaint = refused(search, "run", "--study", tiny, "--dataset", "digits", "--out", home / "file" / "below")
    assert "output folder" in complaint
    assert "choose one with --out" in complaint


def test_a_corrupt_data_file_is_named_and_nothing_else_taken(search: Command, tiny: Path, home: Path) -> None:
    folder = home / "images" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "data_batch_1").write_bytes(b"half a file")
    for dataset in ("auto", "cifar10"):
        complaint = refused(search, "run", "--study", tiny, "--data-dir", home / "images", "--dataset", dataset)
        assert "damaged: data_batch_1" in complaint
        assert "python -m search data" in complaint


def test_cifar10_without_data_or_network_names_three_ways_out(
    search: Command, tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.cifar10.can_fetch", lambda _: False)
    complaint = refused(search, "run", "--study", tiny, "--dataset", "cifar10")
    for way in ("python -m search data", "$SEARCH_DATA_DIR", "--dataset digits"):
        assert way in complaint


def test_a_database_made_by_something_else(search: Command, tiny: Path, home: Path) -> None:
    (home / "notes.db").write_text("no database at all, just words. " * 50)
    complaint = refused(search, "run", "--study", tiny, "--dataset", "digits", "--storage", "sqlite:///notes.db")
    assert "file is not a database" in complaint


def test_a_study_made_by_something_else(search: Command, tiny: Path, home: Path) -> None:
    (home / "studies").mkdir()
    theirs = optuna.create_study(storage="sqlite:///studies/search.db", study_name="tiny")
    theirs.add_trial(optuna.trial.create_trial(value=1.0))
    complaint = refused(search, "run", "--study", tiny, "--dataset", "digits")
    assert "study 'tiny' was made by something else; choose another --name" in complaint
    assert "made by something else" in refused(search, "status", "--name", "tiny")
    assert theirs.best_value == 1.0


def test_status_of_studies_that_are_not_there(search: Command, tiny: Path) -> None:
    for name in ("a", "b"):
        words = ("run", "--study", tiny, "--dataset", "digits", "--trials", 1, "--no-finale", "--name", name)
        assert search(*words).status == 0
    assert "no study 'c': this storage has a, b" in refused(search, "status", "--name", "c")
    assert "which study? it has a, b; choose with --name" in refused(search, "status")


def test_nothing_to_retrain_is_a_failed_run_not_wrong_input(
    search: Command, tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_text(
        tiny.read_text().replace("low = 0.01, high = 0.2", "low = 50.0, high = 100.0").replace("lr = 0.1", "")
    )
    tiny.write_text(tiny.read_text() + '\n[pruner]\nkind = "none"\n')
    from model.fit import NonFiniteLossError

    def diverge(*_: object, **__: object) -> None:
        raise NonFiniteLossError("loss is nan")

    monkeypatch.setattr("search.worker.trial.fit", diverge)
    ended = search("run", "--study", tiny, "--dataset", "digits", "--trials", 2)
    assert ended.status == 1
    assert "no trial ran to its end" in ended.complaint


def test_a_traceback_only_with_debug(search: Command, home: Path) -> None:
    from data.errors import UserError

    with pytest.raises(UserError, match="unknown study"):
        search("run", "--study", "cifar11", "--debug")


def test_no_words_at_all_show_the_help(search: Command, home: Path) -> None:
    ended = search()
    assert ended.status == 0
    for command in ("run", "status", "doctor", "data"):
        assert command in ended.out


@pytest.mark.parametrize("form", ["--storage={}", "{}"])
def test_the_command_to_go_on_with_holds_no_password(
    search: Command, home: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("search.run.run.run", interrupted)
    url = form.format("postgresql://u:secretword@h/d?password=secretword")
    words = ("run", url) if form.startswith("--") else ("run", "--storage", url)
    ended = search(*words, "--name", "two words")
    assert ended.status == 130
    assert "To go on: python -m search run" in ended.complaint
    assert "postgresql+psycopg://u:***@h/d" in ended.complaint
    assert "'two words'" in ended.complaint
    assert "secretword" not in ended.complaint
