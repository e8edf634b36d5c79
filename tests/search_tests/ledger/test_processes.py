"""`run` and its workers as real processes, really killed."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from search.attributes import CAUSE, FAULT, SLOT

ROOT = Path(__file__).parents[3]


pytestmark = pytest.mark.slow

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(home: Path, tiny: Path) -> Iterator[Start]:
    """Starts ``python -m search`` on digits, with trials that last long enough to be hit."""
    tiny.write_text(tiny.read_text().replace("epochs = 2\ntrain_images = 96", "epochs = 40\ntrain_images = 200"))
    tiny.write_text(tiny.read_text() + "\n[workers]\nheartbeat = 0.5\nlost_after = 6\n")
    processes = []

    def call(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "search", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield call
    for process in processes:
        process.kill()
        process.communicate()
    for worker in workers():
        worker.kill()


RUN = ("run", "--study", "tiny.toml", "--dataset", "digits", "--no-finale")


def workers() -> list[psutil.Process]:
    """Worker processes of this test."""
    here = str(Path.cwd())
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if "worker" in line and "--out" in line and line[line.index("--out") + 1].startswith(here):
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def study() -> optuna.Study:
    return optuna.load_study(study_name="tiny", storage="sqlite:///studies/search.db")


def states() -> list[TrialState]:
    return [trial.state for trial in study().trials]


def wait_for_epochs(process: subprocess.Popen[str], epochs: int) -> None:
    """Until the process's output tells of so many epochs."""
    assert process.stdout is not None
    for line in process.stdout:
        epochs -= ": epoch " in line
        if epochs == 0:
            return
    raise AssertionError(process.communicate()[1])


def ended_well(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


def summary() -> dict[str, int]:
    budget: dict[str, int] = json.loads(Path("studies/tiny/summary.json").read_text())["budget"]
    return budget


def test_a_killed_worker_is_replaced_and_its_trial_goes_on(start: Start) -> None:
    process = start(*RUN, "--trials", "3")
    wait_for_epochs(process, 2)
    (worker,) = workers()
    worker.kill()
    out = ended_well(process)
    assert f"(pid {worker.pid}) was ended by signal 9" in out
    killed, retry = study().trials[:2]
    assert killed.state == TrialState.FAIL
    assert killed.user_attrs[FAULT] == "killed"
    assert "killed by signal 9" in killed.user_attrs[CAUSE]
    assert retry.params == killed.params
    assert (retry.user_attrs[SLOT], retry.user_attrs["attempt"]) == (killed.user_attrs[SLOT], 2)
    assert len(retry.intermediate_values) == 40
    assert "trial 1 goes on after epoch" in Path("studies/tiny/workers/worker-0.log").read_text()
    assert summary() == {
        "requested": 3, "complete": 3, "pruned": 0, "failed_attempts": 1, "running": 0, "waiting": 0,
    }  # fmt: skip


def test_workers_go_on_without_their_run_and_a_new_one_finds_them(start: Start) -> None:
    Path("tiny.toml").write_text(Path("tiny.toml").read_text().replace("epochs = 40", "epochs = 400"))
    first = start(*RUN, "--trials", "2")
    wait_for_epochs(first, 2)
    first.kill()
    first.wait()
    (worker,) = workers()
    second = start(*RUN, "--trials", "2")
    out = ended_well(second)
    assert "1 worker of an earlier run is still at work" in out
    assert states() == [TrialState.COMPLETE] * 2
    assert psutil.wait_procs([worker], timeout=10)[0]


def test_workers_end_the_budget_by_themselves(start: Start) -> None:
    first = start(*RUN, "--trials", "2")
    wait_for_epochs(first, 1)
    first.kill()
    first.wait()
    until = time.monotonic() + 100
    while workers() and time.monotonic() < until:
        time.sleep(0.2)
    assert states() == [TrialState.COMPLETE] * 2


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_stops_its_workers_and_says_how_to_go_on(start: Start, sent: signal.Signals) -> None:
    process = start(*RUN, "--trials", "2", "--storage=sqlite:///studies/search.db")
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
    assert not workers()
    (trial,) = study().trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs[FAULT] == "preempted"
    assert summary()["waiting"] == 2
    ended_well(start(*RUN, "--trials", "2"))
    assert study().trials[1].params == trial.params
    assert summary()["complete"] == 2


def test_a_second_run_watches_the_first_ones_workers_and_may_extend_but_not_shrink(start: Start) -> None:
    Path("tiny.toml").write_text(Path("tiny.toml").read_text().replace("epochs = 40", "epochs = 400"))
    first = start(*RUN, "--trials", "2")
    wait_for_epochs(first, 1)
    Path("other.toml").write_text(Path("tiny.toml").read_text().replace("high = 0.2, log", "high = 0.3, log"))
    shrunk = start(*RUN, "--trials", "1")
    other = start("run", "--study", "other.toml", "--name", "tiny", "--dataset", "digits")
    _, err = shrunk.communicate(timeout=100)
    assert shrunk.returncode == 2
    assert "has a budget of 2, and workers (1) are working it off" in err
    _, err = other.communicate(timeout=100)
    assert other.returncode == 2
    assert "another space or trial length" in err
    extended = start(*RUN, "--trials", "3")
    ended_well(extended)
    ended_well(first)
    assert states() == [TrialState.COMPLETE] * 3
    assert len(list(Path("studies/tiny/workers").iterdir())) == 1


def is_recorded() -> bool:
    """Whether `run` has created the study. Read without Optuna, which would create tables beside `run`."""
    try:
        with contextlib.closing(sqlite3.connect("file:studies/search.db?mode=ro", uri=True)) as connection:
            slots = connection.execute("select count(*) from search_slots").fetchone()
    except sqlite3.OperationalError:
        return False
    return bool(slots[0])


def test_a_worker_joins_by_hand_and_hands_back_when_asked_to_go(start: Start) -> None:
    process = start(*RUN, "--trials", "6", "--workers", "0")
    until = time.monotonic() + 60
    while not is_recorded():
        assert time.monotonic() < until
        time.sleep(0.5)
    worker = start("worker", "--name", "tiny")
    wait_for_epochs(process, 1)
    worker.terminate()
    _, err = worker.communicate(timeout=10)
    assert worker.returncode == 130
    assert "interrupted; nothing stored is lost. To go on: python -m search worker --name tiny" in err
    assert states()[-1] == TrialState.FAIL
    out = ended_well(start("worker", "--name", "tiny", "--max-trials", "2"))
    assert "2 configurations done by this worker" in out
    both = [start("worker", "--name", "tiny") for _ in range(2)]
    for worker in both:
        ended_well(worker)
    ended_well(process)
    done = summary()
    assert done["complete"] + done["pruned"] == 6


def test_looking_at_a_study_and_waiting_for_work_do_not_need_torch(start: Start) -> None:
    ended_well(start(*RUN, "--trials", "1"))
    for words in (["status"], ["worker", "--name", "tiny"]):
        code = (
            f"import sys; sys.argv = ['search', *{words}];\n"
            "from search.cli.main import main\n"
            "try: main()\n"
            "except SystemExit as end: assert end.code == 0, end.code\n"
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def test_a_bug_stops_the_run_with_the_cause(start: Start) -> None:
    Path("sitecustomize.py").write_text(
        "import sys\n"
        "if 'worker' in sys.argv:\n"
        "    import model.network\n"
        "    def broken(*_, **__): raise ZeroDivisionError('a bug')\n"
        "    model.network.build_network = broken\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "search", *RUN, "--workers", "2"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path.cwd()}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "attempts in a row failed, the last one with: ZeroDivisionError: a bug" in err
    assert TrialState.RUNNING not in states()
    assert not workers()


def test_one_long_step_does_not_keep_a_worker_that_is_asked_to_go(start: Start) -> None:
    Path("sitecustomize.py").write_text(
        "import sys\n"
        "if 'worker' in sys.argv:\n"
        "    import torch, search.worker.trial\n"
        "    def long(*_, **__):\n"
        "        print('long step', flush=True)\n"
        "        torch.mm(torch.ones(20000, 20000), torch.ones(20000, 20000))\n"
        "        yield\n"
        "    search.worker.trial.fit = long\n"
    )
    ended_well(start(*RUN, "--workers", "0", "--timeout", "1"))
    worker = subprocess.Popen(
        [sys.executable, "-m", "search", "worker", "--name", "tiny"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path.cwd()}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    assert any("long step" in line for line in worker.stdout)
    asked = time.monotonic()
    worker.terminate()
    worker.communicate(timeout=10)
    assert time.monotonic() - asked < 10
    assert worker.returncode == 130
    (trial,) = study().trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs[FAULT] == "preempted"
