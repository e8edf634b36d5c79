"""Real processes, really killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from search.ledger import CAUSE, RETRY_OF
from support.command import Command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(home: Path, tiny: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``run`` on digits with trials that last long enough to be hit."""
    tiny.write_text(tiny.read_text().replace("epochs = 2\ntrain_images = 96", "epochs = 200"))
    processes = []

    def run(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "search", "run", "--study", "tiny.toml", "--dataset", "digits", *words]
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def study() -> optuna.Study:
    return optuna.load_study(study_name="tiny", storage="sqlite:///studies/search.db")


def wait_for_epochs(process: subprocess.Popen[str], epochs: int) -> None:
    """Until the process's output tells of so many epochs."""
    assert process.stdout is not None
    for line in process.stdout:
        epochs -= ": epoch " in line
        if epochs == 0:
            return
    raise AssertionError(process.communicate()[1])


def finish(search: Command, trials: int) -> dict[str, object]:
    """The same command again, with the trials' end brought near."""
    frozen = study()
    definition = frozen.user_attrs["definition"]
    definition["trial"]["epochs"] = 1
    frozen.set_user_attr("definition", definition)
    ended = search("run", "--name", "tiny", "--trials", trials, "--no-finale")
    assert ended.status == 0, ended.err
    summary: dict[str, object] = json.loads(Path("studies/tiny/summary.json").read_text())
    return summary


def test_kill_9_in_mid_trial_loses_nothing(start: Callable[..., subprocess.Popen[str]], search: Command) -> None:
    process = start("--trials", "3")
    wait_for_epochs(process, 2)
    process.kill()
    process.wait()
    assert [trial.state for trial in study().trials] == [TrialState.RUNNING]
    budget = finish(search, 3)["budget"]
    assert budget == {
        "requested": 3, "complete": 3, "pruned": 0, "failed_attempts": 1, "running": 0, "waiting": 0,
    }  # fmt: skip
    killed, retry = study().trials[:2]
    assert killed.state == TrialState.FAIL
    assert killed.user_attrs[CAUSE] == "worker killed"
    assert retry.user_attrs[RETRY_OF] == 0
    assert retry.params == killed.params


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_hands_its_trial_back_and_says_how_to_go_on(
    start: Callable[..., subprocess.Popen[str]], search: Command, sent: signal.Signals
) -> None:
    process = start("--trials", "2", "--storage=sqlite:///studies/search.db")
    wait_for_epochs(process, 2)
    begun = time.monotonic()
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert process.returncode == 130
    assert err.startswith(
        "search: interrupted; nothing stored is lost. To go on: python -m search run --study tiny.toml"
    )
    assert err.count("\n") == 1
    assert [trial.state for trial in study().trials] == [TrialState.FAIL, TrialState.WAITING]
    assert json.loads(Path("studies/tiny/summary.json").read_text())["budget"]["waiting"] == 1
    assert finish(search, 2)["budget"]["complete"] == 2  # type: ignore[index]
    assert study().trials[1].params == study().trials[0].params


def test_two_runs_of_one_study_at_once_are_refused(
    start: Callable[..., subprocess.Popen[str]], search: Command
) -> None:
    wait_for_epochs(start("--trials", "2"), 1)
    refused = search("run", "--study", "tiny.toml", "--dataset", "digits", "--trials", 2)
    assert refused.status == 2
    assert "study 'tiny' is being run by another process" in refused.complaint
    assert [trial.state for trial in study().trials] == [TrialState.RUNNING]


def test_looking_at_a_study_does_not_need_torch(search: Command, tiny: Path) -> None:
    search("run", "--study", tiny, "--dataset", "digits", "--trials", 1, "--no-finale")
    code = (
        "import sys; sys.argv = ['search', 'status'];\n"
        "from search.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
