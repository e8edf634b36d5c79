"""Two objectives: Pareto searches, their knee, and limits on what a network may cost."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import URL

import search.worker.trial
from data.errors import UserError
from model.config import FitConfig
from model.fit import FitState, NonFiniteLossError
from model.result import EpochResult
from search.analysis.outcomes import outcome
from search.analysis.pareto import Point, front, knee
from search.analysis.selection import CostLimits, SelectionRule, candidates, front_of
from search.attributes import FAULT, SLOT
from search.config.objective import cost_of, parse_objective, score, second_objective
from search.config.study_file import as_toml, find_study, load_study_file
from search.events import EpochFinished, Event, Note
from search.ledger.attempts import finish_attempt
from search.ledger.budget import count_budget, request_budget
from search.ledger.leases import LeaseLostError, lease_again, lease_slot, open_ledger
from search.report.study_figures import accuracy_cost_figure
from search.storage.connect import storage_opened
from search.storage.url import storage_url
from search.study import load
from search.worker.loop import run_worker
from search.worker.runner import WorkerOptions
from search.worker.stop import StoppedError, StopRequest
from support.bench import begin, enter, new_study
from support.command import Command

DIGITS = ("--dataset", "digits")
STORAGE = "sqlite:///studies/search.db"


@dataclass(frozen=True)
class Stored:
    """A study as it is stored at one moment."""

    trials: list[FrozenTrial]
    best_trials: list[FrozenTrial]
    directions: list[StudyDirection]
    metric_names: list[str] | None
    user_attrs: dict[str, Any]


def loaded(name: str = "tiny", url: str = STORAGE) -> Stored:
    with storage_opened(storage_url(url)) as storage:
        study = load(storage, name)
        return Stored(study.trials, study.best_trials, study.directions, study.metric_names, study.user_attrs)


def summary(home: Path, name: str = "tiny") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((home / "studies" / name / "summary.json").read_text())
    return content


def complete(study: Stored) -> list[FrozenTrial]:
    return [trial for trial in study.trials if trial.state == TrialState.COMPLETE]


# The front and its knee

COSTS = st.floats(1.0, 1e12)
POINTS = st.lists(st.tuples(st.integers(0, 100).map(lambda x: x / 100), COSTS), min_size=1, max_size=30).map(
    lambda rows: [Point(key, accuracy, cost) for key, (accuracy, cost) in enumerate(rows)]
)


@given(POINTS)
def test_nothing_beats_the_front_and_the_front_beats_the_rest(points: list[Point]) -> None:
    there = front(points)
    assert [one.cost for one in there] == sorted({one.cost for one in there})
    assert [one.accuracy for one in there] == sorted({one.accuracy for one in there})
    for point in points:
        assert any(one.accuracy >= point.accuracy and one.cost <= point.cost for one in there)
        for one in there:
            assert not (point.accuracy > one.accuracy and point.cost <= one.cost)
            assert not (point.accuracy >= one.accuracy and point.cost < one.cost)


@given(POINTS, st.permutations(range(30)))
def test_the_knee_is_on_the_front_whatever_the_order(points: list[Point], order: list[int]) -> None:
    found = knee(points)
    assert found in front(points)
    assert knee([points[i] for i in order if i < len(points)]) == found


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 40)), min_size=1, max_size=20),
    st.integers(-8, 8),
    st.integers(-8, 8),
    st.integers(-4, 4),
)
def test_the_knee_does_not_depend_on_the_units_of_either_axis(
    rows: list[tuple[int, int]], dearer: int, finer: int, higher: int
) -> None:
    points = [Point(key, accuracy / 64, 2.0**cost) for key, (accuracy, cost) in enumerate(rows)]
    scaled = [Point(p.key, p.accuracy * 2.0**finer + higher, p.cost * 2.0**dearer) for p in points]
    before, after = knee(points), knee(scaled)
    assert before is not None
    assert after is not None
    assert before.key == after.key


def test_the_knee_is_the_point_farthest_above_the_chord() -> None:
    # In doublings from 0 to 4: the chord is at 0.25, 0.5, 0.75 between the ends.
    points = [Point(i, a, c) for i, (a, c) in enumerate([(0.0, 1), (0.4, 2), (0.8, 4), (0.9, 8), (1.0, 16), (0.7, 5)])]
    found = knee(points)
    assert found is not None
    assert found.key == 2
    assert knee([]) is None
    assert knee(points[:1]) == points[0]
    # No bulge, no knee: the most accurate stands for it.
    assert knee([points[0], points[4]]) == points[4]
    assert knee([points[0], Point(9, 0.1, 4), points[4]]) == points[4]


def made(n: int, accuracy: float, parameters: int, **attributes: Any) -> FrozenTrial:
    trial = create_trial(
        values=[accuracy, float(parameters)],
        params={"lr": n},
        distributions={"lr": optuna.distributions.IntDistribution(0, 100)},
        user_attrs={"parameters": parameters, "flops": 10 * parameters, **attributes},
    )
    trial.number = n
    return trial


def test_candidates_are_the_knee_alone_or_the_best_within_every_limit() -> None:
    trials = [made(i, a, 100 * 2**i, latency=0.001 * (9 - i)) for i, a in enumerate([0.1, 0.6, 0.7, 0.75, 0.78])]
    pick = lambda aim: [trial.number for trial in candidates(trials, aim, 3)]  # noqa: E731
    assert pick(SelectionRule()) == [4, 3, 2]
    assert pick(SelectionRule("params")) == [1]
    assert candidates(trials, SelectionRule("params"), 0) == []
    assert pick(SelectionRule(None, CostLimits(params=800))) == [3, 2, 1]
    assert pick(SelectionRule("params", CostLimits(params=400))) == [2, 1, 0]
    assert pick(SelectionRule("latency", CostLimits(latency=0.007))) == [4, 3, 2]
    assert pick(SelectionRule("latency", CostLimits(params=400, latency=0.007))) == [2]
    assert pick(SelectionRule("params", CostLimits(params=99))) == []
    unknown = [made(0, 0.9, 1)]
    assert candidates(unknown, SelectionRule("latency", CostLimits(latency=1.0)), 3) == []
    assert candidates(unknown, SelectionRule("latency"), 3) == []


# Words


def test_objectives_by_name() -> None:
    assert parse_objective("accuracy") == "accuracy"
    assert parse_objective("accuracy, flops") == "accuracy,flops"
    assert (second_objective("accuracy"), second_objective("accuracy,latency")) == (None, "latency")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--objective", "accuracy,foo"), "no objective 'accuracy,foo': take accuracy, or accuracy,params, "),
        (("--objective", "params"), "no objective 'params': take accuracy, or accuracy,params, "),
        (("--objective", "params,accuracy"), "no objective 'params,accuracy'"),
        (("--objective", "accuracy,params,flops"), "no objective 'accuracy,params,flops'"),
        (("--objective", ""), "no objective ''"),
        (("--max-params", "0"), "--max-params takes a number from 1 or none, not '0'"),
        (("--max-params", "1e5"), "--max-params takes a number from 1 or none, not '1e5'"),
        (("--max-latency", "0"), "--max-latency takes seconds above 0, such as 0.002, or none, not '0'"),
        (("--max-latency", "nan"), "--max-latency takes seconds above 0"),
        (("--max-latency", "inf"), "--max-latency takes seconds above 0"),
        (("--max-latency", "soon"), "--max-latency takes seconds above 0"),
        (("--max-latency", "0.1", *DIGITS), "--max-latency needs the latency of every trial"),
        (
            ("--max-latency", "0.1", "--objective", "accuracy,params", *DIGITS),
            "which a study with --objective accuracy,latency measures; this one's objective is accuracy,params",
        ),
    ],
)
def test_wrong_words(search: Command, home: Path, words: tuple[str, ...], text: str) -> None:
    ended = search("run", *words)
    assert ended.status == 2
    assert text in ended.complaint
    if Path(STORAGE.removeprefix("sqlite:///")).exists():  # nothing of it is stored
        assert optuna.get_all_study_names(STORAGE) == []


def test_a_study_file_has_an_objective(tiny: Path, search: Command) -> None:
    tiny.write_text('objective = "accuracy,flops"\n' + tiny.read_text())
    config = load_study_file(tiny)
    assert config.objective == "accuracy,flops"
    assert not config.prunes
    tiny.with_name("again.toml").write_text(as_toml(config))
    assert load_study_file(tiny.with_name("again.toml")) == config
    tiny.write_text(tiny.read_text().replace("accuracy,flops", "flops"))
    ended = search("run", "--study", tiny)
    assert (ended.status, "objective: should be 'accuracy'" in ended.complaint) == (2, True)


# A search


@pytest.mark.parametrize(
    ("any_storage", "cost"),
    [("sqlite", "latency"), ("postgresql", "params"), pytest.param("postgresql", "flops", marks=pytest.mark.slow)],
    indirect=["any_storage"],
)
def test_from_nothing_to_the_retrained_knee(
    search: Command, tiny: Path, home: Path, any_storage: URL, cost: Any
) -> None:
    url = any_storage.render_as_string(hide_password=False)
    tiny.write_text(tiny.read_text().replace("configurations = 2\nseeds = 1", "configurations = 2\nseeds = 2"))
    words = ("run", "--study", tiny, *DIGITS, "--storage", url, "--trials", 6, "--objective", f"accuracy,{cost}")
    ended = search(*words)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.count(f"objective accuracy,{cost}: a Pareto search by multi-objective TPE; nothing is pruned") == 1

    study, confirming = loaded(url=url), loaded("tiny.confirm", url)
    assert study.directions == [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    assert study.metric_names is not None
    assert study.metric_names[0] == "validation accuracy"
    assert len(study.metric_names) == 2
    assert confirming.directions == [StudyDirection.MAXIMIZE]
    for trial in study.trials:
        assert trial.state == TrialState.COMPLETE
        assert list(trial.intermediate_values) == [1, 2]
        assert trial.values == [trial.intermediate_values[2], cost_of(trial, cost)]
    assert len(study.trials) == 6

    # The knee by Optuna's own front, and by hand.
    best = sorted(study.best_trials, key=lambda trial: trial.values[1])
    ends = best[0].values, best[-1].values
    rise, run = ends[1][0] - ends[0][0], math.log(ends[1][1] / ends[0][1])
    height = {
        t.number: (t.values[0] - ends[0][0]) / rise - math.log(t.values[1] / ends[0][1]) / run if rise and run else 0
        for t in best
    }
    written = summary(home)
    assert written["objective"] == f"accuracy,{cost}"
    assert {row["trial"] for row in written["front"]} <= set(height)
    assert all(set(row) == {"trial", "val_accuracy", cost} for row in written["front"])
    chosen = written["best"]["trial"]
    assert height[chosen] >= max(height.values()) - 1e-9
    assert (written["best"]["chosen_by"], set(written["best"]) >= {"val_accuracy", "params"}) == ("knee", True)
    assert [row["trial"] for row in written["confirm"]["configurations"]] == [chosen]
    assert (written["confirm"]["winner"], written["confirm"]["done"]) == (chosen, 2)
    assert written["retrain"]["trial"] == chosen
    assert ("latency" in written["best"]) == (cost == "latency")

    shown = search("status", "--name", "tiny", "--storage", url).out
    assert f"accuracy,{cost}" in shown
    assert "chosen as the knee of the front" in shown
    assert re.search(r"front +\d points?: \d", shown)
    for name in ("report.md", "report.html"):
        text = (home / "studies" / "tiny" / name).read_text()
        assert "both at once (a Pareto search); taken is the knee of the front." in text
        assert f"The star is trial {chosen}: the knee of the front" in text
        assert "Nothing is pruned in a search with two objectives" in text
        assert "Confirmed is the knee of the front alone" in text
        assert ("latency of 1 image at the end of its trial" in text) == (cost == "latency")

    again = search(*words)
    assert again.status == 0
    assert "retrain: epoch" not in again.out
    assert {**summary(home), "seconds": 0} == {**written, "seconds": 0}


def test_a_study_keeps_its_objective(search: Command, tiny: Path, home: Path) -> None:
    start = ("run", "--study", tiny, *DIGITS, "--no-finale")
    assert search(*start, "--trials", 1, "--objective", "accuracy,params").status == 0
    for words in (start, ("run", "--name", "tiny", "--no-finale")):
        for other in ("accuracy", "accuracy,flops"):
            ended = search(*words, "--trials", 2, "--objective", other)
            assert ended.status == 2
            assert f"created with the objective accuracy,params, not {other}, and keeps it" in ended.complaint
    assert len(loaded().trials) == 1
    assert search(*start, "--trials", 2, "--objective", "accuracy,params").status == 0
    assert search(*start, "--trials", 3).status == 0  # left out: its own
    written = summary(home)
    assert (written["objective"], written["budget"]["complete"]) == ("accuracy,params", 3)
    tiny.write_text('objective = "accuracy"\n' + tiny.read_text())
    assert "keeps it" in search(*start, "--trials", 4).complaint
    # And the other way round.
    assert search(*start, "--name", "plain", "--trials", 1).status == 0
    assert "not accuracy,latency" in search("run", "--name", "plain", "--objective", "accuracy,latency").complaint


def test_a_creator_that_died_leaves_no_objective_behind(search: Command, tiny: Path) -> None:
    with storage_opened(storage_url(STORAGE)) as storage:
        optuna.create_study(storage=storage, study_name="tiny", direction="maximize")
    ended = search("run", "--study", tiny, *DIGITS, "--trials", 1, "--no-finale", "--objective", "accuracy,params")
    assert ended.status == 0, ended.err
    assert len(loaded().directions) == 2


# Faults


def scripted(monkeypatch: pytest.MonkeyPatch, script: Any) -> None:
    """Replace the training by ``script(call)``, which gives the accuracies of its epochs or raises."""
    calls = iter(range(1000))

    def fit(network: object, split: object, config: FitConfig, *, state: FitState) -> Iterator[EpochResult]:
        for epoch, accuracy in enumerate(script(next(calls)), start=1):
            if epoch > state.epoch:
                state.epoch = epoch
                yield EpochResult(epoch, 1.0, 0.5, 1.0, accuracy, 100.0, 0.1, 0.1)

    monkeypatch.setattr(search.worker.trial, "fit", fit)


def test_the_sampler_goes_on_past_diverged_infeasible_and_broken_trials(
    search: Command, tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna's TPE cannot rank pruned trials with two objectives; these are broken constraints to it."""

    def script(call: int) -> Iterator[float]:
        yield 0.2 + call / 100
        if call in (1, 6):
            raise NonFiniteLossError("loss is nan")
        if call in (3, 4):
            raise MemoryError("no memory")
        if call == 8:
            raise ZeroDivisionError("a fault")
        yield 0.3 + call / 100

    scripted(monkeypatch, script)
    ended = search(
        "run", "--study", tiny, *DIGITS, "--trials", 12, "--no-finale", "--objective", "accuracy,params", "--workers", 1
    )
    assert ended.status == 0, ended.err
    study = loaded()
    kinds = Counter(map(outcome, study.trials))
    assert kinds == {"complete": 9, "pruned": 2, "infeasible": 1, "failed attempt": 2}
    assert all(trial.values is None for trial in study.trials if trial.state == TrialState.PRUNED)
    budget_of = summary(home)["budget"]
    assert (budget_of["complete"], budget_of["pruned"], budget_of["waiting"]) == (9, 3, 0)
    assert summary(home)["infeasible"] == 1
    search("report", "--name", "tiny")


def test_a_stopped_trial_goes_on_with_its_curve(search: Command, tiny: Path, any_storage: URL) -> None:
    url = any_storage.render_as_string(hide_password=False)
    words = ("run", "--study", tiny, *DIGITS, "--storage", url, "--no-finale", "--objective", "accuracy,latency")
    search(*words, "--trials", 1)
    with storage_opened(any_storage) as storage:
        ledger, study = open_ledger(storage, "tiny", find_study(str(tiny))[1].workers)
        request_budget(ledger, 3)
        stop, told = StopRequest(), []

        def show(event: Event) -> None:
            told.append(event)
            if isinstance(event, EpochFinished):
                stop.request("preempted: a test")

        options = WorkerOptions(any_storage, "tiny", "cpu", Path("none"), Path("out"))
        with pytest.raises(StoppedError):
            run_worker(options, show, stop)
        assert run_worker(options, told.append, StopRequest()) == 2
        assert any(isinstance(event, Note) and "goes on after epoch 1" in event.text for event in told)
        attempts = [trial for trial in study.get_trials() if trial.user_attrs[SLOT] == 1]
        assert [trial.state for trial in attempts] == [TrialState.FAIL, TrialState.COMPLETE]
        assert [list(trial.intermediate_values) for trial in attempts] == [[1], [1, 2]]
        count = count_budget(ledger)
        assert (count.complete, count.failed_attempts, count.waiting, count.running) == (3, 1, 0, 0)


def worker_of(pid: int) -> psutil.Process:
    """Some living worker of the `run` in the process `pid`; one killed a moment ago may not have been reaped yet."""
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "worker" in child.cmdline():
                return child
    raise AssertionError("no worker is alive")


@pytest.mark.slow
def test_killed_workers_leave_the_budget_exact(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace("epochs = 2\ntrain_images = 96", "epochs = 40\ntrain_images = 200"))
    tiny.write_text(tiny.read_text() + "\n[workers]\nheartbeat = 0.5\nlost_after = 6\n")
    words = ("--study", "tiny.toml", "--trials", "4", "--objective", "accuracy,latency", "--workers", "2")
    with subprocess.Popen(
        [sys.executable, "-m", "search", "run", *DIGITS, "--no-finale", *words],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        killed, said = 0, ""
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if ": epoch 5/40" in line and killed < 2:
                killed += 1
                worker_of(process.pid).kill()
        assert process.wait(timeout=60) == 0, said
    study = loaded()
    states = Counter(trial.state for trial in study.trials)
    assert (killed, states.pop(TrialState.COMPLETE)) == (2, 4)
    assert set(states) == {TrialState.FAIL}
    assert states[TrialState.FAIL] in (1, 2)  # a worker may be between two trials
    assert all(len(trial.intermediate_values) == 40 for trial in complete(study))
    assert {trial.user_attrs[FAULT] for trial in study.trials if trial.state == TrialState.FAIL} == {"killed"}


def test_whoever_lost_the_slot_cannot_report_or_tell(any_storage: URL) -> None:
    with storage_opened(any_storage) as storage:
        optuna.create_study(storage=storage, study_name="s", directions=["maximize", "minimize"])
        ledger, study = new_study(storage, "s")
        request_budget(ledger, 1)
        taken = lease_slot(ledger, enter(ledger))
        assert taken is not None
        late = begin(ledger, study, taken)
        assert late is not None
        late.report(1, 0.5)
        renewed = lease_again(ledger, taken)
        assert renewed is not None
        again = begin(ledger, study, renewed)
        assert again is not None
        with pytest.raises(UpdateFinishedTrialError):
            late.report(2, 0.9)
        with pytest.raises(LeaseLostError):
            finish_attempt(ledger, late, TrialState.COMPLETE, [0.9, 1.0])
        again.report(1, 0.25)
        finish_attempt(ledger, again, TrialState.COMPLETE, [0.25, 7.0])
        trials = study.get_trials()
        assert [(trial.values, trial.intermediate_values) for trial in trials] == [
            (None, {1: 0.5}), ([0.25, 7.0], {1: 0.25}),
        ]  # fmt: skip
        assert count_budget(ledger).done == 1


# Limits


def within(study: Stored, most: int) -> list[int]:
    known = [trial for trial in complete(study) if trial.user_attrs["parameters"] <= most]
    return [trial.number for trial in sorted(known, key=lambda trial: (-(score(trial) or 0), trial.number))]


@pytest.fixture(params=["accuracy", "accuracy,flops"])
def searched(search: Command, tiny: Path, request: pytest.FixtureRequest) -> str:
    """A search that is done, without its finale."""
    words = ("run", "--study", tiny, *DIGITS, "--trials", 7, "--no-finale", "--objective", request.param)
    assert search(*words).status == 0
    return str(request.param)


def test_the_finale_keeps_to_a_limit(search: Command, home: Path, searched: str) -> None:
    sizes = sorted(trial.user_attrs["parameters"] for trial in complete(loaded()))
    assert sizes[0] < sizes[-1]
    # None.
    for part in ("confirm", "retrain"):
        ended = search(part, "--name", "tiny", "--max-params", sizes[0] - 1)
        assert ended.status == 2
        text = f"no trial that ran to its end has at most {sizes[0] - 1:,} parameters; the least there is: "
        assert f"{text}{sizes[0]:,} parameters (trial " in ended.complaint
        assert "raise --max-params" in ended.complaint
    assert summary(home)["best"] is None
    # Some.
    most = sizes[3]
    ended = search("confirm", "--name", "tiny", "--max-params", most)
    assert ended.status == 0, ended.err
    right = within(loaded(), most)
    written = summary(home)
    assert written["limits"] == {"params": most, "latency": None}
    confirmed = written["confirm"]
    chosen = {row["trial"] for row in confirmed["configurations"]}
    assert right[0] in chosen <= set(right)
    assert all(row["parameters"] <= most for row in confirmed["configurations"])
    assert (confirmed["chosen_by"], confirmed["limits"], confirmed["unconfirmed"]) == ("limit", {"params": most}, [])
    assert (written["best"]["trial"], written["best"]["chosen_by"]) == (right[0], "limit")
    # Kept, and told.
    ended = search("retrain", "--name", "tiny")
    assert (ended.status, "not confirmed" in ended.out) == (0, False)
    done = summary(home)
    assert done["retrain"]["trial"] == confirmed["winner"]
    assert done["retrain"]["parameters"] <= most
    assert (done["retrain"]["chosen_by"], done["retrain"]["limits"]) == ("limit", {"params": most})
    assert f"at most {most:,} parameters" in search("status", "--name", "tiny").out
    report = (home / "studies" / "tiny" / "report.md").read_text()
    assert f"--max-params {most}\n" in report
    assert "Retrained under other limits" not in report
    assert f"at most {most:,} parameters" in report
    assert f"Confirmed are the best of the configurations with at most {most:,} parameters" in report
    # Another one by the retrain alone says what it lacks; none lifts it.
    ended = search("retrain", "--name", "tiny", "--max-params", sizes[0])
    assert ended.status == 0
    assert summary(home)["retrain"]["parameters"] == sizes[0]
    ended = search("confirm", "--name", "tiny", "--max-params", "none")
    assert ended.status == 0
    written = summary(home)
    assert written["limits"] == {"params": None, "latency": None}
    assert written["retrain"]["limits"] == {"params": sizes[0]}  # its own, which the report says
    assert "Retrained under other limits" in (home / "studies" / "tiny" / "report.md").read_text()
    assert written["best"]["chosen_by"] == ("accuracy" if searched == "accuracy" else "knee")
    assert "--max-latency needs the latency" in search("confirm", "--name", "tiny", "--max-latency", 1).complaint


def test_workers_from_elsewhere_confirm_within_the_limit(search: Command, tiny: Path, any_storage: URL) -> None:
    url = any_storage.render_as_string(hide_password=False)
    words = ("run", "--study", tiny, *DIGITS, "--storage", url, "--objective", "accuracy,latency")
    assert search(*words, "--trials", 4, "--no-finale").status == 0
    times = sorted(trial.values[1] for trial in complete(loaded(url=url)))
    done: list[int] = []

    def join() -> None:
        while not loaded(url=url).user_attrs.get("finale"):
            time.sleep(0.05)
        done.append(
            run_worker(
                WorkerOptions(any_storage, "tiny", "cpu", Path("none"), Path("x")), lambda _: None, StopRequest()
            )
        )

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    ended = search(*words, "--trials", 4, "--workers", 0, "--max-latency", times[1])
    assert ended.status == 0, ended.err
    thread.join(timeout=60)
    assert done == [2]
    study = loaded(url=url)
    quick = {trial.number for trial in complete(study) if trial.values[1] <= times[1]}
    entries = loaded("tiny.confirm", url).user_attrs["confirms"]
    assert {entry["trial"] for entry in entries} == quick
    assert study.user_attrs["retrain"]["trial"] in quick


def test_no_latency_is_low_enough(search: Command, tiny: Path, home: Path) -> None:
    words = ("run", "--study", tiny, *DIGITS, "--trials", 2, "--objective", "accuracy,latency")
    ended = search(*words, "--max-latency", 1e-9)
    assert ended.status == 2
    assert re.search(r"the least there is: [\d.]+ ms \(trial \d\); raise --max-latency, or lift it", ended.complaint)
    assert summary(home)["budget"]["complete"] == 2  # nothing is lost, and the same with a higher one goes on
    assert search("confirm", "--max-latency", 100).status == 0
    assert summary(home)["confirm"]["winner"] is not None


def test_latencies_of_several_devices_are_warned_of(search: Command, tiny: Path, home: Path) -> None:
    search("run", "--study", tiny, *DIGITS, "--trials", 2, "--no-finale", "--objective", "accuracy,latency")
    report = home / "studies" / "tiny" / "report.md"
    assert "Latencies of several kinds of devices" not in report.read_text()
    engine = sa.create_engine(STORAGE)
    with engine.begin() as connection:
        query = "UPDATE trial_user_attributes SET value_json = '\"GPU 9\"' WHERE key = 'device' AND trial_id = 1"
        connection.execute(sa.text(query))
    engine.dispose()
    search("report")
    assert "Latencies of several kinds of devices" in report.read_text()
    assert "GPU 9 (1 trial)" in report.read_text()


# Figures


def test_the_figure_shows_every_known_cost_and_the_chosen_point() -> None:
    plain = [made(i, 0.5 + i / 10, 100 * 2**i) for i in range(4)]
    timed = [made(i, 0.5 + i / 10, 100 * 2**i, latency=0.001 * (i + 1)) for i in range(4)]
    assert "xaxis3" not in accuracy_cost_figure(plain).to_plotly_json()["layout"]
    figure = accuracy_cost_figure(timed, chosen=2)
    assert "xaxis3" in figure.to_plotly_json()["layout"]
    stars = [(list(trace.x), list(trace.y)) for trace in figure.data if trace.marker.symbol == "star"]
    assert stars == [([400], [0.7]), ([4000], [0.7]), ([0.003], [0.7])]
    assert [trial.number for trial in front_of(timed, "latency")] == [0, 1, 2, 3]


def test_limits_in_words() -> None:
    assert CostLimits().text == ""
    assert CostLimits(params=100_000, latency=0.0025).text == "at most 100,000 parameters and at most 2.5 ms"
    with pytest.raises(UserError, match="no objective 'speed'"):
        parse_objective("speed")
